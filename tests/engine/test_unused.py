"""Settings that the chosen model would leave unused are refused."""

import pytest

from d2_balance.engine.setup.unused import check_regions_are_used

from ..conftest import small_cfg

RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
ENTRIES = {"IGNORE_REGIONS": [["a", "b.json"]], "EXTERNAL": [{"NAME": "a"}]}
ARCH = "MODEL.META_ARCHITECTURE"
HEADS = "MODEL.ROI_HEADS.NAME"
GENERATOR = "MODEL.PROPOSAL_GENERATOR.NAME BalancedRPN"


def cfg_with(key, kind, *overrides, balanced=True):
    cfg = small_cfg(kind, *overrides, balanced=balanced)
    cfg.DATASETS[key] = ENTRIES[key]
    return cfg


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize(
    ("kind", "balanced", "overrides", "changes"),
    [
        ("retinanet", False, (), f"{ARCH} BalancedRetinaNet"),
        ("mask", True, (), GENERATOR),
        ("mask", True, (*RPN, HEADS, "StandardROIHeads"), f"{HEADS} BalancedStandardROIHeads"),
        ("cascade", True, (*RPN, ARCH, "GeneralizedRCNN"), f"{ARCH} BalancedRCNN"),
        (
            "cascade",
            False,
            (),
            f"{ARCH} BalancedRCNN and {HEADS} BalancedCascadeROIHeads and {GENERATOR}",
        ),
    ],
)
def test_each_part_that_would_ignore_regions_is_named(key, kind, balanced, overrides, changes):
    with pytest.raises(ValueError) as error:
        check_regions_are_used(cfg_with(key, kind, *overrides, balanced=balanced))
    message = str(error.value)
    assert message.startswith(f"DATASETS.{key} gives ignore regions or boxes without masks")
    assert message.endswith(f": set {changes}.")


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize("kind", ["retinanet", "fcos", "mask", "cascade"])
def test_models_that_know_regions_pass(key, kind):
    check_regions_are_used(cfg_with(key, kind, *(RPN if kind in ("mask", "cascade") else ())))


def test_a_stock_model_without_regions_passes():
    for kind in ("retinanet", "mask", "cascade"):
        check_regions_are_used(small_cfg(kind, balanced=False))
