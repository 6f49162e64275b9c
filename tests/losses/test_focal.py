"""Focal loss and the cross-entropies: equal to fvcore and to values by hand."""

import math

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss

from d2_balance.losses import BalancedCELoss, FocalLoss, Samples, SigmoidCELoss, SoftmaxCELoss


def samples(seed=0, rows=30, num_classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return Samples(
        logits=(torch.randn(rows, num_classes, generator=generator) * scale)
        .double()
        .requires_grad_(),
        labels=torch.randint(0, num_classes + 1, (rows,), generator=generator),
        num_classes=num_classes,
    )


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (-1, 1.0), (0.75, 0.5)])
def test_focal_equals_fvcore(alpha, gamma):
    batch = samples()
    ours = FocalLoss(alpha=alpha, gamma=gamma)(batch)
    theirs = sigmoid_focal_loss(batch.logits, batch.onehot, alpha, gamma)
    # fvcore computes in float32
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=3e-7)
    (mine,) = torch.autograd.grad(ours.sum(), batch.logits)
    (other,) = torch.autograd.grad(theirs.sum(), batch.logits)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_easy_entries_lose_less_than_in_cross_entropy():
    batch = samples()
    ratio = FocalLoss(alpha=-1)(batch) / SigmoidCELoss()(batch)
    p = batch.logits.sigmoid()
    p_t = torch.where(batch.onehot > 0, p, 1 - p)
    torch.testing.assert_close(ratio, (1 - p_t).square())


def test_gamma_zero_is_the_balanced_cross_entropy():
    batch = samples()
    torch.testing.assert_close(
        FocalLoss(alpha=0.3, gamma=0.0)(batch), BalancedCELoss(alpha=0.3)(batch), rtol=1e-12, atol=0
    )


def test_balanced_cross_entropy_by_hand():
    # logits 0: cross-entropy log 2; positives weigh .75, negatives .25
    batch = Samples(logits=torch.zeros(1, 2).double(), labels=torch.tensor([1]), num_classes=2)
    expected = [0.25 * math.log(2), 0.75 * math.log(2)]
    assert BalancedCELoss(alpha=0.75)(batch)[0].tolist() == pytest.approx(expected)


def test_softmax_cross_entropy_counts_background_as_a_class():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    value = SoftmaxCELoss()(Samples(logits=logits, labels=torch.tensor([2]), num_classes=2))
    # -log(e^3 / (e + e^2 + e^3)) = log(1 + e^-1 + e^-2) = 0.407606
    assert value.item() == pytest.approx(0.407606, abs=1e-6)


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (FocalLoss, {"alpha": 1.5}, "alpha"),
        (FocalLoss, {"alpha": -0.5}, "alpha"),
        (FocalLoss, {"gamma": -1.0}, "gamma"),
        (BalancedCELoss, {"alpha": 2.0}, "alpha"),
    ],
)
def test_arguments_out_of_range_are_named(cls, arguments, name):
    with pytest.raises(ValueError, match=f"{cls.name}: {name} is .*; must be"):
        cls(**arguments)
