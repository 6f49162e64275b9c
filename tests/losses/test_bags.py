"""Balanced group softmax: groups, the loss against the paper's sums, the drawing, the scores."""

import copy
import math
import pickle

import pytest
import torch

from d2_balance.losses import BAGSLoss, Samples
from d2_balance.losses.bags import sample_others

COUNTS = [5000, 9, 10, 99, 100, 999, 1000, 0]  # groups 3, 0, 1, 1, 2, 2, 3, 0
K, GROUPS = len(COUNTS), 4
ALL = 1e9  # beta that takes all others


def slow_loss(logits, labels, groups, num_classes):
    """Softmax by softmax, row by row, with every "others" row; `groups` are lists of classes."""
    total = 0.0
    n = len(groups)
    for g, classes in enumerate(groups):
        columns = [*classes, num_classes + g]
        if not any(int(label) in classes for label in labels):
            continue
        losses = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            wanted = row[label] if label in classes else row[num_classes + g]
            losses.append(math.log(sum(math.exp(row[c]) for c in columns)) - wanted)
        total += sum(losses) / len(losses)
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        pair = row[num_classes + n :]
        wanted = pair[0] if label < num_classes else pair[1]
        losses.append(math.log(sum(math.exp(z) for z in pair)) - wanted)
    return total + sum(losses) / len(losses)


GROUP_LISTS = [[1, 7], [2, 3], [4, 5], [0, 6]]


def batch(labels, columns=K + GROUPS + 2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(labels), columns, generator=generator, dtype=torch.float64) * 2
    return Samples(logits=logits.requires_grad_(), labels=torch.tensor(labels), num_classes=K)


def test_a_class_at_a_cut_belongs_to_the_group_above_it():
    loss = BAGSLoss(instance_count=COUNTS)
    assert loss.group.tolist() == [3, 0, 1, 1, 2, 2, 3, 0]
    assert loss.num_outputs(K) == K + 4 + 2
    # own classes and "others"; the last group has object and background
    members = [row.nonzero().flatten().tolist() for row in loss.member]
    assert members == [[1, 7, 8], [2, 3, 9], [4, 5, 10], [0, 6, 11], [12, 13]]


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8],
        [0, 0, 6, 8, 8, 8, 8],  # one group only
        [8, 8, 8],  # background only
        [2],
    ],
)
def test_loss_equals_the_sum_of_softmaxes(labels):
    samples = batch(labels)
    value = BAGSLoss(instance_count=COUNTS, beta=ALL)(samples)
    expected = slow_loss(samples.logits.detach(), samples.labels, GROUP_LISTS, K)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_without_others_only_the_groups_own_rows_count():
    # logits of 0: a group with n classes costs log(n + 1) per own row, object/background log 2
    labels = [1, 2, 2, 8, 8]
    logits = torch.zeros(5, K + 6)
    rows = Samples(logits=logits, labels=torch.tensor(labels), num_classes=K)
    expected = math.log(3) + math.log(3) + math.log(2)
    assert BAGSLoss(instance_count=COUNTS, beta=0.0)(rows).item() == pytest.approx(expected)
    # raise "others" of group 0 by 1: only the one row of class 1 sees it, log(2 + e) for log 3
    logits[:, K] = 1.0
    expected += math.log(2 + math.e) - math.log(3)
    assert BAGSLoss(instance_count=COUNTS, beta=0.0)(rows).item() == pytest.approx(expected)


def test_groups_without_a_positive_row_get_no_gradient():
    samples = batch([2, 3, 8, 8])
    BAGSLoss(instance_count=COUNTS)(samples).backward()
    touched = samples.logits.grad.abs().sum(dim=0) > 0
    assert touched.nonzero().flatten().tolist() == [2, 3, 9, 12, 13]


