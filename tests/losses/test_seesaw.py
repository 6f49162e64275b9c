"""Seesaw loss: factors by hand, counts, objectness."""

import math

import pytest
import torch

from d2_balance.losses import FocalLoss, Samples, SeesawFocalLoss, SeesawLoss
from d2_balance.losses.seesaw import seesaw_ce_loss


def slow_seesaw(logits, label, counts, p=0.8, q=2.0, eps=0.01):
    """One row of equations 4 to 8."""
    total = sum(math.exp(z) for z in logits)
    scores = [math.exp(z) / total for z in logits]
    own = max(scores[label], eps)
    denominator = 0.0
    for j, z in enumerate(logits):
        factor = 1.0
        if j != label:
            here, there = max(counts[label], 1), max(counts[j], 1)
            if here > there:
                factor *= (there / here) ** p
            if scores[j] > own:
                factor *= (scores[j] / own) ** q
        denominator += factor * math.exp(z)
    return -math.log(math.exp(logits[label]) / denominator)


def test_class_part_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 4, (20,), generator=generator)
    counts = torch.tensor([1000.0, 50.0, 3.0, 0.0])
    value = seesaw_ce_loss(logits, labels, counts, 0.8, 2.0, 0.01)
    expected = [
        slow_seesaw(z, y, counts.tolist())
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert value.tolist() == pytest.approx(expected)


def test_counts_are_updated_before_the_loss_and_only_by_objects():
    loss = SeesawLoss(num_classes=2)
    logits = torch.zeros(5, 4, requires_grad=True)
    loss(Samples(logits=logits, labels=torch.tensor([0, 0, 0, 1, 2]), num_classes=2))
    assert loss.counts.tolist() == [3.0, 1.0]


def test_background_rows_train_objectness_only():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = SeesawLoss(num_classes=2)
    loss(Samples(logits=logits, labels=torch.full((3,), 2), num_classes=2)).sum().backward()
    assert (logits.grad[:, :2] == 0).all() and (logits.grad[:, 2:] != 0).all()


def test_scores_are_class_times_object():
    probs = SeesawLoss(num_classes=2).probabilities(torch.tensor([[1.0, 0.0, 2.0, 0.0]]))
    obj = math.exp(2) / (math.exp(2) + 1)
    first = math.e / (math.e + 1)
    assert probs[0].tolist() == pytest.approx([first * obj, (1 - first) * obj, 1 - obj])
    assert probs.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["p", "q", "eps"])
def test_arguments_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"Seesaw: {name} is -1.0; must be"):
        SeesawLoss(num_classes=2, **{name: -1.0})


def slow_seesaw_focal(logits, label, counts, p=0.8, q=2.0, eps=0.01, alpha=0.25, gamma=2.0):
    """One sample of the sigmoid form; a label of K is background."""
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    values = []
    for j, z in enumerate(logits):
        odds = math.exp(z)
        if label < len(logits) and j != label:
            here, there = max(counts[label], 1), max(counts[j], 1)
            odds *= (there / here) ** p if here > there else 1
            own = max(scores[label], eps)
            odds *= (scores[j] / own) ** q if scores[j] > own else 1
        prob = odds / (1 + odds)
        if j == label:
            values.append(-alpha * (1 - prob) ** gamma * math.log(prob))
        else:
            values.append(-(1 - alpha) * prob**gamma * math.log(1 - prob))
    return values


def test_sigmoid_form_equals_the_formula_and_counts_first():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 5, (20,), generator=generator)
    loss = SeesawFocalLoss(num_classes=4)
    loss.counts.copy_(torch.tensor([1000.0, 50.0, 3.0, 0.0]))
    value = loss(logits, labels)
    seen = torch.bincount(labels, minlength=5)[:4].tolist()
    counts = [n + m for n, m in zip([1000, 50, 3, 0], seen, strict=True)]
    assert loss.counts.tolist() == counts
    for z, y, row in zip(logits.tolist(), labels.tolist(), value.tolist(), strict=True):
        assert row == pytest.approx(slow_seesaw_focal(z, y, counts), rel=1e-9)


def test_sigmoid_form_is_focal_loss_in_background_and_among_equal_classes():
    logits = torch.tensor([[1.0, -2.0, -1.0], [0.5, 0.0, 2.0]], requires_grad=True)
    labels = torch.tensor([0, 3])  # the own class has the highest score
    value, plain = SeesawFocalLoss(num_classes=3)(logits, labels), FocalLoss()(logits, labels)
    torch.testing.assert_close(value, plain)
    grads = [torch.autograd.grad(v.sum(), logits)[0] for v in (value, plain)]
    torch.testing.assert_close(*grads)


def test_frequent_classes_push_rare_ones_down_less_in_the_sigmoid_form():
    loss = SeesawFocalLoss(num_classes=2)
    loss.counts.copy_(torch.tensor([1000.0, 1.0]))
    logits = torch.zeros(2, 2, requires_grad=True)
    loss(logits, torch.tensor([0, 1])).sum().backward()
    assert 0 < logits.grad[0, 1] < 0.01 * logits.grad[1, 0]
