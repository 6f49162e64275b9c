"""Resamples equal an evaluation from scratch, and intervals hold what they promise."""

import json
import os

import numpy as np
import pytest

from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation import bootstrap
from d2_balance.evaluation.matching import (
    RECALLS,
    GroundTruth,
    Matcher,
    _recalls_reached,
    select,
)
from d2_balance.evaluation.predictions import read_predictions

from .small_sets import small_dataset, small_detections

SIMULATED = int(os.environ.get("D2_BALANCE_COVERAGE", "60"))


def matcher_of(directory, dataset, detections, lvis, task="bbox"):
    (directory / "truth.json").write_text(json.dumps(dataset))
    (directory / "found.json").write_text(json.dumps(detections))
    truth = load_annotations(str(directory / "truth.json"), style="lvis" if lvis else "coco")
    ground = GroundTruth(truth, task)
    return Matcher(
        ground, select(ground, read_predictions(str(directory / "found.json"), truth), 300)
    )


def repeated(dataset, detections, weights):
    """The dataset in which each image stands as often as its weight says, under ids of its own."""
    order = sorted(dataset["images"], key=lambda image: image["id"])
    images, annotations, found = [], [], []
    for image, weight in zip(order, weights.astype(int).tolist(), strict=True):
        for _ in range(weight):
            number = len(images) + 1
            images.append(image | {"id": number})
            own = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
            for ann in own:
                annotations.append(ann | {"id": len(annotations) + 1, "image_id": number})
            found += [d | {"image_id": number} for d in detections if d["image_id"] == image["id"]]
    return {**dataset, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("lvis", [False, True])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_resample_equals_an_evaluation_from_scratch(tmp_path, lvis, task):
    compared = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        dataset = small_dataset(rng, lvis)
        detections = small_detections(rng, dataset)
        if not detections:
            continue
        # copies of tied detections would stand in another order
        scores = rng.permutation(len(detections)) / len(detections)
        for detection, score in zip(detections, scores.tolist(), strict=True):
            detection["score"] = score
        matcher = matcher_of(tmp_path, dataset, detections, lvis, task)
        resampled = bootstrap.Resampled(matcher)
        for weights in bootstrap.resamples(np.zeros(matcher.truth.num_images), 4, seed):
            again = matcher_of(tmp_path, *repeated(dataset, detections, weights), lvis, task)
            expected = again.table().values[..., 0]
            ours = resampled.average_precision(weights)
            np.testing.assert_allclose(ours, expected, atol=1e-9, err_msg=f"seed {seed}")
            compared += 1
    assert compared > 50


def test_a_group_never_loses_all_its_classes(tmp_path):
    rng = np.random.default_rng(3)
    dataset = small_dataset(rng, lvis=True)
    while len(dataset["categories"]) < 3 or len(dataset["annotations"]) < 6:
        dataset = small_dataset(rng, lvis=True)
    matcher = matcher_of(tmp_path, dataset, small_detections(rng, dataset), True)
    objects = matcher.truth.instances()
    groups = ["r", "c", "f", "f"][: len(objects)]
    strata = bootstrap.strata_of(matcher, groups)
    present = {g for g, n in zip(groups, objects, strict=True) if n}
    own = {n: set() for n in range(matcher.truth.num_images)}
    for image, category, counts in zip(
        matcher.truth.image, matcher.truth.category, matcher.truth.counts, strict=True
    ):
        if counts:
            own[int(image)].add(groups[category])
    for weights in bootstrap.resamples(strata, 200):
        assert weights.sum() == len(strata)
        drawn = set().union(*(own[n] for n in np.flatnonzero(weights).tolist()))
        assert drawn == present


class Simulated:
    """A run whose AP of an image is drawn; the metric is its mean over images."""

    def __init__(self, values):
        self.values = values

    def average_precision(self, weights):
        return np.full((2, 1), (self.values * weights).sum() / weights.sum())


def test_intervals_cover_the_truth_as_often_as_they_say():
    """A known difference of 2 AP, images that are easy or hard for both runs alike."""
    covered, rng = 0, np.random.default_rng(0)
    for _ in range(SIMULATED):
        common = rng.normal(0.4, 0.2, 150)
        first = Simulated(common + rng.normal(0, 0.1, 150))
        second = Simulated(common + 0.02 + rng.normal(0, 0.1, 150))
        strata = np.zeros(150, dtype=int)
        result = bootstrap.compare(
            [first], [second], ["f"], ["a"], strata, 300, int(rng.integers(99))
        )
        low, high = result.metrics["AP"].low, result.metrics["AP"].high
        covered += low <= 2 <= high
    # four standard errors around 95 %
    assert abs(covered / SIMULATED - 0.95) < max(4 * (0.95 * 0.05 / SIMULATED) ** 0.5, 0.02)


def test_equal_runs_are_within_noise_and_clear_ones_are_not(tmp_path):
    values = np.random.default_rng(1).uniform(0.2, 0.8, 80)
    strata = np.zeros(80, dtype=int)

    def verdict(first, second):
        result = bootstrap.compare([first], [second], ["r"], ["a"], strata, 200)
        return result.metrics["APr"].verdict, result.classes["a"].verdict

    assert verdict(Simulated(values), Simulated(values)) == ("within noise",) * 2
    assert verdict(Simulated(values), Simulated(values + 0.1)) == ("better",) * 2
    assert verdict(Simulated(values), Simulated(values - 0.1)) == ("worse",) * 2


def test_seeds_widen_an_interval():
    values = np.full(50, 0.5)
    strata = np.zeros(50, dtype=int)
    first = [Simulated(values + shift) for shift in (-0.02, 0.0, 0.02)]
    second = [Simulated(values + 0.01 + shift) for shift in (-0.02, 0.0, 0.02)]
    found = bootstrap.compare(first, second, ["f"], ["a"], strata, 50).metrics["AP"]
    # sd 2, standard error sqrt(4 / 3 + 4 / 3); images do not differ
    assert found.value == pytest.approx(1) and found.images == pytest.approx(0, abs=1e-9)
    assert found.training == pytest.approx((8 / 3) ** 0.5)
    # Student's 97.5 % quantile with Welch's 4 degrees of freedom
    assert found.high - found.value == pytest.approx(2.776445 * (8 / 3) ** 0.5)
    assert found.verdict == "within noise"
    alone = bootstrap.compare(first[:1], second[:1], ["f"], ["a"], strata, 50).metrics["AP"]
    assert np.isnan(alone.training)
    summary = bootstrap.seeds_summary([{"AP": 10.0}, {"AP": 12.0}])
    assert summary == {"AP": (11, pytest.approx(2**0.5), 2)}


def test_recalls_that_are_reached_are_those_of_a_search():
    counts = np.arange(1, 300)
    recall = np.concatenate([np.arange(n + 1) / n for n in counts])
    expected = np.searchsorted(RECALLS, recall, side="right")
    assert (_recalls_reached(recall) == expected).all()
