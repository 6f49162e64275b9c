"""Seesaw loss: factors by hand, counts, objectness."""

import math

import pytest
import torch

from d2_balance.losses import Samples, SeesawLoss
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
