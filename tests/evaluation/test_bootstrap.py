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

SIMULATED = int(os.environ.get("D2_BALANCE_COVERAGE", "20"))


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


class Sampled:
    """A run on images that are sampled from a population."""

    def __init__(self, population, images):
        self.population, self.images = population, images

    def average_precision(self, weights):
        total = self.population.num_images
        return self.population.average_precision(np.bincount(self.images, weights, total))


POPULATION, SAMPLE = 500, 120  # images


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """Two runs on the same images, the second's on images of their own, and what they reach."""
    rng = np.random.default_rng(0)
    images, annotations, found = [], [], []
    for number in range(POPULATION):
        for run, (recall, shift) in enumerate(((0.6, 4.0), (0.75, 3.0))):
            image = 1 + number + run * POPULATION
            images.append({"id": image, "width": 200, "height": 200})
            objects = np.random.default_rng(number)
            for corner in objects.uniform(0, 150, (objects.integers(1, 4), 2)):
                category = int(objects.integers(1, 4))
                box = [*corner.tolist(), 40.0, 40.0]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": category,
                        "bbox": box,
                        "area": 1600.0,
                        "iscrowd": 0,
                    }
                )
                if rng.random() < recall:
                    moved = [*(corner + rng.normal(0, shift, 2)).tolist(), 40.0, 40.0]
                    found.append((image, category, moved, rng.beta(4, 2)))
            for corner in rng.uniform(0, 150, (2, 2)):
                box = [*corner.tolist(), 40.0, 40.0]
                found.append((image, int(rng.integers(1, 4)), box, rng.beta(2, 4)))
    keys = ("image_id", "category_id", "bbox", "score")
    dataset = {
        "images": sorted(images, key=lambda image: image["id"]),
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class{k}"} for k in (1, 2, 3)],
    }
    detections = [dict(zip(keys, detection, strict=True)) for detection in found]
    matcher = matcher_of(tmp_path_factory.mktemp("population"), dataset, detections, lvis=False)
    return bootstrap.Resampled(matcher)


def share_of(verdicts):
    """Fraction, and four standard errors of 95 % with so many trials."""
    wide = 4 * (0.95 * 0.05 / len(verdicts)) ** 0.5
    print(f"{np.mean(verdicts):.4f} of {len(verdicts)}")
    return np.mean(verdicts), max(wide, 0.02)


def compared(first, second, size, rng):
    zeros = np.zeros(size, dtype=int)
    result = bootstrap.compare(
        first, second, ["f"] * 3, ["a", "b", "c"], zeros, 300, int(rng.integers(10**6))
    )
    return result.metrics["AP"]


def test_intervals_cover_the_difference_of_two_populations(population):
    every = np.arange(POPULATION)
    ones = np.ones(POPULATION)
    reached = [
        bootstrap.figures(
            Sampled(population, every + run * POPULATION).average_precision(ones), ["f"] * 3
        )[0]
        for run in (0, 1)
    ]
    truth, rng, covered = reached[1] - reached[0], np.random.default_rng(1), []
    assert 5 < truth < 30
    for _ in range(SIMULATED):
        images = rng.integers(0, POPULATION, SAMPLE)
        runs = [Sampled(population, images + run * POPULATION) for run in (0, 1)]
        found = compared(runs[:1], runs[1:], SAMPLE, rng)
        covered.append(found.low <= truth <= found.high)
    reached, wide = share_of(covered)
    assert abs(reached - 0.95) < wide


def test_runs_that_differ_in_nothing_are_within_noise(population):
    """Which of two runs an image is taken from is left to chance: there is no difference."""
    rng, verdicts = np.random.default_rng(2), []
    for _ in range(SIMULATED):
        images = rng.integers(0, POPULATION, SAMPLE)
        coin = rng.integers(0, 2, SAMPLE)
        runs = [Sampled(population, images + side * POPULATION) for side in (coin, 1 - coin)]
        verdicts.append(compared(runs[:1], runs[1:], SAMPLE, rng).verdict == bootstrap.NOISE)
    reached, wide = share_of(verdicts)
    assert reached > 0.95 - wide


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_over_seeds_cover_the_difference(seeds):
    """A known difference of 2 AP; training moves each run by one AP, images by less."""
    covered, rng = [], np.random.default_rng(seeds)
    for _ in range(4 * SIMULATED):
        common = rng.normal(0.4, 0.2, 100)
        groups = [
            [
                Simulated(common + gain + rng.normal(0, 0.01) + rng.normal(0, 0.05, 100))
                for _ in range(seeds)
            ]
            for gain in (0.0, 0.02)
        ]
        found = bootstrap.compare(*groups, ["f"], ["a"], np.zeros(100, dtype=int), 100)
        covered.append(found.metrics["AP"].low <= 2 <= found.metrics["AP"].high)
    reached, wide = share_of(covered)
    assert reached > 0.95 - wide


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
