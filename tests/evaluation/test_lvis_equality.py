"""LVISGroupEvaluator gives the lvis package's numbers, from outputs of a model to the table."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from lvis import LVIS, LVISEval, LVISResults

from d2_balance.evaluation import LVISGroupEvaluator

TINY = Path(__file__).parents[2] / "../shared/data/tiny_coco/lvis_style_val.json"
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]


@pytest.fixture(autouse=True)
def numpy_float(monkeypatch):
    """lvis 0.5.3 uses an alias that numpy dropped in 1.24."""
    monkeypatch.setattr(np, "float", float, raising=False)


def lvis_package(json_file, results, task, max_dets=300):
    results = copy.deepcopy(results)
    if task == "segm":
        for result in results:
            del result["bbox"]  # else lvis takes the box's area for the mask's
    gt = LVIS(str(json_file))
    evaluator = LVISEval(gt, LVISResults(gt, results, max_dets=max_dets), task)
    evaluator.run()
    return {m: evaluator.results[m] * 100 for m in METRICS}, evaluator.eval["precision"]


def assert_equal(ours, theirs):
    for metric, value in theirs.items():
        if value < 0:  # lvis says -100 where nothing can be measured
            assert np.isnan(ours[metric]), metric
        else:
            assert ours[metric] == pytest.approx(value, abs=1e-6), metric


@pytest.mark.parametrize("masks", [False, True])
def test_metrics_equal_the_lvis_package(sets, rng, tmp_path, masks):
    dataset = sets.make_dataset(rng)
    crowded = dataset["images"][3]["id"]  # 450 detections: the limit of 300 cuts
    detections = sets.make_detections(rng, dataset, crowded_image=crowded)
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, detections, masks)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    assert len(saved) == sum(map(len, detections.values()))

    assert list(results) == (["bbox", "segm"] if masks else ["bbox"])
    for task in results:
        theirs, precision = lvis_package(tmp_path / f"{name}.json", saved, task)
        assert_equal(results[task], theirs)
        assert 5 < results[task]["AP"] < 95
        # by class: (T, R, K, A), area 0 is all sizes
        suffix = "" if task == "bbox" else "_segm"
        ours = [record["AP" + suffix] for record in evaluator.per_class.values()]
        per_class = precision[:, :, :, 0].mean(axis=(0, 1)) * 100
        np.testing.assert_allclose(ours, np.where(per_class < 0, np.nan, per_class), atol=1e-6)


def test_metrics_of_a_federated_set_of_300_classes_equal_the_lvis_package(sets, rng, tmp_path):
    dataset = sets.make_dataset(rng, num_classes=300, num_images=150)
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, detections)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    theirs, _ = lvis_package(tmp_path / f"{name}.json", saved, "bbox")
    assert_equal(results["bbox"], theirs)
    seen = {a["category_id"] for a in dataset["annotations"]}
    assert 100 < len(seen) < 297  # the others have no AP and do not count


@pytest.mark.parametrize("max_dets", [1, 5, 40])
def test_limit_of_detections_counts_before_unlisted_classes_are_dropped(
    sets, rng, tmp_path, max_dets
):
    dataset = sets.make_dataset(rng, num_classes=12, num_images=25)
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path / "out"), max_dets=max_dets)
    results = sets.feed(evaluator, dataset, detections)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    theirs, _ = lvis_package(tmp_path / f"{name}.json", saved, "bbox", max_dets)
    assert_equal(results["bbox"], theirs)


@pytest.mark.parametrize("drop", ["not_exhaustive", "no_rare", "ignore"])
def test_edge_cases_equal_the_lvis_package(sets, rng, tmp_path, drop):
    dataset = sets.make_dataset(rng, num_classes=15, num_images=25)
    if drop == "not_exhaustive":  # every annotated class of every image
        for image in dataset["images"]:
            present = {
                a["category_id"] for a in dataset["annotations"] if a["image_id"] == image["id"]
            }
            image["not_exhaustive_category_ids"] = sorted(present)
    elif drop == "no_rare":
        for category in dataset["categories"]:
            category["frequency"] = {"r": "c"}.get(category["frequency"], category["frequency"])
    else:
        for ann in dataset["annotations"][::3]:
            ann["ignore"] = 1
            ann["iscrowd"] = 1  # no field of LVIS: must not matter
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, detections, masks=True)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    for task in ("bbox", "segm"):
        theirs, _ = lvis_package(tmp_path / f"{name}.json", saved, task)
        assert_equal(results[task], theirs)
    assert np.isnan(results["bbox"]["APr"]) == (drop == "no_rare")


@pytest.mark.skipif(not TINY.exists(), reason="../shared/data/tiny_coco is not there")
def test_metrics_equal_the_lvis_package_on_real_annotations(sets, rng, tmp_path):
    dataset = json.loads(TINY.read_text())
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, detections, masks=True)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    for task in ("bbox", "segm"):
        theirs, _ = lvis_package(TINY, saved, task)
        assert_equal(results[task], theirs)
        assert results[task]["AP"] > 5
