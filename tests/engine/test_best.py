"""The best model and the early end: by any metric, across a kill, on all ranks together."""

import json
import os

import pytest
import torch
from detectron2.utils import comm

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.hooks.best import BestModel, check_best
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.setup.rules import RULES
from d2_balance.utils.rules import check_values

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg
from .test_trainer import Kill, Killed

BEST = ["TEST.BEST.METRIC", "bbox/APr", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2"]


def run(cfg, values, resume=False, kill_at=None):
    """Trains with an evaluation that measures values[iterations done] as APr."""
    seed_everything(99 if resume else 7)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.evaluated, trainer.weights = [], {}

    def test(cfg, model):
        done = trainer.iter if trainer.iter >= trainer.max_iter else trainer.iter + 1
        trainer.evaluated.append(done)
        model = getattr(model, "module", model)
        trainer.weights[done] = model.head.cls_score.weight.detach().clone()
        return {"bbox": {"APr": values[done]}} if comm.is_main_process() else {}

    trainer.test = test
    if kill_at is None:
        trainer.result = trainer.train()
    else:
        trainer.register_hooks([Kill(kill_at)])
        with pytest.raises(Killed):
            trainer.train()
    return trainer


def best_of(trainer):
    return next(hook for hook in trainer._hooks if isinstance(hook, BestModel))


def saved(directory, name="model_best.pth"):
    return torch.load(os.path.join(directory, name), weights_only=True)


def test_the_best_by_rare_ap_is_kept_when_it_falls_again(dataset, tmp_path):
    values = [None, 1.0, 4.0, 2.0, float("nan"), 3.0, 3.5]
    trainer = run(run_cfg(tmp_path, *BEST), values)
    found = saved(tmp_path)
    assert (found["metric"], found["value"], found["iteration"]) == ("bbox/APr", 4.0, 1)
    assert torch.equal(found["model"]["head.cls_score.weight"], trainer.weights[2])
    assert "trainer" not in found  # the weights alone: for MODEL.WEIGHTS


def test_the_best_value_survives_a_kill(dataset, tmp_path):
    values = [None, 1.0, 4.0, 2.0, 1.0, 3.0, 3.5]
    cfg = run_cfg(tmp_path, *BEST)
    first = run(cfg, values, kill_at=4)
    assert first.evaluated == [1, 2, 3, 4]
    before = saved(tmp_path)
    resumed = run(cfg, values, resume=True)
    # the checkpoint of iteration 3 was saved again after its evaluation
    assert resumed.evaluated == [5, 6]
    after = saved(tmp_path)
    assert (after["value"], after["iteration"]) == (4.0, 1)
    assert torch.equal(
        before["model"]["head.cls_score.weight"], after["model"]["head.cls_score.weight"]
    )


def test_a_run_ends_after_as_many_evaluations_without_improvement(dataset, tmp_path):
    values = [None, 1.0, 4.0, 2.0, 3.9, 9.0, 9.0]
    cfg = run_cfg(tmp_path, *BEST, "TEST.BEST.PATIENCE", "2")
    trainer = run(cfg, values)
    assert trainer.evaluated == [1, 2, 3, 4]  # the end is not evaluated twice
    assert trainer.result == {"bbox": {"APr": 3.9}}
    assert saved(tmp_path)["value"] == 4.0
    assert saved(tmp_path, "model_final.pth")["iteration"] == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["bbox/APr"] == 3.9
    # and stays ended
    again = run(cfg, values, resume=True)
    assert again.evaluated == [4]
    model = again.model.state_dict()
    assert torch.equal(model["head.cls_score.weight"], trainer.weights[4])
    # until there is more patience
    more = run(run_cfg(tmp_path, *BEST, "TEST.BEST.PATIENCE", "3"), values, resume=True)
    assert more.evaluated == [5, 6]


def test_a_run_killed_between_evaluation_and_its_note_ends_all_the_same(dataset, tmp_path):
    values = [None, 1.0, 4.0, 2.0, 3.9, 9.0, 9.0]
    cfg = run_cfg(tmp_path, *BEST, "TEST.BEST.PATIENCE", "2")
    seed_everything(7)
    trainer = BalancedTrainer(cfg)
    trainer.test = lambda cfg, model: {"bbox": {"APr": values[trainer.iter + 1]}}
    look = BestModel._look

    def killed(self, iteration):
        if iteration == 3:  # the checkpoint of this iteration is on the disk
            raise Killed
        look(self, iteration)

    best_of(trainer)._look = killed.__get__(best_of(trainer))
    with pytest.raises(Killed):
        trainer.train()
    resumed = run(cfg, values, resume=True)
    assert resumed.evaluated == [4]
    assert saved(tmp_path, "model_final.pth")["iteration"] == 3


def test_small_gains_do_not_reset_the_patience_but_are_saved(dataset, tmp_path):
    values = [None, 1.0, 1.25, 1.5, 9.0, 9.0, 9.0]
    overrides = ["TEST.BEST.PATIENCE", "2", "TEST.BEST.MIN_DELTA", "0.5"]
    trainer = run(run_cfg(tmp_path, *BEST, *overrides), values)
    assert trainer.evaluated == [1, 2, 3]  # 1.5 is not more than 0.5 above 1
    assert saved(tmp_path)["value"] == 1.5


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        cfg = run_cfg(
            f"{directory}/out", *BEST, "TEST.BEST.PATIENCE", "2", "SOLVER.EMA.ENABLED", "True"
        )
        trainer = run(cfg, [None, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0])
        best = best_of(trainer)
        state = {"evaluated": trainer.evaluated, "value": best.value, "result": trainer.result}
        torch.save(state, os.path.join(directory, f"rank{rank}.pth"))


def test_two_ranks_end_together(dataset_files, tmp_path):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert first["evaluated"] == second["evaluated"] == [1, 2, 3]
    assert first["value"] == second["value"] == 4.0
    assert first["result"] == {"bbox": {"APr": 2.0}} and second["result"] == {}
    hooks = saved(tmp_path / "out", "model_final.pth")["trainer"]["hooks"]
    assert len(hooks["RunState"]["ranks"]) == len(hooks["WeightAverage"]["ranks"]) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TEST.BEST.METRIC", "bbox/APx"], "bbox/APs|bbox/AP"),
        (["TEST.BEST.METRIC", "segm/AP"], "segm/AP"),
        (["TEST.BEST.METRIC", "bbox/AP", "TEST.BEST.MODE", "up"], "MODE is 'up'"),
        (["TEST.BEST.METRIC", "bbox/AP", "TEST.BEST.PATIENCE", "3"], "EVAL_PERIOD is 0"),
        (["TEST.BEST.PATIENCE", "3"], "METRIC is empty"),
        (["TEST.BEST.METRIC", "bbox/AP", "TEST.BEST.MIN_DELTA", "-1."], "MIN_DELTA is -1"),
        (["TEST.BEST.METRIC", "val_loss/loss_cls"], "MODE min"),
        (["TEST.BEST.METRIC", "val_loss/loss_cls", "TEST.BEST.MODE", "min"], "LOSS.PERIOD"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(dataset, tmp_path, overrides, message):
    cfg = run_cfg(tmp_path, *overrides)
    with pytest.raises(ValueError, match=message):
        check_values(cfg, RULES)
        check_best(cfg)


def test_a_metric_that_exists_is_accepted(dataset, tmp_path):
    check_best(run_cfg(tmp_path, *BEST))
    check_best(run_cfg(tmp_path, "TEST.BEST.METRIC", "segm/APr", kind="mask"))
