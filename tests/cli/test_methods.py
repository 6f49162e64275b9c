"""The list of methods, the page made from it, and every pair that is refused."""

import itertools
from pathlib import Path

import pytest

from d2_balance import methods
from d2_balance.cli import main as cli
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.compatibility import HEADS, Parts, check_parts
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS
from d2_balance.utils.blocks import with_blocks

ROOT = Path(__file__).parents[2]
CLS = sorted(CLS_LOSSES)
SMOOTH = BOX_LOSSES.get("SmoothL1")


def refused(*names, **parts):
    """Whether the parts are refused, with a message that names both sides and what works."""
    try:
        check_parts(Parts(**parts))
    except ValueError as error:
        message = str(error)
        assert all(name in message for name in names), message
        assert "that work" in message or "set " in message, message
        assert message.startswith("MODEL.BALANCE."), message
        return True
    return False


def plain_outputs(cls):
    """As many outputs as the loss's activation needs and no more, asked of the loss itself."""
    if cls.activation == "gumbel":
        return False
    return cls.num_outputs(cls, 5) == (6 if cls.activation == "softmax" else 5)


@pytest.mark.parametrize(("name", "cls"), CLS, ids=[name for name, _ in CLS])
def test_heads_refuse_losses_whose_outputs_they_do_not_have(name, cls):
    for head in HEADS.values():
        parts = {"head": head, "cls_loss": cls, "box_loss": SMOOTH}
        counted = {"class_frequency", "class_count", "instance_count"} & set(
            cls.__init__.__kwdefaults__ or {}
        ) or {"class_frequency", "class_count", "instance_count"} & set(
            cls.__init__.__code__.co_varnames
        )
        fits = cls.activation == "sigmoid" and plain_outputs(cls)
        expected = head.name != "RoI heads" and not fits
        expected |= head.name == "the RPN" and bool(counted)
        assert refused(name, head.name, **parts) == expected


@pytest.mark.parametrize(("name", "cls"), CLS, ids=[name for name, _ in CLS])
def test_parts_that_work_on_rows_refuse_losses_without_rows(name, cls):
    roi = {"head": HEADS["RoI heads"], "cls_loss": cls}
    for other, part in PROPOSAL_SAMPLERS:
        expected = part.needs_predictions and not cls.elementwise
        assert refused(name, other, **roi, box_loss=SMOOTH, proposal_sampler=part) == expected
    for other, part in REWEIGHTERS:
        expected = not cls.elementwise or (part.needs_scores and not plain_outputs(cls))
        assert refused(name, other, **roi, box_loss=SMOOTH, reweighters=[part]) == expected
    fits = cls.activation == "sigmoid" and plain_outputs(cls)
    for other, part in ANCHOR_SAMPLERS if fits else ():
        retinanet = {"head": HEADS["RetinaNet"], "cls_loss": cls, "box_loss": SMOOTH}
        mined = not refused(name, other, **retinanet, anchor_sampler=part)
        weighing = ("Focal", "EFL", "QFL", "VFL", "SeesawFocal")
        assert mined == (cls.elementwise and name not in weighing)
    assert refused(name, "GUIDED_SCALE", **roi, box_loss=SMOOTH, guided=True) != cls.elementwise
    plain = cls.activation == "softmax" and name != "BAGS" and plain_outputs(cls)
    for method, works in {
        "norcal": cls.activation != "gumbel",
        "logit_adjustment": name != "BAGS" and cls.activation != "gumbel",
        "fracal": name != "BAGS" and cls.activation != "gumbel",
        "logn": plain,
    }.items():
        calibrated = refused(name, method, **roi, box_loss=SMOOTH, calibration=method)
        assert calibrated != works


def test_box_losses_over_a_set_are_refused_where_a_loss_per_box_is_needed():
    for (name, box), (other, part) in itertools.product(
        BOX_LOSSES, [*REWEIGHTERS, *PROPOSAL_SAMPLERS]
    ):
        parts = {"head": HEADS["RoI heads"], "cls_loss": CLS_LOSSES.get("SoftmaxCE")}
        key = {"reweighters": [part]}
        if other in PROPOSAL_SAMPLERS:
            key = {"proposal_sampler": part}
        reads = other in REWEIGHTERS or part.needs_predictions
        expected = reads and not box.elementwise
        assert refused(name, other, **parts, box_loss=box, **key) == expected
    for (name, cls), (other, box) in itertools.product(CLS_LOSSES, BOX_LOSSES):
        parts = {"head": HEADS["RoI heads"], "cls_loss": cls, "box_loss": box}
        assert refused(name, other, **parts) == (cls.couples_boxes and not box.elementwise)