def test_empty_groups_are_allowed():
    loss = BAGSLoss(instance_count=[50, 60], cuts=(10, 100, 1000))  # groups 0, 2 and 3 are empty
    logits = torch.randn(6, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    rows = Samples(logits=logits, labels=labels, num_classes=2)
    loss.beta = ALL
    expected = slow_loss(logits, labels, [[], [0, 1], [], []], 2)
    assert loss(rows).item() == pytest.approx(expected, rel=1e-12)


def test_other_cuts_give_other_groups():
    loss = BAGSLoss(instance_count=COUNTS, cuts=(100,))
    assert loss.group.tolist() == [1, 0, 0, 0, 1, 1, 1, 0]
    assert loss.num_outputs(K) == K + 2 + 2


def test_no_cut_is_one_softmax_and_objectness():
    samples = batch([0, 3, 8, 8], columns=K + 1 + 2)
    value = BAGSLoss(instance_count=COUNTS, cuts=(), beta=ALL)(samples)
    logits = samples.logits.detach()
    # "others" stands where a plain softmax has background
    ce = torch.nn.functional.cross_entropy(logits[:, : K + 1], samples.labels)
    two = torch.nn.functional.cross_entropy(logits[:, K + 1 :], (samples.labels == K).long())
    assert value.item() == pytest.approx((ce + two).item(), rel=1e-12)


def test_number_of_drawn_rows_is_beta_per_positive():
    inside = torch.zeros(100, 3, dtype=torch.bool)
    inside[:4, 0] = True  # 4 rows: 32 others
    inside[10:30, 1] = True  # 20 rows: 160 others, of 80 there are
    used = sample_others(inside, 8.0)  # group 2 has no row: no others
    assert used.sum(dim=0).tolist() == [36, 100, 0]
    assert (used >= inside).all()
    assert sample_others(inside, 0.6).sum(dim=0).tolist() == [4 + 2, 20 + 12, 0]  # rounded down


def test_others_are_drawn_evenly_and_anew():
    inside = torch.zeros(11, 1, dtype=torch.bool)
    inside[3] = True
    counts = sum(sample_others(inside, 4.0).double() for _ in range(4000)).flatten()
    assert counts[3] == 4000
    share = torch.cat([counts[:3], counts[4:]]) / 4000
    # 4 of 10: mean .4, standard deviation sqrt(.24 / 4000) = .0077
    assert (share - 0.4).abs().max() < 5 * 0.0077
    # pairs are drawn independently of place: rows 0 and 1 together with probability 4/10 * 3/9
    both = sum(bool(sample_others(inside, 4.0)[:2].all()) for _ in range(4000)) / 4000
    assert both == pytest.approx(2 / 15, abs=5 * math.sqrt(2 / 15 * 13 / 15 / 4000))


def test_each_group_draws_its_own_rows():
    inside = torch.zeros(200, 2, dtype=torch.bool)
    inside[0] = True
    used = sample_others(inside, 50.0)
    assert used.sum(dim=0).tolist() == [51, 51]
    assert not torch.equal(used[:, 0], used[:, 1])


def test_loss_over_drawn_others_is_the_full_loss_on_average():
    labels = [1, 2] + [8] * 18
    samples = batch(labels, seed=3)
    # group 0 and 1 have 1 positive and 19 others each; with beta = 4 the mean over 1 + 4 rows has
    # expectation (positive + 4 * mean of others) / 5
    logits = samples.logits.detach()
    expected = slow_loss(logits, samples.labels, [[], [], [], []], K)
    for g, (own, classes) in enumerate([(0, [1, 7]), (1, [2, 3])]):
        columns = logits[:, [*classes, K + g]]
        rows = columns.logsumexp(dim=1) - columns[:, -1]
        rows[own] = columns[own].logsumexp(dim=0) - logits[own, labels[own]]
        others = (rows.sum() - rows[own]) / 19
        expected += ((rows[own] + 4 * others) / 5).item()
    loss = BAGSLoss(instance_count=COUNTS, beta=4.0)
    values = torch.stack([loss(samples).detach() for _ in range(1500)])
    assert values.mean().item() == pytest.approx(
        expected, abs=5 * values.std().item() / math.sqrt(1500)
    )
    assert values.std() > 0


def test_scores_are_group_softmaxes_times_objectness():
    loss = BAGSLoss(instance_count=COUNTS)
    logits = torch.zeros(1, K + 6)
    logits[0, -2:] = torch.tensor([math.log(3.0), 0.0])  # object 3/4, background 1/4
    logits[0, 1] = math.log(2.0)  # group 0: class 1, class 7, others = 2 : 1 : 1
    probs = loss.probabilities(logits)
    third = 0.75 / 3
    expected = [third, 0.75 / 2, third, third, third, third, third, 0.75 / 4, 0.25]
    assert probs.tolist() == [pytest.approx(expected)]
    assert probs.sum() > 1  # classes of different groups do not compete


def test_scores_stay_in_range_at_extreme_logits():
    loss = BAGSLoss(instance_count=COUNTS)
    logits = torch.randn(200, K + 6, generator=torch.Generator().manual_seed(0)) * 1000
    probs = loss.probabilities(logits)
    assert probs.isfinite().all() and probs.min() >= 0 and probs.max() <= 1


def test_groups_come_with_the_weights():
    trained = BAGSLoss(instance_count=COUNTS)
    other = BAGSLoss(instance_count=[0] * K)  # as for inference, where counts are in the checkpoint
    other.load_state_dict(trained.state_dict())
    logits = torch.randn(5, K + 6)
    assert torch.equal(other.probabilities(logits), trained.probabilities(logits))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"instance_count": [1, -1]}, "instance_count"),
        ({"cuts": (10, 10)}, "cuts"),
        ({"cuts": (0, 10)}, "cuts"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"BAGS: {name} is .*; must be"):
        BAGSLoss(**{"instance_count": [1, 2], **arguments})


def test_copies_have_groups_of_their_own():
    """A copied and a saved loss load other groups; the first keeps its own."""
    first, other = BAGSLoss(instance_count=[5, 50, 5000]), BAGSLoss(instance_count=[500, 5, 5])
    logits = torch.randn(4, 3 + 4 + 2, generator=torch.Generator().manual_seed(0))
    before = first.probabilities(logits)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(copied.probabilities(logits), before)
        copied.load_state_dict(other.state_dict())
        assert torch.equal(copied.probabilities(logits), other.probabilities(logits))
        assert torch.equal(first.probabilities(logits), before)
