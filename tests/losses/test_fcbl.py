"""FCBL against the authors' figures over four steps, and its formula with loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import FCBLLoss, Samples
from d2_balance.losses.fcbl import confusion_margin

REFERENCE = Path(__file__).parent.parent / "reference" / "fcbl.npz"


@pytest.fixture
def ref():
    return {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_four_steps_equal_the_authors_figures(ref):
    num_classes = int(ref["num_classes"])
    loss = FCBLLoss(
        num_classes=num_classes, alpha=float(ref["alpha"]), score_threshold=float(ref["prob_thr"])
    )
    for step in range(4):
        loss.reweight = bool(ref["reweight"][step])
        logits, labels = ref["logits"][step].clone().requires_grad_(), ref["labels"][step]
        keep = labels >= 0
        samples = Samples(logits=logits[keep], labels=labels[keep], num_classes=num_classes)
        value = loss(samples).sum() / keep.sum()
        (grad,) = torch.autograd.grad(value, logits)
        close(value, ref["loss"][step])
        close(grad, ref["grad"][step])
        close(loss.seen, ref["seen"][step])
        close(loss.confusion, ref["confusion"][step])
    assert loss.seen[5] == 0


def test_scores_equal_the_authors_figures(ref):
    found = FCBLLoss(num_classes=int(ref["num_classes"])).probabilities(ref["test_logits"])
    close(found, ref["test_scores"])


def test_three_batches_equal_the_formula_with_loops():
    generator = torch.Generator().manual_seed(0)
    num_classes, alpha, xi = 3, 0.85, 0.7
    loss = FCBLLoss(num_classes=num_classes)
    sums = [[0.0] * num_classes for _ in range(num_classes)]
    seen = [0] * num_classes
    for _ in range(3):
        logits = 2 * torch.randn(20, 4, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, 4, (20,), generator=generator)
        found = loss(logits, labels)
        rate = [[max(s / max(n, 1), 1e-3) for s in row] for row, n in zip(sums, seen, strict=True)]
        for z, y, row in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
            p = [1 / (1 + math.exp(-x)) for x in z]
            score = [x * (1 - p[3]) for x in p[:3]]
            for j in range(4):
                delta = alpha * math.log(rate[y][j] / rate[j][y]) if y < 3 and j < 3 else 0
                q = 1 / (1 + math.exp(-z[j] - delta))
                expected = -math.log(q if j == y else 1 - q)
                if y < 3 and j < 3 and score[j] < score[y] and score[j] < xi:
                    expected = 0
                assert row[j] == pytest.approx(expected, rel=1e-9)
            if y < 3:
                total = sum(math.exp(x) for x in z[:3])
                sums[y] = [s + math.exp(x) / total for s, x in zip(sums[y], z[:3], strict=True)]
                seen[y] += 1


def test_a_class_that_is_confused_more_often_raises_the_other_logit():
    # class 0 is taken for class 1 in half of its samples, and class 1 for 0 in a tenth
    confusion = torch.tensor([[50.0, 50.0], [1.0, 9.0]])
    margin = confusion_margin(confusion, torch.tensor([100.0, 10.0]), alpha=0.85)
    assert margin[0, 1].item() == pytest.approx(0.85 * math.log(5))
    assert torch.equal(margin, -margin.t())


def test_margins_of_a_class_that_was_never_seen_are_bounded():
    confusion = torch.tensor([[0.0, 10.0], [0.0, 0.0]])
    margin = confusion_margin(confusion, torch.tensor([10.0, 0.0]), alpha=0.85)
    assert margin[0, 1].item() == pytest.approx(0.85 * math.log(1000))


def test_a_certain_background_leaves_no_class_confident_by_itself():
    # sigmoid(5) is above 0.7, but not times 1 - sigmoid(3); it is below the own class
    logits = torch.tensor([[6.0, 5.0, 7.0, 3.0]])
    value = FCBLLoss(num_classes=3)(logits, torch.tensor([0]))
    assert value[0, 1] == 0 and (value[0, [0, 2, 3]] > 0).all()


def test_batches_without_foreground_change_no_state():
    loss = FCBLLoss(num_classes=2)
    loss(torch.randn(5, 3), torch.full((5,), 2))
    assert not loss.confusion.any() and not loss.seen.any()


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", 0), ("alpha", -1.0), ("score_threshold", 0.0)]
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"FCBL: {name} is .*; must be"):
        FCBLLoss(**{"num_classes": 3, name: value})
