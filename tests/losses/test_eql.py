"""EQL: weights by hand, image-level labels, threshold functions, LVIS magnitudes."""

import math

import pytest
import torch
from detectron2.data.datasets.lvis import get_lvis_instances_meta

from d2_balance.losses import EQLLoss, Samples, SigmoidCELoss
from d2_balance.losses.eql import tail_ratio, tail_weight

FREQUENCY = [0.5, 0.001, 0.0001]  # class 0 frequent, 1 and 2 tail at lambda 0.00177


def weights(loss, labels, **fields):
    """w_ij, read off the loss at logits of zero, where every entry's cross-entropy is log 2."""
    labels = torch.tensor(labels)
    logits = torch.zeros(len(labels), 3, dtype=torch.float64)
    value = loss(Samples(logits=logits, labels=labels, num_classes=3, **fields))
    return (value / math.log(2)).round(decimals=9).tolist()


def test_foreground_rows_do_not_suppress_tail_classes():
    loss = EQLLoss(class_frequency=FREQUENCY)
    # row of class 0: tail classes free; row of class 1: its own column and the frequent one count;
    # background: all count
    assert weights(loss, [0, 1, 3]) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_classes_verified_in_the_image_keep_their_weight():
    verified = torch.tensor([[False, True, False], [False, False, False]])
    fields = {"verified": verified, "image_index": torch.tensor([0, 1])}
    loss = EQLLoss(class_frequency=FREQUENCY)
    assert weights(loss, [0, 0], **fields) == [[1, 1, 0], [1, 0, 0]]
    off = EQLLoss(class_frequency=FREQUENCY, use_image_level_labels=False)
    assert weights(off, [0, 0], **fields) == [[1, 0, 0], [1, 0, 0]]


def test_smooth_thresholds_scale_the_weight():
    # exponential: T(.001) = 1 - (400 * .001)^2 = .84, T(.0001) = 1 - .0016 = .9984, T(.5) = 0
    loss = EQLLoss(class_frequency=FREQUENCY, threshold="exponential")
    assert weights(loss, [0])[0] == pytest.approx([1, 0.16, 0.0016], abs=1e-6)


@pytest.mark.parametrize("threshold", ["step", "exponential", "gompertz"])
def test_thresholds_fall_from_one_to_zero(threshold):
    f = torch.logspace(-6, 0, 200, dtype=torch.float64)
    tail = tail_weight(f, 0.00177, threshold)
    assert ((tail >= 0) & (tail <= 1)).all()
    assert (tail.diff() <= 0).all() and tail[0] > 0.99 and tail[-1] == 0


def test_gompertz_by_hand():
    # f = .001: exp(-3) = .049787; 80 * .049787 = 3.98297; exp(-3.98297) = .018631; T = .981369
    value = tail_weight(torch.tensor([0.001]).double(), 0.0, "gompertz")
    assert value.item() == pytest.approx(0.981369, abs=1e-6)


def test_threshold_is_strict():
    assert tail_weight(torch.tensor([0.01]), 0.01, "step").item() == 0


def test_tail_ratio_by_hand():
    # classes of 10, 30 and 60 images, the first two tail: 40 / 100
    assert tail_ratio(torch.tensor([1.0, 1, 0]), torch.tensor([10, 30, 60])) == pytest.approx(0.4)
    # half-way threshold on the second: (10 + 15) / 100
    assert tail_ratio(torch.tensor([1, 0.5, 0]), torch.tensor([10, 30, 60])) == pytest.approx(0.25)


def test_tail_of_lvis_v1_is_as_published():
    # 99,388 training images have an annotation; the thresholds in use give 815 and 798 classes,
    # which hold 5.9 % and 5.4 % of the image labels
    counts = get_lvis_instances_meta("lvis_v1_train")["class_image_count"]
    count = torch.tensor([c["image_count"] for c in counts])
    for lambda_, classes, ratio in ((0.0011, 815, 0.059), (0.0010062, 798, 0.054)):
        tail = tail_weight(count / 99388, lambda_, "step")
        assert int(tail.sum()) == classes
        assert tail_ratio(tail, count).item() == pytest.approx(ratio, abs=0.0005)


def test_without_tail_classes_it_is_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    samples = Samples(
        logits=torch.randn(9, 3, generator=generator),
        labels=torch.tensor([0, 1, 2, 3, 3, 3, 0, 1, 2]),
        num_classes=3,
    )
    loss = EQLLoss(class_frequency=FREQUENCY, lambda_=0.0)
    assert torch.equal(loss(samples), SigmoidCELoss()(samples))


def test_first_loss_with_1203_classes_is_about_one():
    # sum of -log(1 - .001) over 1203 classes = 1.2 per background RoI; at a bias of 0 it is 834
    labels = torch.full((4,), 1203)
    prior = torch.full((4, 1203), -math.log(999.0))
    loss = EQLLoss(class_frequency=[0.1] * 1203)
    assert loss(Samples(logits=prior, labels=labels, num_classes=1203)).sum() / 4 == pytest.approx(
        1.2036, abs=1e-3
    )
    zero = torch.zeros(4, 1203)
    assert loss(Samples(logits=zero, labels=labels, num_classes=1203)).sum() / 4 == pytest.approx(
        833.9, abs=0.1
    )


def test_all_foreground_and_all_background():
    loss = EQLLoss(class_frequency=FREQUENCY)
    assert weights(loss, [0, 0]) == [[1, 0, 0], [1, 0, 0]]
    assert weights(loss, [3, 3]) == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"class_frequency": [0.5, 1.5]}, "class_frequency"),
        ({"class_frequency": [[0.5], [0.1]]}, "class_frequency"),
        ({"class_frequency": [0.5], "lambda_": -0.1}, "lambda_"),
        ({"class_frequency": [0.5], "lambda_": 1.1}, "lambda_"),
        ({"class_frequency": [0.5], "threshold": "hard"}, "threshold"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"EQL: {name} is .*; must be"):
        EQLLoss(**arguments)
