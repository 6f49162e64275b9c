"""Averaged weights: their value, a kill, what is evaluated and saved."""

import pytest
import torch

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.hooks.ema import WeightAverage, check_ema
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.setup.rules import RULES
from d2_balance.utils.rules import check_values

from .conftest import run_cfg
from .test_trainer import Kill, Killed

EMA = ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.5", "SOLVER.CHECKPOINT_PERIOD", "2"]
NAME = "head.cls_score.weight"


def train(cfg, resume=False, kill_at=None, watch=None):
    seed_everything(99 if resume else 7)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.seen = []
    trainer.test = lambda cfg, model: trainer.seen.append(dict(state(model))) or {}
    if watch is not None:
        trainer.register_hooks([watch(trainer)])
    if kill_at is not None:
        trainer.register_hooks([Kill(kill_at)])
        with pytest.raises(Killed):
            trainer.train()
        return trainer
    trainer.train()
    return trainer


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def average_of(trainer):
    return next(hook for hook in trainer._hooks if isinstance(hook, WeightAverage))


def test_the_average_is_evaluated_and_saved_in_place_of_the_weights(dataset, tmp_path):
    weights = []

    class Watch(Kill):
        def __init__(self, trainer):
            super().__init__(-1)
            weights.append(state(trainer.model)[NAME].double())

        def after_step(self):
            weights.append(state(self.trainer.model)[NAME].double())

    trainer = train(run_cfg(tmp_path, *EMA), watch=Watch)
    expected = weights[0]
    for step, value in enumerate(weights[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    (seen,) = trainer.seen
    torch.testing.assert_close(seen[NAME].double(), expected, rtol=1e-5, atol=1e-6)
    file = torch.load(tmp_path / "model_final_ema.pth", weights_only=True)
    assert all(torch.equal(file["model"][name], value) for name, value in seen.items())
    # the run itself ends with its own weights
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert torch.equal(final[NAME].double(), weights[-1])
    assert not torch.equal(final[NAME], seen[NAME])
    assert torch.equal(trainer.model.state_dict()[NAME], final[NAME])


def test_batch_norms_of_the_average_have_its_statistics(dataset, tmp_path):
    trainer = train(run_cfg(tmp_path, *EMA))
    name = next(n for n in trainer.seen[0] if n.endswith("running_mean"))
    assert not torch.equal(trainer.seen[0][name], trainer.model.state_dict()[name])
    # state of losses is not averaged: it is no part of a detector
    name = "normalizer.loss_normalizer"
    assert torch.equal(trainer.seen[0][name], trainer.model.state_dict()[name])


def test_the_average_survives_a_kill(dataset, tmp_path):
    whole = train(run_cfg(tmp_path / "whole", *EMA))
    cfg = run_cfg(tmp_path / "parts", *EMA)
    train(cfg, kill_at=5)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 4
    expected, found = whole.seen[0], resumed.seen[0]
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert average_of(whole)._steps == average_of(resumed)._steps == 6


def test_a_skipped_step_does_not_count(dataset, tmp_path):
    class Skipped(Kill):
        def __init__(self, trainer):
            super().__init__(-1)

        def before_step(self):
            kind = type(self.trainer._trainer)
            skips = type("Skips", (kind,), {"took_step": self.trainer.iter != 3})
            self.trainer._trainer.__class__ = (
                skips
                if kind.__name__ != "Skips"
                else type("Skips", (kind.__mro__[1],), {"took_step": self.trainer.iter != 3})
            )

    trainer = train(run_cfg(tmp_path, *EMA), watch=Skipped)
    assert average_of(trainer)._steps == 5


def test_a_run_resumes_with_the_average_switched_on_since(dataset, tmp_path):
    train(run_cfg(tmp_path, *EMA, "SOLVER.EMA.ENABLED", "False"), kill_at=5)
    resumed = train(run_cfg(tmp_path, *EMA), resume=True)
    assert average_of(resumed)._steps == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_share_outside_of_its_range_is_refused(tmp_path, decay):
    cfg = run_cfg(tmp_path)
    cfg.SOLVER.EMA.DECAY = decay
    with pytest.raises(ValueError, match="SOLVER.EMA.DECAY"):
        check_values(cfg, RULES)


def test_precise_batch_norms_and_averages_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="PRECISE_BN"):
        check_ema(run_cfg(tmp_path, *EMA, "TEST.PRECISE_BN.ENABLED", "True"))
