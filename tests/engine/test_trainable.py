"""Training of chosen parts: what moves, what does not, and bad entries."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.setup.trainable import train_only

from ..conftest import make_inputs, small_cfg
from .conftest import run_cfg

CLASSIFIER = ["MODEL.BALANCE.TRAINABLE", ["box_predictor.cls_score"]]


def step(model, cfg):
    """One step of training mode with a large learning rate."""
    model.train()
    optimizer = BalancedTrainer.build_optimizer(cfg, model)
    with EventStorage():
        losses = model(make_inputs())
    sum(losses.values()).backward()
    optimizer.step()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_only_the_named_parameters_move_and_no_statistics(kind):
    cfg = small_cfg(kind, *CLASSIFIER, "SOLVER.BASE_LR", 1.0)
    entry = "box_predictor.cls_score"
    if kind == "cascade":
        cfg.MODEL.BALANCE.TRAINABLE = ["cls_score"]
        entry = "cls_score"
    model = BalancedTrainer.build_model(cfg)
    before = copies(model)
    step(model, cfg)
    moved = changed(before, model.state_dict())
    assert moved and all(entry in name for name in moved)
    assert len(moved) == (6 if kind == "cascade" else 2)  # weight and bias of each


def test_without_entries_nothing_is_frozen():
    cfg = small_cfg("faster", "SOLVER.BASE_LR", 1.0)
    model = BalancedTrainer.build_model(cfg)
    assert all(p.requires_grad for p in model.parameters())
    before = copies(model)
    step(model, cfg)
    assert "backbone.bottom_up.stem.conv1.norm.running_mean" in changed(before, model.state_dict())


def test_batch_norms_of_trained_parts_keep_on_learning():
    cfg = small_cfg("faster", "MODEL.BALANCE.TRAINABLE", ["res4", "roi_heads"])
    model = BalancedTrainer.build_model(cfg)
    before = copies(model)
    step(model, cfg)
    moved = {n for n in changed(before, model.state_dict()) if n.endswith("running_mean")}
    assert moved and all(".res4." in name for name in moved)


def test_a_frozen_model_gives_what_it_gave_in_evaluation():
    cfg = small_cfg("mask")
    free = build_model(cfg)
    step(free, cfg)  # statistics that are not those of the start
    frozen = build_model(cfg)
    frozen.load_state_dict(free.state_dict())
    train_only(frozen, ["cls_score"])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = free.eval().backbone(images)
        found = frozen.train().backbone(images)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level])


def test_checkpoints_load_into_frozen_models_and_back(tmp_path):
    source = build_model(small_cfg("mask"))
    step(source, small_cfg("mask"))
    DetectionCheckpointer(source, str(tmp_path)).save("first")
    frozen = BalancedTrainer.build_model(small_cfg("mask", *CLASSIFIER))
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) > 10
    DetectionCheckpointer(frozen).load(str(tmp_path / "first.pth"))
    DetectionCheckpointer(frozen, str(tmp_path)).save("second")
    last = build_model(small_cfg("mask"))
    DetectionCheckpointer(last).load(str(tmp_path / "second.pth"))
    expected, state = source.state_dict(), last.state_dict()
    assert changed(expected, state) == set()


def test_norms_that_share_the_parameters_of_a_list_follow_them():
    cfg = small_cfg("retinanet", "MODEL.RETINANET.NORM", "BN")
    head = build_model(cfg)
    train_only(head, ["head.cls_subnet"])
    frozen = {
        name.split(".")[1]: isinstance(m, FrozenBatchNorm2d)
        for name, m in head.named_modules()
        if name.startswith("head.") and isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))
    }
    assert frozen == {"cls_subnet": False, "bbox_subnet": True}


def test_what_is_frozen_already_stays_frozen():
    cfg = small_cfg("faster", "MODEL.BACKBONE.FREEZE_AT", 2)
    model = build_model(cfg)
    train_only(model, ["backbone"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".stem." in n or ".res2." in n for n in trained)
    assert all(name.startswith("backbone.") for name in trained)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("box_predictor.cls_scores", "did you mean box_predictor.cls_score"),
        ("box_predicter", "did you mean box_predictor"),
        ("zzz", "it must be a part such as"),
        ("", "'' must be a part"),
    ],
)
def test_entries_that_match_nothing_are_named(entry, expected):
    with pytest.raises(ValueError) as error:
        train_only(build_model(small_cfg("faster")), ["cls_score", entry])
    assert str(error.value).startswith("MODEL.BALANCE.TRAINABLE: ")
    assert expected in str(error.value)


def test_an_entry_for_frozen_parameters_is_refused():
    model = build_model(small_cfg("faster", "MODEL.BACKBONE.FREEZE_AT", 2))
    with pytest.raises(ValueError, match="'backbone.bottom_up.stem' is no part of the name"):
        train_only(model, ["backbone.bottom_up.stem"])


def test_a_run_that_trains_one_layer_resumes_exactly(dataset, tmp_path):
    options = ["MODEL.BALANCE.CLS_LOSS", "BAGS", "MODEL.BALANCE.BAGS.CUTS", (8, 16), *CLASSIFIER]
    options += ["SOLVER.CHECKPOINT_PERIOD", 2]

    def run(directory, iterations, resume=False):
        keys = [*options, "SOLVER.MAX_ITER", iterations]
        trainer = BalancedTrainer(run_cfg(directory, *keys, kind="faster"))
        trainer.resume_or_load(resume=resume)
        trainer.test = lambda cfg, model: {}
        start = copies(trainer.model)
        trainer.train()
        return start, trainer.model.state_dict()

    torch.manual_seed(7)
    start, whole = run(tmp_path / "whole", 4)
    torch.manual_seed(7)
    run(tmp_path / "parts", 2)
    _, resumed = run(tmp_path / "parts", 4, resume=True)
    assert changed(whole, resumed) == set()
    prefix = "roi_heads.box_predictor."
    assert {n for n in changed(start, whole) if "normalizer" not in n} == {
        prefix + "cls_score.weight",
        prefix + "cls_score.bias",
    }
