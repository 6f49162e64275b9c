"""LOCE and its memory on two gloo ranks: common mean scores, a memory for each rank."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..conftest import CLASSES, make_inputs, small_cfg
from ..two_ranks import results_of_two_ranks
from .test_feature_memory_steps import MEMORY

STEPS = 3  # in the second one rank 1 has no object at all


def train(rank):
    """What the box head holds after each step on one image."""
    torch.manual_seed(0)
    model = build_model(small_cfg("faster", *MEMORY)).train()
    torch.manual_seed(rank)  # each rank samples for itself
    steps = []
    for step in range(STEPS):
        inputs = make_inputs(seed=step, empty=(1,) if step == 1 else ())
        with EventStorage(0):
            losses = model([inputs[rank]])
        sum(losses.values()).backward()
        (layer,) = model.roi_heads._output_layers()
        state = {name: buffer.clone() for name, buffer in layer.cls_loss.named_buffers()}
        steps.append(
            {
                "labels": set(inputs[rank]["instances"].gt_classes.tolist()),
                "loss": losses["loss_cls"].detach(),
                "state": state,
                "count": layer.memory.count.clone(),
            }
        )
    return steps


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of_two_ranks(train, tmp_path_factory.mktemp("ranks"))


def test_mean_scores_are_those_of_all_ranks(two_ranks):
    before = None
    for first, second in zip(*two_ranks, strict=True):
        assert first["state"] and first["state"].keys() == second["state"].keys()
        for name, value in first["state"].items():
            assert torch.equal(value, second["state"][name]), name
        assert before is None or any(
            not torch.equal(value, before[name]) for name, value in first["state"].items()
        )
        before = first["state"]


def test_each_rank_keeps_the_samples_of_its_own_images(two_ranks):
    for steps in two_ranks:
        seen = set()
        for step in steps:
            seen |= step["labels"]
            held = set(step["count"].nonzero().flatten().tolist())
            assert held == seen < set(range(CLASSES + 1))
    assert not torch.equal(two_ranks[0][-1]["count"], two_ranks[1][-1]["count"])


def test_a_rank_without_objects_goes_on(two_ranks):
    before, empty, after = two_ranks[1]
    assert empty["labels"] == set() and torch.equal(empty["count"], before["count"])
    assert empty["loss"].isfinite() and after["loss"].isfinite()
