"""Guided loss scaling: its value, what it is invariant to, and its edges."""

import pytest
import torch
from torch import nn

from d2_balance.losses import SigmoidCELoss, SmoothL1Loss
from d2_balance.modeling.criterion import PositiveNormalizer, detection_losses
from d2_balance.reweight import GuidedScale

from ..losses.test_contract import make
from ..two_ranks import results_of_two_ranks


def value(number):
    return torch.tensor(number, requires_grad=True)


def test_value_is_the_box_loss_and_gradient_is_that_of_the_logarithm():
    cls, box = value(4.0), value(3.0)
    guided = GuidedScale(scale=2.0)
    loss = guided(cls, box)
    assert loss.item() == 6.0  # w L_box
    grads = torch.autograd.grad(loss, (cls, box), allow_unused=True)
    assert grads[0].item() == 1.5  # w L_box / L_cls
    assert grads[1] is None  # the ratio has no gradient
    assert guided.log_values()["ratio"].item() == 0.75


@pytest.mark.parametrize("factor", [1e-4, 0.1, 1000.0])
def test_a_constant_factor_of_the_classification_loss_changes_nothing(factor):
    def run(scale):
        logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        loss = GuidedScale()(scale * nn.functional.softplus(logits).sum(), torch.tensor(0.7))
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(run(factor), run(1.0))


def test_without_positives_nothing_trains_and_the_graph_stays():
    cls = value(4.0)
    loss = GuidedScale()(cls, torch.tensor(0.0))
    assert loss.item() == 0.0 and loss.grad_fn is not None
    assert torch.autograd.grad(loss, cls)[0].item() == 0.0


@pytest.mark.parametrize(("box", "ratio"), [(3.0, 50.0), (0.0, 0.0)])
def test_a_collapsed_classification_loss_meets_the_bound(box, ratio):
    cls = value(0.0)
    guided = GuidedScale(max_ratio=50.0)
    loss = guided(cls, torch.tensor(box))
    assert loss.item() == 0.0 and guided.ratio.item() == ratio
    assert torch.autograd.grad(loss, cls)[0].item() == ratio


@pytest.mark.parametrize(("name", "bad"), [("scale", -1.0), ("max_ratio", 0.0)])
def test_arguments_out_of_range_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"{name} is .*; must be"):
        GuidedScale(**{name: bad})


def losses(normalizer, guided, **weights):
    samples = make(SigmoidCELoss())
    found = detection_losses(
        samples, SigmoidCELoss(), SmoothL1Loss(), [], normalizer, guided=guided, **weights
    )
    (grad,) = torch.autograd.grad(found["loss_cls"], samples.logits)
    return found, grad


def test_the_criterion_scales_last_of_all():
    found, grad = losses(PositiveNormalizer(), GuidedScale(2.0), box_weight=3.0)
    plain, _ = losses(PositiveNormalizer(), None)
    torch.testing.assert_close(found["loss_box_reg"], 3 * plain["loss_box_reg"])
    torch.testing.assert_close(found["loss_cls"], 6 * plain["loss_box_reg"])
    # the weight of the classification loss drops out
    _, other = losses(PositiveNormalizer(), GuidedScale(2.0), box_weight=3.0, cls_weight=0.1)
    torch.testing.assert_close(other, grad)


def test_mean_over_positives():
    normalizer = PositiveNormalizer()
    losses(normalizer, GuidedScale())
    assert normalizer.value().item() == 9  # positives of `make`


BATCHES = [(4.0, 3.0), (1.0, 0.0)]  # (L_cls, L_box) of two ranks; the second has no positive


def scaled(rank):
    guided = GuidedScale(2.0)
    cls, box = BATCHES[rank]
    cls = value(cls)
    loss = guided(cls, torch.tensor(box))
    (grad,) = torch.autograd.grad(loss, cls)
    return guided.ratio, loss.detach(), grad


def test_two_ranks_have_one_ratio(tmp_path):
    found = results_of_two_ranks(scaled, tmp_path)
    for (ratio, loss, grad), (cls, _) in zip(found, BATCHES, strict=True):
        assert ratio.item() == pytest.approx(3 / 5)  # (3 + 0) / (4 + 1)
        assert loss.item() == pytest.approx(2 * 3 / 5 * cls)
        assert grad.item() == pytest.approx(2 * 3 / 5)  # also where this rank has no positive
    mean = sum(loss for _, loss, _ in found) / 2
    assert mean.item() == pytest.approx(2 * (3 + 0) / 2)  # w times the mean of the box loss
