"""metrics.csv, Weights & Biases and AP of classes: complete, once, and across a kill."""

import csv
import glob
import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.hooks.writers import check_logs
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.setup.rules import RULES
from d2_balance.utils.rules import check_values

from .conftest import run_cfg
from .test_trainer import Kill, Killed

# 43 iterations: written at 20, 40 and the end
RUN = ["SOLVER.MAX_ITER", "43", "SOLVER.CHECKPOINT_PERIOD", "15", "LOG.CSV", "True"]


CLOCK = ("time", "seconds")


def train(cfg, resume=False, kill_at=None, test=lambda cfg, model: {"bbox": {"AP": 1.5}}):
    seed_everything(99 if resume else 7)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.test = test
    if kill_at is None:
        trainer.train()
    else:
        trainer.register_hooks([Kill(kill_at)])
        with pytest.raises(Killed):
            trainer.train()
    return trainer


def rows(directory):
    with open(directory / "metrics.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == ["iteration", "name", "value"]
    values = [(int(i), name, float(value)) for i, name, value in found[1:]]
    return [row for row in values if not row[1].endswith(CLOCK)]


def test_the_csv_holds_what_metrics_json_holds_and_survives_a_kill(dataset, tmp_path):
    train(run_cfg(tmp_path / "whole", *RUN))
    cfg = run_cfg(tmp_path / "parts", *RUN)
    train(cfg, kill_at=42)
    train(cfg, resume=True)
    expected = rows(tmp_path / "whole")
    assert rows(tmp_path / "parts") == expected
    from_json = []
    for line in (tmp_path / "whole" / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        iteration = record.pop("iteration")
        from_json += [(iteration, n, v) for n, v in record.items() if not n.endswith(CLOCK)]
    assert sorted(expected) == sorted(from_json)
    assert (43, "bbox/AP", 1.5) in expected


def test_a_run_killed_before_its_first_checkpoint_logs_each_iteration_once(dataset, tmp_path):
    settings = ["SOLVER.MAX_ITER", "43", "SOLVER.CHECKPOINT_PERIOD", "40", "LOG.CSV", "True"]
    train(run_cfg(tmp_path / "whole", *settings))
    cfg = run_cfg(tmp_path / "parts", *settings)
    train(cfg, kill_at=30)
    assert (tmp_path / "parts" / "metrics.json").stat().st_size > 0
    train(cfg, resume=True)

    def logged(directory):
        records = map(json.loads, (directory / "metrics.json").read_text().splitlines())
        return [record["iteration"] for record in records], [row[:2] for row in rows(directory)]

    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


class FakeRun:
    def __init__(self, calls, **arguments):
        self.id, self.calls = arguments.get("id", "abc"), calls
        calls.append(("init", arguments))

    def define_metric(self, name, step_metric=None):
        self.calls.append(("define", name))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch):
    calls = []
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: FakeRun(calls, **arguments)
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


WANDB = ["LOG.WANDB_PROJECT", "tails", "LOG.WANDB_MODE", "offline"]


def test_scalars_and_config_go_to_weights_and_biases(dataset, tmp_path, wandb):
    cfg = run_cfg(tmp_path, *WANDB)
    check_logs(cfg)
    train(cfg)
    (_, arguments), *others = wandb
    assert (arguments["project"], arguments["mode"]) == ("tails", "offline")
    assert arguments["config"]["SOLVER"]["MAX_ITER"] == 6
    logged = [values for kind, values in others if kind == "log"]
    assert [values["iteration"] for values in logged] == [5, 6]
    assert "total_loss" in logged[0] and logged[1]["bbox/AP"] == 1.5
    assert others[-1] == ("finish", None)


def test_a_resumed_run_is_the_same_run_there(dataset, tmp_path, wandb):
    cfg = run_cfg(tmp_path, *WANDB, "SOLVER.CHECKPOINT_PERIOD", "2")
    train(cfg, kill_at=3)
    train(cfg, resume=True)
    first, second = (arguments for kind, arguments in wandb if kind == "init")
    assert "id" not in first and second["id"] == "abc"


def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_logs(run_cfg(tmp_path, *WANDB))


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of 'online', 'offline'"):
        check_values(run_cfg(tmp_path, *WANDB, "LOG.WANDB_MODE", "sometimes"), RULES)


def tags(directory):
    (path,) = glob.glob(str(directory / "events.out.tfevents.*"))
    found = EventAccumulator(path, size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [e.value for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_ap_of_every_class_and_group_goes_to_tensorboard(dataset, tmp_path):
    """With the real evaluation, at iterations 3 and 6."""
    cfg = run_cfg(tmp_path, "TEST.EVAL_PERIOD", "3")
    trainer = BalancedTrainer(cfg)
    trainer.train()
    found = tags(tmp_path)
    (table,) = glob.glob(str(tmp_path / "inference" / "per_class_ap_*.json"))
    with open(table) as file:
        records = json.load(file)
    measured = {name: r["AP"] for name, r in records.items() if r["AP"] is not None}
    assert len(measured) == 4  # classes 4 and 5 have no objects
    for name, value in measured.items():
        assert len(found[f"class_AP/{name}"]) == 2
        assert found[f"class_AP/{name}"][-1] == pytest.approx(value)
    assert "bbox/APr" in found
    assert not any("class_AP" in line for line in (tmp_path / "metrics.json").open())


def test_ap_of_classes_can_be_left_out(dataset, tmp_path):
    BalancedTrainer(run_cfg(tmp_path, "TEST.CLASS_AP", "False")).train()
    assert not any("class_AP" in tag for tag in tags(tmp_path))
