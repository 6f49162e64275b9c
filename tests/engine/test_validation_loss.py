"""Losses on the test sets: a mean over images that leaves the run as it was."""

import json
import os
import random

import numpy as np
import pytest
import torch

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.hooks.validation_loss import ValidationLoss, check_validation_loss
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.setup.rules import RULES
from d2_balance.utils.rules import check_values

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg

LOSS = ["TEST.LOSS.PERIOD", "2"]
GHM = ["MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.BALANCE.BOX_LOSS", "GHMR"]
SHORT = [*GHM, *LOSS, "SOLVER.MAX_ITER", "1", "TEST.LOSS.IMAGES", "5"]  # 3 and 2 images
LOCE = ["MODEL.BALANCE.CLS_LOSS", "LOCE", "MODEL.BALANCE.LOCE_MEMORY.ENABLED", "True"]


def train(cfg):
    seed_everything(7)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.test = lambda cfg, model: {}
    trainer.train()
    return trainer


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "overrides"), [("retinanet", GHM), ("mask", ["MODEL.BALANCE.CLS_LOSS", "EQLv2"])]
)
def test_a_run_with_validation_losses_is_the_run_without(dataset, tmp_path, kind, overrides):
    plain = train(run_cfg(tmp_path / "plain", *overrides, kind=kind))
    watched = train(run_cfg(tmp_path / "watched", *overrides, *LOSS, kind=kind))
    expected, found = plain.model.state_dict(), watched.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    losses = [x["total_loss"] for x in metrics(tmp_path / "plain") if "total_loss" in x]
    assert [x["total_loss"] for x in metrics(tmp_path / "watched") if "total_loss" in x] == losses
    assert any("val_loss/loss_cls" in record for record in metrics(tmp_path / "watched"))


@pytest.mark.parametrize(
    ("kind", "overrides"), [("retinanet", GHM), ("faster", LOCE), ("cascade", LOCE)]
)
def test_neither_state_nor_generators_nor_modes_change(dataset, tmp_path, kind, overrides):
    trainer = train(run_cfg(tmp_path, *overrides, *LOSS, "SOLVER.MAX_ITER", "2", kind=kind))
    hook = next(h for h in trainer._hooks if isinstance(h, ValidationLoss))
    trainer.model.backbone.eval()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    modes = [module.training for module in trainer.model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = hook.measure()
    after = trainer.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [module.training for module in trainer.model.modules()] == modes
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert hook.measure() == first  # the same weights give the same losses
    assert first["total_loss"] == pytest.approx(sum(first.values()) - first["total_loss"])


def test_a_image_counts_as_a_batch_of_images_like_it(dataset, tmp_path):
    overrides = ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE", *LOSS]
    trainer = train(run_cfg(tmp_path, *overrides, "SOLVER.MAX_ITER", "2"))
    hook = next(h for h in trainer._hooks if isinstance(h, ValidationLoss))
    found = hook.measure()["loss_cls"]
    model, total = trainer.model, 0.0
    start = model.normalizer.loss_normalizer.clone()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        for index in range(12):
            record = hook._images[index]
            model.normalizer.loss_normalizer.copy_(start)
            total += model.forward([record, record])["loss_cls"].item()  # IMS_PER_BATCH is 2
    assert found == pytest.approx(total / 12, rel=1e-5)


def test_as_many_images_as_asked_for_are_measured(dataset, tmp_path):
    trainer = train(run_cfg(tmp_path, *LOSS, "TEST.LOSS.IMAGES", "5", "SOLVER.MAX_ITER", "1"))
    hook = next(h for h in trainer._hooks if isinstance(h, ValidationLoss))
    assert len(hook._images) == 5


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        trainer = train(run_cfg(f"{directory}/out", *SHORT))
        trainer.model.module.load_state_dict(torch.load(f"{directory}/start.pth"))
        hook = next(h for h in trainer._hooks if isinstance(h, ValidationLoss))
        torch.save(hook.measure(), os.path.join(directory, f"rank{rank}.pth"))


def test_two_ranks_measure_what_one_process_does(dataset, dataset_files, tmp_path):
    one = train(run_cfg(tmp_path / "one", *SHORT))
    torch.save(one.model.state_dict(), tmp_path / "start.pth")
    expected = next(h for h in one._hooks if isinstance(h, ValidationLoss)).measure()
    start_ranks(_rank, (str(tmp_path), dataset_files))
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert first == second
    assert first == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [["TEST.LOSS.PERIOD", "-1"], ["TEST.LOSS.IMAGES", "-1"], [*LOSS, "DATASETS.TEST", "()"]],
)
def test_what_cannot_be_measured_is_refused(tmp_path, overrides):
    cfg = run_cfg(tmp_path, *overrides)
    with pytest.raises(ValueError, match="TEST.LOSS"):
        check_values(cfg, RULES)
        check_validation_loss(cfg)
