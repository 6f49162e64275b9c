"""The trainer: exact resumption, the state of the losses, hook order on two ranks."""

import json
import os

import pytest
import torch
from detectron2.engine import HookBase, hooks

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer, BetaDecay, LossStats, SeedSteps
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from d2_balance.modeling.compatibility import has_class_columns_only

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg

GHM = ["MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.BALANCE.BOX_LOSS", "SmoothL1"]
DECAY = ["MODEL.BALANCE.BETA_DECAY.ENABLED", "True", "MODEL.BALANCE.BETA_DECAY.PERIOD", "2"]


class Killed(RuntimeError):  # noqa: N818  not an error
    pass


class Kill(HookBase):
    """Ends the run before a step, as if the machine went away."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Killed


def trained(cfg, resume=False, kill_at=None):
    # Detectron2's default_setup seeds a new run; a resumed one may find any state.
    seed_everything(99 if resume else 7)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.test = lambda cfg, model: {}  # evaluation is not the matter here
    if kill_at is None:
        trainer.train()
    else:
        trainer.register_hooks([Kill(kill_at)])
        with pytest.raises(Killed):
            trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("retinanet", [*GHM, *DECAY]),
        ("retinanet", [*GHM, *DECAY, "DATALOADER.NUM_WORKERS", "2"]),
        # Detectron2 draws anchors and proposals at random in every step
        ("mask", ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE"]),
    ],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(dataset, tmp_path, kind, overrides):
    overrides = [*overrides, "SOLVER.CHECKPOINT_PERIOD", "2"]
    whole = trained(run_cfg(tmp_path / "whole", *overrides, kind=kind))
    cfg = run_cfg(tmp_path / "parts", *overrides, kind=kind)
    trained(cfg, kill_at=5)
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 4  # the last checkpoint is that of iteration 3

    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []
    if kind == "retinanet":
        assert found["cls_loss.density.acc"].sum() > 0
        assert found["normalizer.loss_normalizer"] != 100
        # beta .11, down .01 every 2 iterations; the last iteration is 5: floor(5 / 2) = 2
        assert found["box_loss.beta"].item() == pytest.approx(0.09)


def stateful():
    """Every loss that learns from batches, in a model that takes it, and other state of a run."""
    for registry, key in ((CLS_LOSSES, "CLS_LOSS"), (BOX_LOSSES, "BOX_LOSS")):
        base = ClassificationLoss if registry is CLS_LOSSES else BoxLoss
        for name, cls in registry:
            if cls.batch_statistics is base.batch_statistics:
                continue
            dense = registry is BOX_LOSSES or has_class_columns_only(cls)
            yield pytest.param(
                "retinanet" if dense else "faster", [f"MODEL.BALANCE.{key}", name], id=name
            )
    ghm = ["MODEL.BALANCE.CLS_LOSS", "GHMC"]
    yield pytest.param("fcos", ghm, id="FCOS")
    rpn = [
        "MODEL.PROPOSAL_GENERATOR.NAME",
        "BalancedRPN",
        "MODEL.BALANCE.RPN.SAMPLING_FREE",
        "True",
    ]
    yield pytest.param("faster", [*rpn, "MODEL.BALANCE.RPN.CLS_LOSS", "GHMC"], id="RPN")
    memory = ["MODEL.BALANCE.CLS_LOSS", "LOCE", "MODEL.BALANCE.LOCE_MEMORY.ENABLED", "True"]
    yield pytest.param("cascade", memory, id="memory")
    selection = ["MODEL.BALANCE.REWEIGHTERS", "['ISR','CARL']"]
    selection += ["MODEL.BALANCE.PROPOSAL_SAMPLER", "ISRN"]
    yield pytest.param("faster", selection, id="ISRN")
    sampler = ["DATALOADER.SAMPLER_TRAIN", "ClassAwareTrainingSampler"]
    yield pytest.param("retinanet", sampler, id="class-aware")


@pytest.mark.parametrize(("kind", "overrides"), stateful())
def test_state_of_every_method_survives_a_kill(dataset, tmp_path, kind, overrides):
    overrides = [*overrides, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4"]
    whole = trained(run_cfg(tmp_path / "whole", *overrides, kind=kind))
    cfg = run_cfg(tmp_path / "parts", *overrides, kind=kind)
    trained(cfg, kill_at=3)
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 2
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_without_a_checkpoint_resuming_starts_afresh(dataset, tmp_path):
    trainer = BalancedTrainer(run_cfg(tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0


def test_weights_of_another_run_bring_no_loss_state(dataset, tmp_path):
    first = trained(run_cfg(tmp_path / "first", *GHM, *DECAY))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "first" / "model_final.pth")]
    second = BalancedTrainer(run_cfg(tmp_path / "second", *GHM, *weights))
    second.resume_or_load(resume=False)
    learned, taken = first.model.state_dict(), second.model.state_dict()
    assert torch.equal(learned["head.cls_score.weight"], taken["head.cls_score.weight"])
    assert learned["cls_loss.density.acc"].sum() > 0
    assert taken["cls_loss.density.acc"].sum() == 0
    assert taken["normalizer.loss_normalizer"] == 100
    assert taken["box_loss.beta"].item() == pytest.approx(0.11)
    # but its own checkpoint does
    again = BalancedTrainer(run_cfg(tmp_path / "first", *GHM))
    again.resume_or_load(resume=True)
    density = again.model.state_dict()["cls_loss.density.acc"]
    assert torch.equal(density, learned["cls_loss.density.acc"])


def test_the_end_is_evaluated_once_and_returned(dataset, tmp_path):
    trainer = BalancedTrainer(run_cfg(tmp_path))
    calls = []
    trainer.test = lambda cfg, model: calls.append(1) or {"bbox": {"AP": 12.5}}
    assert trainer.train() == {"bbox": {"AP": 12.5}}
    assert len(calls) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["bbox/AP"] == 12.5


def test_a_finished_run_is_evaluated_and_not_trained(dataset, tmp_path):
    before = trained(run_cfg(tmp_path)).model.state_dict()
    metrics = (tmp_path / "metrics.json").read_text()
    trainer = BalancedTrainer(run_cfg(tmp_path))
    trainer.resume_or_load(resume=True)
    trainer.test = lambda cfg, model: {"bbox": {"AP": 1.0}}
    assert trainer.train() == {"bbox": {"AP": 1.0}}
    after = trainer.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "metrics.json").read_text() == metrics


def test_our_hooks_stand_before_checkpoints_and_writers(dataset, tmp_path):
    kinds = [type(h) for h in BalancedTrainer(run_cfg(tmp_path, *GHM, *DECAY))._hooks]
    ours = [kinds.index(kind) for kind in (SeedSteps, BetaDecay, LossStats)]
    assert ours == sorted(ours)
    assert kinds.index(hooks.LRScheduler) < ours[0]
    assert ours[-1] < kinds.index(hooks.PeriodicCheckpointer)
    assert ours[-1] < kinds.index(hooks.PeriodicWriter)


def test_without_a_seed_steps_are_not_seeded(dataset, tmp_path):
    kinds = [type(h) for h in BalancedTrainer(run_cfg(tmp_path, "SEED", "-1"))._hooks]
    assert SeedSteps not in kinds


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        trainer = trained(run_cfg(f"{directory}/out", *GHM, *DECAY, "SOLVER.MAX_ITER", "3"))
        state = trainer.model.module.state_dict()
        torch.save(
            {
                "hooks": [type(h).__name__ for h in trainer._hooks],
                "losses": {k: v for k, v in state.items() if "loss" in k},
                "weights": state["head.cls_score.weight"],
            },
            os.path.join(directory, f"rank{rank}.pth"),
        )


def test_two_ranks_agree_on_hooks_and_state(dataset_files, tmp_path):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    # The main process has two hooks more; the others come in the same order.
    extra = [name for name in first["hooks"] if name not in second["hooks"]]
    assert extra == ["PeriodicCheckpointer", "PeriodicWriter"]
    assert [name for name in first["hooks"] if name not in extra] == second["hooks"]
    common = second["hooks"].index("LossStats") + 1
    assert first["hooks"][:common] == second["hooks"][:common]
    assert torch.equal(first["weights"], second["weights"])
    assert first["losses"].keys() == second["losses"].keys()
    for name, value in first["losses"].items():
        assert torch.equal(value, second["losses"][name]), name
    assert first["losses"]["cls_loss.density.acc"].sum() > 0
