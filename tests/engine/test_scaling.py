"""Schedules for another batch, and the word where a learning rate was forgotten."""

import pytest
import torch

from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.setup.scaling import batch_warning, check_reference_batch, scale_to_batch

from .conftest import run_cfg


def large_cfg(*overrides):
    values = [
        "SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.IMS_PER_BATCH", "4",
        "SOLVER.BASE_LR", "0.02",
        "SOLVER.MAX_ITER", "90000", "SOLVER.STEPS", "(60000, 80000)", "SOLVER.WARMUP_ITERS", "1000",
        "SOLVER.CHECKPOINT_PERIOD", "5000", "TEST.EVAL_PERIOD", "0", "TEST.LOSS.PERIOD", "1000",
        "MODEL.BALANCE.BETA_DECAY.PERIOD", "10000",
    ]  # fmt: skip
    return read_config("", [*values, *overrides])


def test_a_quarter_of_the_batch_has_a_quarter_of_the_rate_and_four_times_the_steps():
    cfg = large_cfg()
    assert "BASE_LR 0.005" in scale_to_batch(cfg)
    assert pytest.approx(0.005) == cfg.SOLVER.BASE_LR
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (360000, (240000, 320000))
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD) == (4000, 20000)
    assert (cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS.PERIOD) == (0, 4000)  # 0 stays off
    assert cfg.MODEL.BALANCE.BETA_DECAY.PERIOD == 40000
    # what is written to config.yaml is not scaled once more
    assert scale_to_batch(cfg) == "" and cfg.SOLVER.MAX_ITER == 360000


def test_a_large_batch_leaves_no_period_at_zero():
    cfg = large_cfg("SOLVER.IMS_PER_BATCH", "256", "TEST.EVAL_PERIOD", "2")
    scale_to_batch(cfg)
    assert cfg.TEST.EVAL_PERIOD == 1


def test_without_a_reference_nothing_changes():
    cfg = large_cfg("SOLVER.REFERENCE_IMS_PER_BATCH", "0")
    before = cfg.dump()
    assert scale_to_batch(cfg) == "" and cfg.dump() == before


def test_the_trainer_scales_a_config_from_python(dataset, tmp_path):
    cfg = run_cfg(tmp_path, "SOLVER.REFERENCE_IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "0")
    trainer = BalancedTrainer(cfg)
    assert trainer.max_iter == 12 and cfg.SOLVER.MAX_ITER == 6
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    "overrides", [["SOLVER.REFERENCE_IMS_PER_BATCH", "-1"], ["SOLVER.REFERENCE_WORLD_SIZE", "8"]]
)
def test_a_reference_that_cannot_be_is_refused(overrides):
    with pytest.raises(ValueError, match="SOLVER.REFERENCE_IMS_PER_BATCH"):
        check_reference_batch(large_cfg(*overrides))


BASE = "SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.02}\n"


@pytest.mark.parametrize(
    ("content", "overrides", "warns"),
    [
        ("_BASE_: base.yaml\n", [], False),
        ("_BASE_: base.yaml\nSOLVER: {IMS_PER_BATCH: 4}\n", [], True),
        ("_BASE_: base.yaml\nSOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.005}\n", [], False),
        ("_BASE_: base.yaml\n", ["SOLVER.IMS_PER_BATCH", "4"], True),
        ("_BASE_: base.yaml\n", ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.01"], False),
        # the file's rate is for its batch, and the command line brings back the other one
        ("_BASE_: base.yaml\nSOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.005}\n",
         ["SOLVER.IMS_PER_BATCH", "16"], True),
        ("_BASE_: base.yaml\n",
         ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_IMS_PER_BATCH", "16"], False),
        ("SOLVER: {IMS_PER_BATCH: 2}\n", [], True),  # Detectron2's own default is for 16
        # a rate without a batch is for the batch below it
        ("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.01}\n", [], False),
    ],
)  # fmt: skip
def test_a_batch_that_was_changed_alone_is_mentioned(tmp_path, content, overrides, warns):
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "own.yaml"
    path.write_text(content)
    cfg = read_config(str(path), overrides)
    message = batch_warning(cfg, str(path), overrides)
    assert bool(message) == warns
    if warns and "_BASE_" in content and "0.005" not in content:
        assert "0.02 was chosen for 16" in message and "to 0.005" in message
        assert str(tmp_path / "base.yaml") in message


def test_scaled_runs_see_the_learning_rate_of_the_config(dataset, tmp_path):
    trainer = BalancedTrainer(run_cfg(tmp_path, "SOLVER.REFERENCE_IMS_PER_BATCH", "1"))
    trainer.test = lambda cfg, model: {}
    trainer.train()
    assert trainer.iter == 3
    assert torch.isfinite(next(trainer.model.parameters())).all()
