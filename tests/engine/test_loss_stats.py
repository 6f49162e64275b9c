"""What the losses' state leaves in the EventStorage and in loss_stats.json."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2_balance.engine.hooks.loss_stats import LossStats
from d2_balance.losses import FocalLoss, GHMCLoss, Samples, SmoothL1Loss


def samples(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 3, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    return Samples(logits=logits, labels=labels, num_classes=3)


def run(hook, iterations, each_step=lambda: None, max_iter=1000, start=0):
    with EventStorage(start) as storage:
        hook.trainer = SimpleNamespace(storage=storage, max_iter=max_iter)
        for iteration in range(start, start + iterations):
            storage.iter = hook.trainer.iter = iteration
            each_step()
            hook.after_step()
        hook.after_train()
    return storage


def test_densities_weights_and_dead_bins_are_logged(tmp_path):
    loss = GHMCLoss(bins=5, momentum=0.5)
    hook = LossStats(nn.ModuleList([loss, FocalLoss()]), str(tmp_path), period=10)
    storage = run(hook, 20, lambda: loss(samples(0)))

    dead, iteration = storage.latest()["balance/GHMC/dead_bins"]
    assert (dead, iteration) == ((loss.density.density() <= 0).sum().item(), 19)
    assert not storage.smoothing_hints()["balance/GHMC/dead_bins"]
    bars = {(h["tag"], h["global_step"]): h for h in storage._histograms}
    assert set(bars) == {
        (f"balance/GHMC/{key}", step) for key in ("density", "weight") for step in (9, 19)
    }
    counts = bars["balance/GHMC/density", 19]["bucket_counts"]
    assert counts == pytest.approx(loss.density.density().tolist())


def test_names_do_not_enter_the_progress_line(tmp_path):
    # Detectron2 prints every scalar that has "loss" in its name.
    model = nn.ModuleDict({"cls_loss": GHMCLoss(bins=4), "box_loss": SmoothL1Loss()})
    storage = run(LossStats(model, str(tmp_path), period=1), 1)
    assert set(storage.latest()) == {"balance/GHMC/dead_bins", "balance/SmoothL1/beta"}
    assert not any("loss" in name for name in storage.latest())


def test_losses_of_one_class_are_numbered(tmp_path):
    model = nn.ModuleList([SmoothL1Loss(beta=0.1), SmoothL1Loss(beta=0.2)])
    latest = run(LossStats(model, str(tmp_path), period=1), 1).latest()
    assert latest["balance/SmoothL1_0/beta"][0] == pytest.approx(0.1)
    assert latest["balance/SmoothL1_1/beta"][0] == pytest.approx(0.2)


def test_the_history_is_bounded_and_keeps_first_and_last(tmp_path):
    loss = GHMCLoss(bins=4)
    hook = LossStats(nn.ModuleList([loss]), str(tmp_path), period=1, max_records=8)
    run(hook, 100, lambda: loss(samples(1)), max_iter=100)
    records = json.loads((tmp_path / "loss_stats.json").read_text())
    iterations = [r["iteration"] for r in records]
    assert len(records) <= 8 and iterations[0] == 1 and iterations[-1] == 100
    assert iterations == sorted(iterations)
    assert records[-1]["stats"]["GHMC"]["density"] == pytest.approx(loss.density.acc.tolist())


def test_the_history_survives_a_resume(tmp_path):
    loss = GHMCLoss(bins=4)
    whole = LossStats(nn.ModuleList([loss]), str(tmp_path), period=1, max_records=8)
    run(whole, 30)
    first = LossStats(nn.ModuleList([loss]), str(tmp_path), period=1, max_records=8)
    run(first, 13)
    second = LossStats(nn.ModuleList([loss]), str(tmp_path), period=1, max_records=8)
    second.load_state_dict(first.state_dict())
    run(second, 17, start=13)
    assert second.state_dict() == whole.state_dict()


def test_a_model_without_vectors_leaves_no_file(tmp_path):
    run(LossStats(nn.ModuleList([SmoothL1Loss()]), str(tmp_path), period=1), 3)
    assert not list(tmp_path.iterdir())
