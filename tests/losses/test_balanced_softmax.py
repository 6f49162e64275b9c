"""Balanced softmax, logit adjustment and the softmax equalization loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from d2_balance.losses import (
    BalancedSoftmaxLoss,
    LogitAdjustedLoss,
    Samples,
    SoftmaxCELoss,
    SoftmaxEQLLoss,
)

COUNT = [100, 10, 1]


def samples(background=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = 3 + background
    return Samples(
        logits=torch.randn(12, columns, generator=generator).double().requires_grad_(),
        labels=torch.arange(12) % columns,
        num_classes=3,
    )


def slow_adjusted(logits, labels, prior):
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = prior + [1.0] * (len(row) - len(prior))
        terms = [w * math.exp(z) for w, z in zip(weights, row, strict=True)]
        losses.append(-math.log(terms[label] / sum(terms)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("background", [True, False])
def test_balanced_softmax_weights_the_exponentials_by_the_counts(background):
    batch = samples(background)
    expected = slow_adjusted(batch.logits, batch.labels, [1.0, 0.1, 0.01])
    torch.testing.assert_close(BalancedSoftmaxLoss(class_count=COUNT)(batch), expected)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_adjustment_raises_the_prior_to_tau(tau):
    batch = samples()
    expected = slow_adjusted(batch.logits, batch.labels, [(c / 111) ** tau for c in COUNT])
    torch.testing.assert_close(LogitAdjustedLoss(instance_count=COUNT, tau=tau)(batch), expected)
    if tau == 0:
        torch.testing.assert_close(expected, SoftmaxCELoss()(batch).detach())


def test_rare_classes_are_pushed_harder():
    logits = torch.zeros(2, 4, requires_grad=True)
    labels = torch.tensor([0, 2])
    loss = BalancedSoftmaxLoss(class_count=COUNT)
    loss(Samples(logits=logits, labels=labels, num_classes=3)).sum().backward()
    assert -logits.grad[1, 2] > -logits.grad[0, 0] > 0


def test_classes_without_images_stay_finite():
    batch = samples()
    assert BalancedSoftmaxLoss(class_count=[5, 0, 0])(batch).isfinite().all()
    assert LogitAdjustedLoss(instance_count=[5, 0, 0])(batch).isfinite().all()


FREQUENCY = [0.5, 0.001, 0.0001]


def test_softmax_eql_without_drops_is_the_cross_entropy():
    batch = samples()
    loss = SoftmaxEQLLoss(class_frequency=FREQUENCY, gamma=0.0)
    torch.testing.assert_close(loss(batch), SoftmaxCELoss()(batch))


def test_softmax_eql_takes_tail_classes_out_of_the_sum():
    # gamma 1: always dropped. Row of class 0: only class 0 and background remain; a row of class 1
    # keeps itself; a background row keeps all
    logits = torch.zeros(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3])
    value = SoftmaxEQLLoss(class_frequency=FREQUENCY, gamma=1.0)(
        Samples(logits=logits, labels=labels, num_classes=3)
    )
    assert value.tolist() == pytest.approx([math.log(2), math.log(3), math.log(4)])


def test_softmax_eql_drops_with_probability_gamma():
    # E[L] = gamma log 2 + (1 - gamma) log 3 for one tail class beside class 0 and background
    logits = torch.zeros(20000, 3, dtype=torch.float64)
    batch = Samples(logits=logits, labels=torch.zeros(20000).long(), num_classes=2)
    value = SoftmaxEQLLoss(class_frequency=[0.5, 0.0001], gamma=0.9)(batch).mean()
    # standard error: .3 * (log 3 - log 2) / sqrt(20000) < .001
    assert value.item() == pytest.approx(0.9 * math.log(2) + 0.1 * math.log(3), abs=0.004)


def test_softmax_eql_classifies_without_background():
    batch = samples(background=False)
    loss = SoftmaxEQLLoss(class_frequency=FREQUENCY, gamma=0.0)
    expected = F.cross_entropy(batch.logits, batch.labels, reduction="none")
    torch.testing.assert_close(loss(batch), expected)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: BalancedSoftmaxLoss(class_count=[-1]), "class_count"),
        (lambda: LogitAdjustedLoss(instance_count=[1], tau=-1.0), "tau"),
        (lambda: SoftmaxEQLLoss(class_frequency=[0.1], gamma=1.5), "gamma"),
        (lambda: SoftmaxEQLLoss(class_frequency=[0.1], lambda_=2.0), "lambda_"),
    ],
)
def test_arguments_out_of_range_are_named(build, name):
    with pytest.raises(ValueError, match=f"{name} is .*; must be"):
        build()
