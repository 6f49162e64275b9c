"""Thresholds of loss and sampler by hand, and against Detectron2's sampler."""

import math

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler

from d2_balance.analysis.tail import (
    common_border,
    repeat_factors,
    suggested_tail,
    suggested_threshold,
)
from d2_balance.data import ClassCounts


def suggest(table, cuts):
    statistics = table.statistics()
    border = common_border(statistics, statistics.group(cuts), cuts)
    return border, suggested_threshold(table, statistics, border)


def test_repeat_factors_by_hand(table):
    found = repeat_factors(table([[0]] * 9 + [[0, 1]]), 0.4)
    # f = 1 and 0.1: r = 1 and sqrt(0.4 / 0.1) = 2; the tenth image comes twice
    assert found.factor.tolist() == pytest.approx([1, 2])
    assert found.epoch == pytest.approx(11 / 10)
    assert found.shown.tolist() == pytest.approx([11, 2])
    assert found.repeated == 1


@pytest.mark.parametrize("threshold", [0.001, 0.03, 0.2, 1.0])
def test_repeat_factors_equal_the_samplers(random_table, threshold):
    records = [{"annotations": []} for _ in random_table.sizes]
    for image, label in zip(random_table.image, random_table.label, strict=True):
        records[image]["annotations"].append({"category_id": int(label)})
    records = [r for r in records if r["annotations"]]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, threshold)
    found = repeat_factors(random_table, threshold)
    assert found.epoch == pytest.approx(float(factors.mean()))
    shown = np.zeros(12)
    for record, factor in zip(records, factors.tolist(), strict=True):
        for label in {a["category_id"] for a in record["annotations"]}:
            shown[label] += factor
    assert found.shown.tolist() == pytest.approx(shown.tolist(), rel=1e-5)


def test_crowds_count_for_repeating_and_empty_images_for_the_denominator(table):
    found = table([[0], [0], [0], [1, 0], []])
    found.crowd[found.label == 1] = True
    kept = repeat_factors(found, 0.5)
    assert kept.factor.tolist() == pytest.approx([1, math.sqrt(0.5 * 4)])  # f(1) = 1 / 4
    whole = repeat_factors(found, 0.5, filter_empty=False)
    assert whole.factor.tolist() == pytest.approx([1, math.sqrt(0.5 * 5)])  # f(1) = 1 / 5
    assert whole.epoch == pytest.approx((4 + math.sqrt(2.5)) / 5)  # an empty one comes once


def test_threshold_is_the_border_of_common_classes(table):
    border, found = suggest(table([[0]] * 9 + [[0, 1]]), (1, 4))
    assert border == found.threshold == pytest.approx(4 / 10)


def test_threshold_falls_where_an_epoch_would_grow_too_long(table):
    # images: 3 of class 0, 3 of class 1, 1 of class 2, 3 of class 3 in all; border 1:
    # (3 sqrt(1 / .3) * 3 + sqrt(1 / .1)) / 10 = 1.96; next .3: (9 + sqrt(.3 / .1)) / 10 = 1.07
    border, found = suggest(table([[0]] * 3 + [[1]] * 3 + [[2]] + [[3]] * 3), (5, 100))
    assert border == 1
    assert found.threshold == pytest.approx(0.3)
    assert found.epoch == pytest.approx((9 + math.sqrt(3)) / 10)
    assert found.repeated == 1


def test_no_threshold_where_every_class_is_frequent(table):
    _border, found = suggest(table([[0, 1]] * 10), (1, 4))
    assert found is None


def test_border_follows_the_groups_of_the_file():
    count = torch.tensor([2, 7, 40])
    statistics = ClassCounts(count, count, 50, tuple("abc"), tuple("rcf"))
    assert common_border(statistics, statistics.group(), None) == pytest.approx(7 / 50)
    assert common_border(statistics, statistics.group((1, 3)), (1, 3)) == pytest.approx(3 / 50)


def test_lambda_by_hand():
    count = torch.tensor([50, 2, 30, 8, 8, 2])  # sum 100
    found = suggested_tail(ClassCounts(count, count, 200, tuple("abcdef")))
    # 4 % for the two of 2 images, 20 % with those of 8: half-way between 2 / 200 and 8 / 200
    assert found.lambda_ == pytest.approx(5 / 200)
    assert (found.classes, found.ratio) == (2, pytest.approx(0.04))


def test_lambda_takes_up_to_ten_percent_where_six_is_too_little():
    count = torch.tensor([92, 8])
    found = suggested_tail(ClassCounts(count, count, 100, ("a", "b")))
    assert found.lambda_ == pytest.approx((0.08 + 0.92) / 2) and found.ratio == pytest.approx(0.08)


def test_no_lambda_without_a_tail():
    count = torch.tensor([60, 40])
    assert suggested_tail(ClassCounts(count, count, 100, ("a", "b"))) is None
