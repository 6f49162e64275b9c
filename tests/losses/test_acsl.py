"""ACSL against the authors' figures, its formula with loops, and how background is sampled."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import ACSLLoss, Samples
from d2_balance.losses.acsl import acsl_loss, sample_background

REFERENCE = Path(__file__).parent.parent / "reference" / "acsl.npz"
COUNT = {2: 500, 1: 50, 0: 5}  # images of a class of each group of the figures


def trained_columns(groups, drawn, rows):
    """(R, K + 1) bool from the samples drawn for rare, common and frequent classes."""
    sampled = torch.zeros(rows, len(groups) + 1, dtype=torch.bool)
    sampled[:, -1] = True
    for column, group in enumerate(groups):
        sampled[drawn[group], column] = True
    return sampled


def test_value_and_gradient_equal_the_authors_figures():
    ref = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}
    keep, labels = ref["labels"] >= 0, ref["labels"]
    drawn = [ref[f"drawn_{name}"] for name in ("rare", "common", "frequent")]
    sampled = trained_columns(ref["group"].tolist(), drawn, len(labels))
    logits = ref["logits"].clone().requires_grad_()
    target = torch.nn.functional.one_hot(labels.clamp(min=0), 10).double()
    loss = acsl_loss(logits, target, sampled, float(ref["score_thr"]))
    value = loss[keep].sum() / keep.sum()
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, ref["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, ref["grad"], rtol=1e-6, atol=1e-9)


def test_the_module_equals_the_figures_where_the_same_background_is_sampled(monkeypatch):
    ref = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}
    chosen = torch.zeros(2, len(ref["labels"]), dtype=torch.bool)
    chosen[0, ref["drawn_rare"]] = chosen[1, ref["drawn_common"]] = True
    monkeypatch.setattr("d2_balance.losses.acsl.sample_background", lambda *_: chosen)
    assert (ref["labels"] >= 0).all()
    loss = ACSLLoss(class_count=[COUNT[g] for g in ref["group"].tolist()])
    logits = ref["logits"].clone().requires_grad_()
    value = loss(Samples(logits=logits, labels=ref["labels"], num_classes=9)).sum() / len(logits)
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, ref["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, ref["grad"], rtol=1e-6, atol=1e-9)


def test_loss_equals_its_formula_with_loops(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(12, 4, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2] + [3] * 9)
    chosen = torch.rand(2, 12, generator=generator) < 0.5
    monkeypatch.setattr("d2_balance.losses.acsl.sample_background", lambda *_: chosen)
    found = ACSLLoss(class_count=[500, 50, 5])(logits, labels)
    for i, label in enumerate(labels.tolist()):
        for j in range(4):
            p = 1 / (1 + math.exp(-logits[i, j]))
            if j == label:
                expected = -math.log(p)
            elif label < 3:
                expected = -math.log(1 - p) * (p >= 0.7)
            else:  # class 0 is frequent, 1 common, 2 rare
                expected = -math.log(1 - p) * (True, chosen[1, i].item(), chosen[0, i].item())[j]
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fractions", [(0.01, 0.1), (0.0, 1.0)])
def test_each_group_samples_its_fraction_of_the_background_without_replacement(fractions):
    torch.manual_seed(0)
    background = torch.rand(5000) < 0.8
    sampled = sample_background(background, fractions)
    assert not (sampled & ~background).any()
    for row, fraction in zip(sampled, fractions, strict=True):
        assert abs(row.sum().item() - fraction * background.sum().item()) < 1


def test_small_batches_keep_the_rate_of_rare_classes():
    # 30 background samples: 0.3 of them per batch on average, where rounding down gives none
    torch.manual_seed(0)
    counts = [
        sample_background(torch.ones(30, dtype=torch.bool), [0.01]).sum() for _ in range(2000)
    ]
    assert {c.item() for c in counts} == {0, 1}
    assert sum(counts).item() / 2000 == pytest.approx(0.3, abs=0.04)  # 4 standard deviations


def test_groups_are_those_of_lvis():
    loss = ACSLLoss(class_count=[0, 10, 11, 100, 101])
    assert loss.group.tolist() == [0, 0, 1, 1, 2]


def test_scores_are_the_sigmoid_of_the_class():
    logits = torch.tensor([[0.0, 2.0, 50.0]])  # background takes nothing away
    scores = ACSLLoss(class_count=[1, 2]).probabilities(logits)
    torch.testing.assert_close(scores[:, :2], logits[:, :2].sigmoid())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_count", [-1.0]),
        ("score_threshold", 1.0),
        ("cuts", (100, 10)),
        ("cuts", (10,)),
        ("fractions", (0.1, 1.1)),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"ACSL: {name} is .*; must be"):
        ACSLLoss(**{"class_count": [1.0, 2.0], name: value})
