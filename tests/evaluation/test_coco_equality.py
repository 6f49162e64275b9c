"""COCOGroupEvaluator gives pycocotools' numbers; groups are averages over its classes."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2_balance.evaluation import COCOGroupEvaluator

TINY = Path(__file__).parents[2] / "../shared/data/tiny_coco/instances_val2017.json"
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def pycocotools_result(json_file, results, task, max_dets=100):
    results = copy.deepcopy(results)
    if task == "segm":
        for result in results:
            del result["bbox"]  # as Detectron2: size ranges by the mask's area
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(json_file))
        evaluator = COCOeval(gt, gt.loadRes(results), task)
        evaluator.params.maxDets[-1] = max_dets
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(METRICS, evaluator.stats[:6] * 100, strict=True)), evaluator.eval["precision"]


@pytest.mark.parametrize("masks", [False, True])
def test_metrics_equal_pycocotools(sets, rng, tmp_path, masks):
    dataset = sets.make_dataset(rng, 40, 40, lvis=False, first_id=0, step=3)  # ids with gaps
    assert any(a["iscrowd"] for a in dataset["annotations"])
    crowded = dataset["images"][2]["id"]  # 450 detections of 4 classes: the limit of 100 cuts
    detections = sets.make_detections(rng, dataset, crowded_image=crowded)
    name = sets.register(dataset, "coco")
    evaluator = COCOGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, detections, masks)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    assert {r["category_id"] for r in saved} <= {c["id"] for c in dataset["categories"]}

    assert list(results) == (["bbox", "segm"] if masks else ["bbox"])
    for task in results:
        theirs, precision = pycocotools_result(tmp_path / f"{name}.json", saved, task)
        for metric in METRICS:
            assert results[task][metric] == pytest.approx(theirs[metric], abs=1e-6), metric
        assert 5 < results[task]["AP"] < 95
        suffix = "" if task == "bbox" else "_segm"
        ours = [record["AP" + suffix] for record in evaluator.per_class.values()]
        per_class = precision[:, :, :, 0, -1].mean(axis=(0, 1)) * 100
        np.testing.assert_allclose(ours, np.where(per_class < 0, np.nan, per_class), atol=1e-6)


@pytest.mark.skipif(not TINY.exists(), reason="../shared/data/tiny_coco is not there")
def test_metrics_equal_pycocotools_on_real_annotations(sets, rng, tmp_path):
    dataset = json.loads(TINY.read_text())
    assert any(a["iscrowd"] for a in dataset["annotations"])
    name = sets.register(dataset, "coco")
    evaluator = COCOGroupEvaluator(name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, sets.make_detections(rng, dataset), masks=True)
    saved = json.loads((tmp_path / f"out/predictions_{name}.json").read_text())
    for task in ("bbox", "segm"):
        theirs, _ = pycocotools_result(TINY, saved, task)
        for metric in METRICS:
            assert results[task][metric] == pytest.approx(theirs[metric], abs=1e-6), metric
        assert results[task]["AP"] > 5


def test_the_limit_of_detections_is_per_image_and_class(sets, rng, tmp_path):
    dataset = sets.make_dataset(rng, 8, 20, lvis=False)
    crowded = dataset["images"][2]["id"]
    detections = sets.make_detections(rng, dataset, crowded_image=crowded)
    name = sets.register(dataset, "coco")
    ap = []
    for max_dets in (11, 12, 100):
        evaluator = COCOGroupEvaluator(name, output_dir=str(tmp_path), max_dets=max_dets)
        ap.append(sets.feed(evaluator, dataset, detections)["bbox"]["AP"])
        saved = json.loads((tmp_path / f"predictions_{name}.json").read_text())
        assert len(saved) > 450
        _, precision = pycocotools_result(tmp_path / f"{name}.json", saved, "bbox", max_dets)
        precision = precision[:, :, :, 0, -1]  # all sizes, the highest limit
        assert ap[-1] == pytest.approx(precision[precision > -1].mean() * 100, abs=1e-6)
    assert abs(ap[0] - ap[2]) > 1e-3  # the limit cuts something that counts


def test_metrics_equal_detectron2s_evaluator(sets, rng):
    dataset = sets.make_dataset(rng, 15, 20, lvis=False)
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "coco")
    ours = sets.feed(COCOGroupEvaluator(name), dataset, detections, masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        stock = COCOEvaluator(name, use_fast_impl=False)
        theirs = sets.feed(stock, dataset, detections, masks=True)
    for task in ("bbox", "segm"):
        for metric in METRICS:
            assert ours[task][metric] == pytest.approx(theirs[task][metric], abs=1e-6), metric


def test_group_ap_is_the_mean_over_classes_counted_in_training(sets, rng):
    dataset = sets.make_dataset(rng, 12, 30, lvis=False)
    detections = sets.make_detections(rng, dataset)
    name = sets.register(dataset, "coco")
    # 10 and 100 are the last counts of their groups
    counts = [500, 101, 100, 11, 10, 3, 0, 200, 50, 1, 1, 1]
    groups = ["f", "f", "c", "c", "r", "r", "r", "f", "c", "r", "r", "r"]
    by_name = {c["name"]: n for c, n in zip(dataset["categories"], counts, strict=True)}
    evaluator = COCOGroupEvaluator(name, train_image_count=by_name)
    metrics = sets.feed(evaluator, dataset, detections)["bbox"]
    records = list(evaluator.per_class.values())
    assert [r["group"] for r in records] == groups
    assert [r["train_image_count"] for r in records] == counts
    for letter in "rcf":
        ap = [r["AP"] for r in records if r["group"] == letter]
        assert metrics["AP" + letter] == pytest.approx(np.nanmean(ap), abs=1e-9)


def test_given_groups_and_cut_points_replace_the_defaults(sets, rng):
    dataset = sets.make_dataset(rng, 6, 10, lvis=False)
    name = sets.register(dataset, "coco")
    names = [c["name"] for c in dataset["categories"]]
    counts = dict(zip(names, [5, 6, 7, 8, 9, 10], strict=True))
    evaluator = COCOGroupEvaluator(name, train_image_count=lambda: counts, cuts=(5, 8))
    sets.feed(evaluator, dataset, {})
    assert [r["group"] for r in evaluator.per_class.values()] == list("rcccff")

    groups = dict(zip(names, "fffrrr", strict=True))
    evaluator = COCOGroupEvaluator(name, train_image_count=counts, groups=groups)
    sets.feed(evaluator, dataset, {})
    assert [r["group"] for r in evaluator.per_class.values()] == list("fffrrr")
    with pytest.raises(ValueError, match="'class1' is in 'x'; must be r, c or f"):
        COCOGroupEvaluator(name, groups={"class1": "x"})
