"""One truth: AP equals the official code, and everything in a report speaks of the same objects."""

import json
import os

import numpy as np
import pytest

from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation.diagnosis import diagnose
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.matching import GroundTruth, Matcher, Ranked, select
from d2_balance.evaluation.predictions import read_predictions

from .small_sets import box_mask, official, rle, small_dataset, small_detections, with_broken

# 2,000 and 5,000 once, few in CI
SEARCHED = int(os.environ.get("D2_BALANCE_SEARCH", "60"))
CHUNKS = 4
TASKS = ("bbox", "segm")


@pytest.fixture(autouse=True)
def numpy_float(monkeypatch):
    """lvis 0.5.3 uses an alias that numpy dropped in 1.24."""
    monkeypatch.setattr(np, "float", float, raising=False)


def read(directory, dataset, detections, lvis):
    truth_file, found_file = directory / "truth.json", directory / "found.json"
    truth_file.write_text(json.dumps(dataset))
    found_file.write_text(json.dumps(detections))
    truth = load_annotations(str(truth_file), style="lvis" if lvis else "coco")
    return truth, read_predictions(str(found_file), truth)


def seeds(chunk):
    return range(chunk * SEARCHED // CHUNKS, (chunk + 1) * SEARCHED // CHUNKS)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_precision_equals_the_official_code(tmp_path, chunk):
    compared = 0
    for seed in seeds(chunk):
        rng, lvis = np.random.default_rng(seed), bool(seed % 2)
        dataset = small_dataset(rng, lvis)
        detections = small_detections(rng, dataset)
        cap = int(rng.choice([1, 2, 3, 5, 300]))
        if lvis and not detections:
            continue  # the lvis package needs one
        truth, predictions = read(tmp_path, dataset, detections, lvis)
        assert truth.usable.all() and (truth.mask_problem < 0).all()
        for task in TASKS:
            ground = GroundTruth(truth, task)
            matcher = Matcher(ground, select(ground, predictions, cap))
            figures, precision = official(dataset, detections, task, lvis, cap)
            np.testing.assert_allclose(
                matcher.accumulated["precision"], precision, atol=1e-6, err_msg=f"seed {seed}"
            )
            # what is resampled and re-scored is the same AP
            own = Ranked(matcher).average_precision()
            np.testing.assert_allclose(own, matcher.table().values[..., 0], atol=1e-9)
            results = measure(truth, predictions, max_dets=cap, tasks=[task]).evaluation.results
            for metric, value in figures.items():
                if metric[2:] not in ("r", "c", "f") or lvis:
                    assert results[task][metric] == pytest.approx(value, abs=1e-6, nan_ok=True), (
                        seed,
                        metric,
                    )
            compared += 1
    assert compared > SEARCHED // CHUNKS


def perfect(dataset, lvis):
    """One detection of every object that has a box; LVIS knows none of area 0."""
    found = []
    for ann in dataset["annotations"]:
        if (ann["area"] > 0 or not lvis) and ann["bbox"][2] > 0:
            detection = {key: ann[key] for key in ("image_id", "category_id", "bbox")}
            mask = ann["segmentation"]
            if isinstance(mask, list):
                mask = rle(box_mask(ann["bbox"]))
            found.append(detection | {"score": 0.9, "segmentation": mask})
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_perfect_detections_have_no_error_of_any_type(tmp_path, task, chunk):
    for seed in seeds(chunk):
        rng, lvis = np.random.default_rng(10_000 + seed), bool(seed % 2)
        dataset = with_broken(rng, small_dataset(rng, lvis))
        seen = set()
        for ann in list(dataset["annotations"]):  # two objects in one place need not be told apart
            key = (ann["image_id"], ann["category_id"], *ann["bbox"])
            if key in seen:
                dataset["annotations"].remove(ann)
            seen.add(key)
        truth, predictions = read(tmp_path, dataset, perfect(dataset, lvis), lvis)
        result = measure(truth, predictions, tasks=[task] if len(predictions) else None)
        if not len(predictions):
            continue
        metrics = result.evaluation.results[task]
        report = diagnose(result.matchers[task], result.evaluation)
        objects = int(result.matchers[task].truth.instances().sum())
        if objects:
            assert metrics["AP"] == pytest.approx(100, abs=1e-9), seed
            assert min(min(curve.precision) for curve in report.curves.values()) > 1 - 1e-9
        assert all(error["count"] == 0 for error in report.errors.values()), (seed, report.errors)
        assert all(abs(error["AP50 lost"]) < 1e-9 for error in report.errors.values())
        assert report.objects == {"right": objects, "taken by an error": 0, "missed": 0}
        assert report.confusion.sum() == np.trace(report.confusion) == objects, seed


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_figure_speaks_of_the_same_objects_and_detections(tmp_path, task, chunk):
    for seed in seeds(chunk):
        rng, lvis = np.random.default_rng(20_000 + seed), bool(seed % 2)
        dataset = with_broken(rng, small_dataset(rng, lvis))
        detections = small_detections(rng, dataset)
        cap = int(rng.choice([2, 5, 300]))
        if not detections:
            continue
        truth, predictions = read(tmp_path, dataset, detections, lvis)
        result = measure(truth, predictions, tasks=[task], max_dets=cap)
        matcher = result.matchers[task]
        report = diagnose(matcher, result.evaluation, min_score=0.0)
        ap50 = result.evaluation.results[task]["AP50"]
        objects = int(matcher.truth.instances().sum())
        status, _ = matcher.matches(0.5)
        counted = int((status >= 0).sum())
        assert sum(report.objects.values()) == objects
        assert min(report.objects.values()) >= 0
        wrong = sum(e["count"] for name, e in report.errors.items() if name != "missed")
        assert report.objects["right"] + wrong == counted, seed
        assert report.confusion[:-1].sum() == objects
        assert report.confusion[:, :-1].sum() == counted
        assert np.trace(report.confusion[:-1, :-1]) == report.objects["right"]
        if counted:
            assert report.calibration["all"].detections == counted
            assert sum(b["count"] for b in report.calibration["all"].bins) == counted
        if objects:
            assert 100 * np.mean(report.curves["all"].precision) == pytest.approx(ap50, abs=1e-9)


def test_masks_that_are_asked_for_are_0_without_a_detection(tmp_path):
    dataset = small_dataset(np.random.default_rng(2), lvis=False)
    assert any(not ann["iscrowd"] for ann in dataset["annotations"])
    truth, predictions = read(tmp_path, dataset, [], False)
    results = measure(truth, predictions, tasks=["segm"]).evaluation.results
    assert list(results) == ["segm"] and results["segm"]["AP"] == 0


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_dropping_an_object_that_does_not_count_changes_no_figure(tmp_path, chunk):
    for seed in seeds(chunk):
        rng, lvis = np.random.default_rng(30_000 + seed), bool(seed % 2)
        dataset = small_dataset(rng, lvis)
        detections = small_detections(rng, dataset)
        dataset = with_broken(rng, dataset)
        figures = []
        for annotations in (
            dataset["annotations"],
            [a for a in dataset["annotations"] if a["bbox"][2] > 0 and (a["area"] > 0 or not lvis)],
        ):
            truth, predictions = read(
                tmp_path, {**dataset, "annotations": annotations}, detections, lvis
            )
            result = measure(truth, predictions)
            evaluation = result.evaluation
            evaluation.notes = []
            reports = [diagnose(m, evaluation).as_json() for m in result.matchers.values()]
            figures.append(json.dumps([evaluation.as_json(), reports], sort_keys=True))
        assert figures[0] == figures[1], seed
