"""BalancedFCOS on two gloo ranks trains as one process on both images, centerness included."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..conftest import make_inputs, small_cfg
from ..two_ranks import results_of_two_ranks

CASES = [("", ""), ("GHMC", "GHMR"), ("QFL", "SmoothL1")]
STEPS = 2  # in the second one rank 1 has no object


def train(case, images):
    """Losses, gradients and normaliser of each step on some of the two images."""
    torch.manual_seed(0)
    keys = ["MODEL.RESNETS.NORM", "FrozenBN"]  # BN has statistics of each rank
    keys += ["MODEL.BALANCE.CLS_LOSS", case[0], "MODEL.BALANCE.BOX_LOSS", case[1]]
    # rounding of float32 depends on the size of the batch and moves points into other bins of GHM
    model = build_model(small_cfg("fcos", *keys)).train().double()
    steps = []
    for step in range(STEPS):
        inputs = make_inputs(seed=step, empty=(1,) if step else ())
        for one in inputs:
            one["image"] = one["image"].double()
        model.zero_grad()
        with EventStorage(0):
            losses = model([inputs[index] for index in images])
        sum(losses.values()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        values = {name: value.detach() for name, value in losses.items()}
        steps.append((values, grads, model.loss_normalizer.clone()))
    return steps


def of_rank(rank):
    return [train(case, [rank]) for case in CASES]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of_two_ranks(of_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(c) or "stock" for c in CASES])
def test_losses_and_gradients_equal_one_process_on_the_joined_batch(index, two_ranks):
    joined = train(CASES[index], [0, 1])
    steps = zip(two_ranks[0][index], two_ranks[1][index], joined, strict=True)
    for (losses, grads, ema), (others, other_grads, other_ema), expected in steps:
        assert ema == other_ema == expected[2] < 300
        for name, value in expected[0].items():
            mean = (losses[name] + others[name]) / 2  # what DDP trains on
            torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-9, msg=name)
        for name, grad in expected[1].items():
            mean = (grads[name] + other_grads[name]) / 2
            torch.testing.assert_close(mean, grad, rtol=1e-6, atol=1e-9, msg=name)
    assert losses["loss_fcos_ctr"] > 0 and others["loss_fcos_ctr"] == 0
