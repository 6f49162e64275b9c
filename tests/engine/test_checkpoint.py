"""Broken checkpoints are skipped, those of another model and those with code refused."""

import os
import re

import pytest
import torch

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.resume.checkpoint import BalancedCheckpointer, resumable_files
from d2_balance.engine.setup.run import prepare_run

from .conftest import run_cfg
from .test_trainer import trained

pytestmark = pytest.mark.faults
STATE = ["MODEL.BALANCE.CLS_LOSS", "GHMC", "SOLVER.CHECKPOINT_PERIOD", "2"]


def different(one, other):
    one, other = (getattr(t.model, "module", t.model).state_dict() for t in (one, other))
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("damage", ["cut in half", "empty", "no file"])
def test_a_broken_last_checkpoint_falls_back_to_the_one_before(dataset, tmp_path, log, damage):
    whole = trained(run_cfg(tmp_path / "whole", *STATE))
    cfg = run_cfg(tmp_path / "parts", *STATE)
    trained(cfg, kill_at=5)
    last = tmp_path / "parts" / "model_0000003.pth"
    if damage == "no file":
        last.unlink()
    else:
        content = last.read_bytes()
        last.write_bytes(content[: len(content) // 2] if damage == "cut in half" else b"")
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 2
    assert different(whole, resumed) == []
    message = next(text for text in log if "Broken checkpoints are skipped" in text)
    assert str(last) in message and "continues from" in message and "model_0000001.pth" in message


def test_where_every_checkpoint_is_broken_all_are_named(dataset, tmp_path):
    cfg = run_cfg(tmp_path, *STATE)
    trained(cfg, kill_at=5)
    for name in ("model_0000001.pth", "model_0000003.pth"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no checkpoint in .*0003.pth.*0001.pth.*Put a whole one"):
        BalancedTrainer(cfg).resume_or_load()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    content = {"model": Payload(str(tmp_path / "made"))}
    torch.save(content, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ValueError, match="could run code and is not loaded"):
        BalancedCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume_or_load("")
    with pytest.raises(ValueError, match="cannot be loaded.*could run code"):
        weights = str(tmp_path / "model_0000001.pth")
        BalancedCheckpointer(torch.nn.Linear(1, 1)).resume_or_load(weights, resume=False)
    assert not (tmp_path / "made").exists()


def test_checkpoints_hold_tensors_and_plain_values_only(dataset, tmp_path):
    trained(run_cfg(tmp_path, *STATE))
    for path in resumable_files(str(tmp_path)):
        assert torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (["MODEL.BALANCE.CLS_LOSS", "Focal"], "CLS_LOSS was 'GHMC' and is 'Focal'"),
        (["MODEL.RETINANET.NUM_CLASSES", "7"], "RETINANET.NUM_CLASSES was 6 and is 7"),
        (["MODEL.META_ARCHITECTURE", "BalancedFCOS"], "META_ARCHITECTURE was 'BalancedRetinaNet'"),
        (["MODEL.RESNETS.DEPTH", "101"], "RESNETS.DEPTH was 50 and is 101"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(dataset, tmp_path, changed, key):
    trained(run_cfg(tmp_path, *STATE), kill_at=3)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    checkpointer = BalancedCheckpointer(
        torch.nn.Linear(1, 1), str(tmp_path), cfg=run_cfg(tmp_path, *STATE, *changed)
    )
    with pytest.raises(ValueError, match="is of another one") as error:
        checkpointer.resume_or_load("")
    assert key in str(error.value) and "start a run in another OUTPUT_DIR" in str(error.value)
    # train_net.py says so before it builds the model
    (tmp_path / "config.yaml").write_text(run_cfg(tmp_path, *STATE).dump())
    with pytest.raises(ValueError, match=re.escape(key)):
        prepare_run(run_cfg(tmp_path, *STATE, *changed), resume=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


def test_parameters_of_another_size_are_named(dataset, tmp_path):
    trained(run_cfg(tmp_path, *STATE), kill_at=3)
    wide = BalancedTrainer(run_cfg(tmp_path, *STATE, "MODEL.FPN.OUT_CHANNELS", "32"))
    with pytest.raises(ValueError, match=r"fpn_lateral3.weight is \(16, .*the model's is \(32, "):
        wide.resume_or_load()


def test_other_settings_are_named_and_the_run_continues(dataset, tmp_path, log):
    trained(run_cfg(tmp_path, *STATE), kill_at=3)
    resumed = trained(run_cfg(tmp_path, *STATE, "SOLVER.BASE_LR", "0.002"), resume=True)
    assert resumed.start_iter == 2
    assert any("SOLVER.BASE_LR was 0.01 and is 0.002" in text for text in log)
