"""Equilibrium loss: the margins, and the mean scores that make them."""

import math

import pytest
import torch

from d2_balance.losses import LOCELoss, Samples
from d2_balance.losses.loce import equilibrium_loss, object_score_sums

K = 4


def slow_loss(logits, labels, s):
    """-log(s_y e^z_y / sum_k s_k e^z_k), row by row."""
    values = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(s[k] * math.exp(row[k]) for k in range(len(row)))
        values.append(-math.log(s[label] * math.exp(row[label]) / total))
    return values


def slow_update(s, logits, labels, ids, momentum):
    """The paper's rule with loops: scores of an object's rows, then objects of a class."""
    s = list(s)
    probs = logits.softmax(dim=1)
    positive = [i for i, label in enumerate(labels.tolist()) if label < K]
    scores = {}
    for row, name in zip(positive, ids, strict=True):
        label = int(labels[row])
        scores.setdefault((label, name), []).append(probs[row, label].item())
    for c in range(K):
        means = [sum(v) / len(v) for (label, _), v in scores.items() if label == c]
        if means:
            kept = momentum ** len(means)
            s[c] = kept * s[c] + (1 - kept) * sum(means) / len(means)
    return s


def batch(seed, rows=40, objects=6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, K + 1, generator=generator, dtype=torch.float64) * 2
    classes = torch.randint(0, K, (objects,), generator=generator)
    ids = torch.randint(0, objects, (rows,), generator=generator)
    background = torch.rand(rows, generator=generator) < 0.4
    labels = torch.where(background, K, classes[ids])
    return Samples(
        logits=logits.requires_grad_(),
        labels=labels,
        num_classes=K,
        gt_index=ids[~background],
    )


def test_loss_and_mean_scores_follow_the_paper_over_several_batches():
    loss = LOCELoss(num_classes=K, momentum=0.8, background_score=0.05)
    s = [0.01] * K + [0.05]
    for seed in range(4):
        samples = batch(seed)
        value = loss(samples)
        logits = samples.logits.detach()
        s = slow_update(s, logits, samples.labels, samples.gt_index.tolist(), 0.8)
        assert loss.mean_score.tolist() == pytest.approx(s, rel=1e-12)
        assert value.tolist() == pytest.approx(slow_loss(logits, samples.labels, s), rel=1e-9)
    assert loss.mean_score[-1] == 0.05


def test_equal_mean_scores_are_the_cross_entropy():
    samples = batch(0)
    loss = LOCELoss(num_classes=K).eval()  # all scores .01
    ce = torch.nn.functional.cross_entropy(samples.logits, samples.labels, reduction="none")
    torch.testing.assert_close(loss(samples), ce)


def test_weak_classes_are_pushed_down_less():
    # a row of class 0 pushes class j down by s_j e^{z_j} / sum: at equal logits by s_j / sum s
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    equilibrium_loss(logits, torch.tensor([0]), s).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.5, 0.4, 0.1])


def test_one_object_with_two_rows_by_hand():
    # object 7 of class 1: rows with scores 1/2 and 1/4, mean 3/8; object 9 of class 1: score 1/3
    # m = 2, kept = .81: s_1 = .81 * .01 + .19 * (3/8 + 1/3) / 2
    loss = LOCELoss(num_classes=2, momentum=0.9)
    logits = torch.tensor([[1.0, 2, 1], [1.0, 1, 2], [1.0, 1, 1], [5.0, 5, 5]]).log()
    samples = Samples(
        logits=logits,
        labels=torch.tensor([1, 1, 1, 2]),
        num_classes=2,
        gt_index=torch.tensor([7, 7, 9]),
    )
    loss(samples)
    expected = 0.81 * 0.01 + 0.19 * (3 / 8 + 1 / 3) / 2
    assert loss.mean_score.tolist() == pytest.approx([0.01, expected, 0.01], rel=1e-6)


def test_without_ids_every_row_is_an_object():
    samples = batch(1)
    labels = samples.labels[samples.pos]
    scores = torch.rand(len(labels), dtype=torch.float64)
    none = object_score_sums(scores, labels, None, K)
    each = object_score_sums(scores, labels, torch.arange(len(labels)), K)
    assert torch.equal(none, each)
    assert none[0].tolist() == [int((labels == c).sum()) for c in range(K)]


def test_rows_with_negative_ids_train_and_are_not_counted():
    full = batch(2)
    ids = full.gt_index.clone()
    ids[::2] = -1 - torch.arange(len(ids[::2]))
    mixed = Samples(logits=full.logits, labels=full.labels, num_classes=K, gt_index=ids)
    kept = ids >= 0
    rows = torch.cat([full.pos[kept], (full.labels == K).nonzero().flatten()])
    rest = Samples(
        logits=full.logits[rows], labels=full.labels[rows], num_classes=K, gt_index=ids[kept]
    )
    first, second = LOCELoss(num_classes=K), LOCELoss(num_classes=K)
    assert (first(mixed) > 0).sum() == len(full.labels)
    second(rest)
    torch.testing.assert_close(first.mean_score, second.mean_score, rtol=1e-12, atol=0)


def test_absent_classes_keep_their_score():
    loss = LOCELoss(num_classes=K)
    samples = Samples(logits=torch.zeros(2, K + 1), labels=torch.tensor([2, K]), num_classes=K)
    loss(samples)
    before = [0.01] * K + [0.01]
    before[2] = 0.9 * 0.01 + 0.1 * 0.2
    assert loss.mean_score.tolist() == pytest.approx(before)


@pytest.mark.parametrize("least", [0.01, 0.0])
def test_finite_where_probabilities_underflow(least):
    # s e^z / sum underflows to 0 in float32 at a difference of 120
    logits = torch.tensor([[120.0, 0.0, 0.0]], requires_grad=True)
    s = torch.tensor([0.5, least, 0.01], dtype=torch.float64)
    value = equilibrium_loss(logits, torch.tensor([1]), s)
    value.sum().backward()
    expected = 120 + math.log(0.5 / max(least, 1e-12))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


def test_scores_at_test_are_the_plain_softmax():
    loss = LOCELoss(num_classes=K)
    loss(batch(3))
    logits = torch.randn(5, K + 1)
    assert torch.equal(loss.probabilities(logits), logits.softmax(dim=1))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"momentum": 1.5}, "momentum"),
        ({"background_score": 0.0}, "background_score"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"LOCE: {name} is .*; must be"):
        LOCELoss(**{"num_classes": 3, **arguments})
