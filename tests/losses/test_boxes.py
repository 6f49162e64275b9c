"""Smooth L1 and GIoU: equal to fvcore and torchvision, beta as state."""

import pytest
import torch
import torchvision
from fvcore.nn import smooth_l1_loss
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from d2_balance.losses import CIoULoss, DIoULoss, GIoULoss, SmoothL1Loss


def deltas(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(25, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return pred, torch.randn(25, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.11, 1.0])
def test_smooth_l1_equals_fvcore(beta):
    pred, target = deltas()
    ours, theirs = SmoothL1Loss(beta=beta)(pred, target), smooth_l1_loss(pred, target, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (mine,) = torch.autograd.grad(ours.sum(), pred)
    (other,) = torch.autograd.grad(theirs.sum(), pred)
    torch.testing.assert_close(mine, other)


def test_a_changed_beta_is_used_and_saved():
    pred, target = deltas()
    loss = SmoothL1Loss(beta=1.0)
    loss.beta.fill_(0.5)
    torch.testing.assert_close(loss(pred, target), SmoothL1Loss(beta=0.5)(pred, target))
    other = SmoothL1Loss(beta=1.0)
    other.load_state_dict(loss.state_dict())
    assert other.beta == 0.5 and other.initial_beta == 1.0


def test_gradient_at_zero_difference_is_finite_without_beta():
    pred = torch.zeros(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(SmoothL1Loss(beta=0.0)(pred, torch.zeros(2, 4)).sum(), pred)
    assert grad.isfinite().all()


def test_negative_beta_is_refused():
    with pytest.raises(ValueError, match="SmoothL1: beta is -1; must be a number of at least 0"):
        SmoothL1Loss(beta=-1)


def test_giou_equals_torchvision_and_a_value_by_hand():
    pred, _ = deltas()
    boxes = torch.cat([pred[:, :2], pred[:, :2] + pred[:, 2:].abs() + 0.1], dim=1).detach()
    shifted = boxes + 0.3
    torch.testing.assert_close(
        GIoULoss()(boxes, shifted), generalized_box_iou_loss(boxes, shifted), rtol=1e-6, atol=1e-6
    )
    # unit squares one apart: IoU 0, hull 3, union 2: 1 - 0 + (3 - 2) / 3
    value = GIoULoss()(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 3, 1]]))
    assert value.item() == pytest.approx(4 / 3, abs=1e-5)


def test_ciou_equals_torchvision_on_sound_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 4], [3, 2, 9, 20]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 1, 8, 8], [2, 2, 10, 17]], dtype=torch.float64)
    expected = complete_box_iou_loss(boxes, target)
    found = CIoULoss()(boxes, target)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), boxes)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [(0, 0), (3, 0), (0, 3)])
def test_a_box_that_has_shrunk_to_nothing_has_a_finite_ciou_loss(side):
    boxes = torch.tensor([[5.0, 5, 5 + side[0], 5 + side[1]]], requires_grad=True)
    loss = CIoULoss()(boxes, torch.tensor([[1.0, 1, 8, 8]]))
    loss.sum().backward()
    assert loss.isfinite().all() and boxes.grad.isfinite().all()


@pytest.mark.parametrize(("ours", "theirs"), [(GIoULoss, "generalized"), (DIoULoss, "distance")])
def test_overlap_losses_and_gradients_equal_torchvision(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(60, 4, generator=generator, dtype=torch.float64) * 20
    boxes[:, 2:] += boxes[:, :2]
    target = boxes[torch.randperm(60, generator=generator)]  # some overlap, some do not
    boxes.requires_grad_()
    expected = getattr(torchvision.ops, f"{theirs}_box_iou_loss")(boxes, target)
    found = ours()(boxes, target)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), boxes)
    (wanted,) = torch.autograd.grad(expected.sum(), boxes)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)