def test_proposal_samplers_need_proposals():
    for name, part in PROPOSAL_SAMPLERS:
        parts = {"cls_loss": CLS_LOSSES.get("Focal"), "box_loss": SMOOTH, "proposal_sampler": part}
        for head in HEADS.values():
            assert refused(name, head.name, head=head, **parts) == (head.name != "RoI heads")
        all_of_them = {"head": HEADS["RoI heads"], "sampling_free": True}
        assert refused(name, "SAMPLING_FREE", **all_of_them, **parts)


def test_anchor_samplers_need_anchors_and_a_choice():
    for name, part in ANCHOR_SAMPLERS:
        parts = {"cls_loss": CLS_LOSSES.get("SigmoidCE"), "box_loss": SMOOTH}
        parts |= {"anchor_sampler": part}
        for head in HEADS.values():
            assert refused(name, head.name, head=head, **parts) == (head.name == "RoI heads")
        all_of_them = {"head": HEADS["the RPN"], "sampling_free": True}
        assert refused(name, "SAMPLING_FREE", **all_of_them, **parts)


def test_levels_are_refused_where_there_are_none():
    class PerLevel(CLS_LOSSES.get("GHMC")):
        per_level = True

    for head in HEADS.values():
        parts = {"head": head, "cls_loss": PerLevel, "box_loss": SMOOTH}
        assert refused("PER_LEVEL", **parts) == (not head.levels)


def test_every_registered_name_is_listed_once():
    listed = [name for m in methods.METHODS for name in m.names]
    assert len(listed) == len(set(listed))
    registered = {
        name
        for part in (CLS_LOSSES, BOX_LOSSES, REWEIGHTERS, PROPOSAL_SAMPLERS, ANCHOR_SAMPLERS)
        for name, _ in part
    }
    assert registered <= set(listed)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.names[0])
def test_files_and_configs_exist_and_the_config_uses_the_method(method):
    assert (ROOT / method.config).is_file()
    file = methods.source_file(method)
    assert not file or (ROOT / file).is_file()
    from d2_balance.engine import read_config

    cfg = read_config(str(ROOT / method.config))
    balance = cfg.MODEL.BALANCE
    used = {balance.CLS_LOSS, balance.BOX_LOSS, *balance.REWEIGHTERS, balance.PROPOSAL_SAMPLER}
    used |= {balance.ANCHOR_SAMPLER}
    used |= {name for name in ("GUIDED_SCALE",) if balance[name]}
    used |= {"NORCAL.GAMMA"} if balance.NORCAL.GAMMA else set()
    used |= {f"CALIBRATION.NAME {balance.CALIBRATION.NAME}", f"CLASSIFIER {balance.CLASSIFIER}"}
    used |= {"DISALIGN"} if balance.DISALIGN else set()
    used |= {"TEST_NMS"} if balance.TEST_NMS.METHOD != "hard" else set()
    used |= {f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN}"}
    used |= {f"DATALOADER.REPEAT_FORM {cfg.DATALOADER.REPEAT_FORM}"}
    used |= {"DATALOADER.COPY_PASTE"} if cfg.DATALOADER.COPY_PASTE.ENABLED else set()
    used |= {"SmoothL1"} if balance.BETA_DECAY.ENABLED else set()
    if not used & set(method.names):  # what an empty name stands for
        assert set(method.names) & {"Focal", "SmoothL1"}


def test_page_of_methods_holds_the_tables():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    tables = methods.blocks("../")
    assert with_blocks(text, tables) == text, "run `d2-balance methods --write docs/methods.md`"


def test_command_prints_both_tables(capsys):
    assert cli.main(["methods"]) == 0
    assert cli.main(["methods", "--pairs"]) == 0
    printed = capsys.readouterr().out
    assert "GHMC, GHMR" in printed and "| CLS_LOSS" in printed
    row = [line for line in printed.splitlines() if line.startswith("| Seesaw ")][-1]
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["", "", "", "x"]


def test_write_needs_the_markers(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text("nothing", encoding="utf-8")
    assert cli.main(["methods", "--write", str(path)]) == 2
    assert "<!-- methods -->" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "nothing"
