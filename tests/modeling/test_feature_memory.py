"""LOCE's feature memory: queues and sampling."""

from collections import deque

import pytest
import torch

from d2_balance.losses import Samples
from d2_balance.modeling.roi_heads.feature_memory import FeatureMemory, UsedSampleNormalizer


def memory(num_classes=3, length=4, **arguments):
    return FeatureMemory(
        num_classes=num_classes, feature_shape=(1, 1, 1), capacity=num_classes * length, **arguments
    )


def entries(queues):
    """The entries of each class, oldest first, as the numbers that were pushed."""
    queued = []
    for c, (count, pointer) in enumerate(
        zip(queues.count.tolist(), queues.pointer.tolist(), strict=True)
    ):
        own = queues.features[c * queues.length : (c + 1) * queues.length].flatten().tolist()
        first = pointer if count == queues.length else 0
        queued.append([own[(first + i) % queues.length] for i in range(count)])
    return queued


def test_queues_equal_deques_over_many_pushes():
    queues, expected = memory(), [deque(maxlen=4) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    number = 0
    for _ in range(60):
        # up to eleven samples, of which often more than four are of one class
        count = int(torch.randint(0, 12, (), generator=generator))
        labels = torch.randint(0, 3, (count,), generator=generator)
        numbers = torch.arange(number, number + len(labels))
        number += len(labels)
        queues.push(numbers.float().view(-1, 1, 1, 1), labels)
        for value, label in zip(numbers.tolist(), labels.tolist(), strict=True):
            expected[label].append(float(value))
        assert entries(queues) == [list(queue) for queue in expected]
    assert queues.features.shape == (3 * 4 + 1, 1, 1, 1)
    assert queues.features[-1] == 0


def test_more_entries_than_a_queue_holds_leave_the_last_ones():
    queues = memory(num_classes=2, length=3)
    queues.push(torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]))
    assert entries(queues) == [[5.0, 6.0, 7.0], [3.0]]


def test_no_place_is_written_twice():
    queues = memory(num_classes=2, length=3)
    queues.push(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    slots = queues.slots(labels, torch.tensor([7, 1])).tolist()
    # class 0 goes on at slot 1: rank 4, 5, 6 to (1 + rank) % 3 = 2, 0, 1; class 1 to 3 + 1
    assert slots == [6, 6, 6, 4, 6, 2, 0, 1]


@pytest.mark.parametrize(
    ("classes", "capacity", "per_class", "length"),
    [(1203, 4096, 80, 3), (6, 4096, 80, 80), (6, 100, 80, 16), (6, 6, 80, 1), (6, 4096, 2, 2)],
)
def test_size_is_bounded_by_capacity_and_by_class(classes, capacity, per_class, length):
    queues = FeatureMemory(
        num_classes=classes, feature_shape=(2, 1, 1), capacity=capacity, per_class=per_class
    )
    assert queues.length == length and len(queues.features) == classes * length + 1
    assert queues.features.dtype == torch.float16


def test_values_beyond_half_precision_stay_finite():
    queues = memory()
    queues.push(torch.full((1, 1, 1, 1), 1e6), torch.tensor([1]))
    assert entries(queues) == [[], [65504.0], []]


def test_an_empty_memory_gives_samples_of_weight_zero():
    features, labels, weight = memory(features_per_class=4).sample(torch.full((3,), 0.01))
    assert features.shape == (12, 1, 1, 1) and (features == 0).all()
    assert (weight == 0).all() and labels.unique().tolist() == [0, 1, 2]


def test_sampled_entries_are_those_of_their_class():
    queues = memory(num_classes=4, length=5, classes_per_step=3, features_per_class=6)
    values = torch.tensor([10.0, 11, 12, 20, 21, 30])
    queues.push(values.view(-1, 1, 1, 1), (values // 10).long())
    seen = set()
    for _ in range(50):
        features, labels, weight = queues.sample(torch.full((4,), 0.01))
        assert (weight == 1).all()
        assert sorted(labels.tolist()) == [1] * 6 + [2] * 6 + [3] * 6  # class 0 has none
        assert (features.flatten() // 10 == labels).all()
        seen |= set(features.flatten().tolist())
    assert seen == set(values.tolist())


def test_classes_are_sampled_by_one_over_their_mean_score():
    queues = memory(num_classes=3, length=1, classes_per_step=1, features_per_class=1)
    queues.push(torch.ones(3, 1, 1, 1), torch.arange(3))
    score = torch.tensor([0.1, 0.2, 0.4])  # 1 / s = 10, 5, 2.5: fractions 4/7, 2/7, 1/7
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[queues.sample(score)[1]] += 1
    expected = torch.tensor([4 / 7, 2 / 7, 1 / 7])
    # standard deviation at most sqrt(.25 / 4000) = .008
    assert (counts / 4000 - expected).abs().max() < 5 * 0.008


def test_samples_of_weight_zero_are_not_counted():
    samples = Samples(
        logits=torch.zeros(3, 2),
        labels=torch.tensor([0, 1, 1]),
        num_classes=1,
        sample_weight=torch.tensor([1.0, 0.5, 0.0]),
    )
    assert UsedSampleNormalizer().count(samples) == 2
