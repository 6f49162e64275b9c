"""What to set: keys and values that fit the data, each with its reason, as YAML."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from d2_balance.utils.config_tree import nested

from .remedies import PLAIN_LOSSES, RULES, Setting, config_value

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from .report import Analysis


def settings(found: Analysis, given: Sequence[str] = ()) -> list[Setting]:
    """Return what fits the data, in the order of a config; keys that already fit are left out.

    Args:
        found: the analysis.
        given: keys and values in turn that changed the configuration file before the analysis.
    """
    cfg = found.cfg
    made = (rule.suggest(found) for rule in RULES)
    lines = [*_classes(found), *(line for s in made if s is not None for line in s.settings)]
    if cfg is None:
        return lines
    lines = [line for line in lines if config_value(cfg, line.key) != line.value]
    new = {line.key for line in lines}
    kept = [key for key in given[::2] if key not in new]
    return [*(Setting(key, config_value(cfg, key), "As given with --set.") for key in kept), *lines]


def advice(found: Analysis) -> list[str]:
    """Return what the settings do not say: why some are not among them."""
    lines = []
    counts = found.statistics
    if found.tail is None:
        rarest = min(n for n in counts.image_count.tolist() if n)
        lines.append(
            "No loss or sampler against rare classes is suggested: even the rarest class with "
            f"objects, in {rarest:,} of {counts.num_images:,} images, has more than 10 % of the "
            "images of all classes together. There is no tail to protect."
        )
    elif found.cfg is not None and found.cfg.MODEL.BALANCE.CLS_LOSS not in (
        *PLAIN_LOSSES,
        "EQL",
        "EFL",
    ):
        lines.append(
            f"MODEL.BALANCE.CLS_LOSS stays {found.cfg.MODEL.BALANCE.CLS_LOSS}, which you chose."
        )
    if found.cfg is None:
        lines.append(
            "Without --config-file these lines are for Faster and Mask R-CNN; with it, they are "
            "for your model and include its anchors."
        )
    else:
        lines += _other_data(found, found.cfg)
    return lines


def to_yaml(lines: list[Setting], base: str = "") -> str:
    """Return the settings as text of a YAML file, with a comment above each.

    Args:
        lines: the settings.
        base: config file that they build on, for `_BASE_`; "" leaves it out.
    """
    text = [f"_BASE_: {_scalar(base)}"] if base else []
    return "\n".join([*text, *_render(nested({line.key: line for line in lines}), 0)]) + "\n"


def _render(tree: dict[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, node in tree.items():
        if isinstance(node, dict):
            yield f"{indent}{key}:"
            yield from _render(node, depth + 1)
            continue
        yield from (f"{indent}# {part}" for part in _wrapped(node.reason, 94 - len(indent)))
        if isinstance(node.value, list) and node.value and isinstance(node.value[0], list):
            yield f"{indent}{key}:"
            yield from (f"{indent}  - {_scalar(level)}" for level in node.value)
        else:
            yield f"{indent}{key}: {_scalar(node.value)}"


def _wrapped(text: str, width: int) -> list[str]:
    # a percent sign stays with its number
    lines = textwrap.wrap(text.replace(" %", "\xa0%"), width, break_long_words=False)
    return [line.replace("\xa0", " ") for line in lines]


def _scalar(value: Any) -> str:
    # yaml ends a bare scalar with a line of three dots
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _classes(found: Analysis) -> Iterator[Setting]:
    count, key = found.statistics.num_classes, "MODEL.ROI_HEADS.NUM_CLASSES"
    if found.cfg is not None:
        from d2_balance.data.checks.classes import num_classes_key

        key = num_classes_key(found.cfg)
    yield Setting(key, count, f"The data have {count:,} classes.")
    masks_wanted = found.cfg is not None and found.cfg.MODEL.MASK_ON
    if masks_wanted and found.table is not None and not found.table.masks:
        yield Setting("MODEL.MASK_ON", False, "No object has a mask.")


def _other_data(found: Analysis, cfg: CfgNode) -> Iterator[str]:
    from d2_balance.data.checks.classes import configured_num_classes

    names = tuple(cfg.DATASETS.TRAIN)
    count = found.statistics.num_classes
    if count != configured_num_classes(cfg):
        yield (
            f"The model has {configured_num_classes(cfg)} classes and the data {count}: "
            "DATASETS.TRAIN and DATASETS.TEST must name sets with these classes too; they are "
            f"{', '.join(names) or 'empty'} now."
        )
