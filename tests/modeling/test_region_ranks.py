"""Two gloo ranks of which one alone has ignore regions, boxes without masks or image-level labels.

Both must do the same collectives: a rank that leaves one out makes the other wait.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from ..conftest import make_inputs, small_cfg
from ..two_ranks import results_of_two_ranks

RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
CASES = {
    "mask": (*RPN, "MODEL.BALANCE.CLS_LOSS", "EQLv2", "MODEL.BALANCE.RPN.CLS_LOSS", "GHMC"),
    "cascade": (*RPN, "MODEL.BALANCE.CLS_LOSS", "Seesaw", "MODEL.MASK_ON", True),
    "retinanet": ("MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.BALANCE.BOX_LOSS", "GHMR"),
    "fcos": (),
}
DENSE = ("retinanet", "fcos")  # which sample nothing and so equal one process on both images
SIZE, STEPS = 64, 4


def images(step):
    """One image for each rank; the second one is an ordinary one in every step.

    The first has regions, then boxes without masks and image-level labels, then is one region
    without an object, and then is ordinary, too.
    """
    inputs = make_inputs(2, 2, SIZE, seed=step, empty=(0,) if step == 2 else ())
    first = inputs[0]
    if step == 0:
        first["ignore_boxes"] = torch.tensor([[0.0, 0, 40, 64]])
    if step == 1:
        first["instances"].gt_has_mask = torch.tensor([False, False])
        first["neg_category_ids"] = [1, 2]
    if step == 2:
        first["ignore_boxes"] = torch.tensor([[-200.0, -200, 300, 300]])
    for record in inputs:
        record["image"] = record["image"].double()
    return inputs


def nms_of_floats(boxes, scores, *more, nms=proposal_utils.batched_nms):
    """The RPN's boxes are float32 in any case, and NMS wants one type of boxes and scores."""
    return nms(boxes, scores.float(), *more)


def train(kind, ranks):
    """Losses and gradients of each step, and the state at the end."""
    torch.manual_seed(0)
    keys = ("MODEL.RESNETS.NORM", "LN")  # BN has statistics of each rank
    model = build_model(small_cfg(kind, *keys, *CASES[kind])).train().double()
    run = DistributedDataParallel(model, broadcast_buffers=False) if len(ranks) == 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = []
    for step in range(STEPS):
        inputs = images(step)
        optimizer.zero_grad()
        with EventStorage(0):
            losses = run([inputs[rank] for rank in ranks])
        sum(losses.values()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        steps.append(({name: value.detach() for name, value in losses.items()}, grads))
        optimizer.step()
    return steps, model.state_dict()


def of_rank(rank):
    torch.set_num_threads(1)
    proposal_utils.batched_nms = nms_of_floats
    return {kind: train(kind, [rank]) for kind in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of_two_ranks(of_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", CASES)
def test_ranks_stay_equal(two_ranks, kind):
    (first, state), (second, other_state) = two_ranks[0][kind], two_ranks[1][kind]
    for (losses, grads), (others, other_grads) in zip(first, second, strict=True):
        assert losses.keys() == others.keys()
        assert all(loss.isfinite() for loss in [*losses.values(), *others.values()])
        for name, grad in grads.items():
            assert grad.isfinite().all() and torch.equal(grad, other_grads[name]), name
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name
    # what the steps are there for
    assert all(loss == 0 for loss in first[2][0].values())
    assert all(loss > 0 for loss in second[2][0].values())
    if kind not in DENSE:
        assert [losses["loss_mask"] > 0 for losses, _ in first] == [True, False, False, True]


@pytest.mark.parametrize("kind", DENSE)
def test_dense_heads_equal_one_process_on_both_images(two_ranks, kind):
    expected, state = train(kind, [0, 1])
    for (_, grads), (_, joined) in zip(two_ranks[0][kind][0], expected, strict=True):
        for name, grad in joined.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-9, msg=name)
    for name, value in state.items():
        torch.testing.assert_close(two_ranks[0][kind][1][name], value, rtol=1e-6, atol=1e-9)
