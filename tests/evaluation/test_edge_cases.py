"""What the evaluators say when there is nothing to measure, and how they take bad input."""

import csv
import json
import logging
import math

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2_balance.evaluation import COCOGroupEvaluator, LVISGroupEvaluator, read_per_class
from d2_balance.evaluation.record import Evaluation


def one_image(neg=(), not_exhaustive=(), classes=(1,), frequency="frc"):
    """One image, a 20 x 20 box for each entry of `classes`; categories 1, 2, 3."""
    annotations = [
        {"id": n, "image_id": 7, "category_id": c, "bbox": [40 * n, 10, 20, 20], "area": 400}
        for n, c in enumerate(classes)
    ]
    categories = [{"id": k + 1, "name": f"c{k + 1}"} for k in range(3)]
    for category, letter in zip(categories, frequency, strict=False):
        category["frequency"] = letter
    image = {"id": 7, "height": 100, "width": 200, "neg_category_ids": list(neg)}
    image["not_exhaustive_category_ids"] = list(not_exhaustive)
    return {"images": [image], "annotations": annotations, "categories": categories}


def found(*classes_and_scores, at=10.0):
    """Detections 20 x 20 of class (category id), score, number of the box that they cover."""
    boxes = {7: []}
    for category, score, n in classes_and_scores:
        boxes[7].append(((40 * n, at, 40 * n + 20, at + 20), category, score))
    return boxes


def test_an_empty_prediction_list_gives_zero_with_and_nan_without_ground_truth(sets, tmp_path):
    dataset = one_image(classes=(1, 1))
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path))
    metrics = sets.feed(evaluator, dataset, {})["bbox"]
    # 400 square pixels are small, class 1 is frequent
    for key in ("AP", "AP50", "AP75", "APs", "APf"):
        assert metrics[key] == 0.0, key
    for key in ("APm", "APl", "APr", "APc"):
        assert math.isnan(metrics[key]), key
    assert json.loads((tmp_path / f"predictions_{name}.json").read_text()) == []


def test_evaluation_without_any_processed_image_gives_zero(sets):
    name = sets.register(one_image(), "lvis")
    assert LVISGroupEvaluator(name).evaluate()["bbox"]["AP"] == 0.0


def test_masks_are_evaluated_when_a_model_with_masks_finds_nothing(sets):
    dataset = one_image()
    dataset["annotations"][0]["segmentation"] = [[0, 10, 20, 10, 20, 30, 0, 30]]
    name = sets.register(dataset, "lvis")
    results = sets.feed(LVISGroupEvaluator(name), dataset, {}, masks=True)
    assert results["segm"]["AP"] == 0.0


def test_the_reason_of_a_nan_is_logged_once(sets, caplog):
    dataset = one_image()
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name)
    with caplog.at_level(logging.WARNING):
        sets.feed(evaluator, dataset, found((1, 0.9, 0)))
        sets.feed(evaluator, dataset, found((1, 0.9, 0)))
    text = caplog.text
    assert text.count(f"APr is NaN: no ground truth of rare classes in {name}") == 1
    assert text.count(f"APl is NaN: no large ground truth in {name}") == 1
    assert (
        text.count(f"AP is NaN for 2 of 3 classes: no ground truth of them in {name}: c2, c3") == 1
    )


def test_groups_are_nan_without_a_warning_where_neither_file_nor_training_gives_them(sets, caplog):
    dataset = one_image(frequency="")
    name = sets.register(dataset, "lvis")
    with caplog.at_level(logging.WARNING):
        metrics = sets.feed(LVISGroupEvaluator(name), dataset, found((1, 0.9, 0)))["bbox"]
    assert metrics["AP"] == pytest.approx(100)
    assert all(math.isnan(metrics[k]) for k in ("APr", "APc", "APf"))
    assert not [key for key in ("APr", "APc", "APf") if key in caplog.text]


def test_groups_come_from_training_counts_where_the_file_has_no_frequency(sets):
    dataset = one_image(frequency="", classes=(1, 2))
    name = sets.register(dataset, "lvis")
    counts = {"c1": 101, "c2": 10, "c3": 11}
    evaluator = LVISGroupEvaluator(name, train_image_count=lambda: counts)
    metrics = sets.feed(evaluator, dataset, found((1, 0.9, 0)))["bbox"]
    assert [r["group"] for r in evaluator.per_class.values()] == ["f", "r", "c"]
    # class 1 is found, class 2 is not, class 3 has no ground truth: (100 + 0) / 2
    assert metrics["AP"] == pytest.approx(50)
    assert (metrics["APf"], metrics["APr"]) == pytest.approx((100, 0))
    assert math.isnan(metrics["APc"])


def test_detections_of_unlisted_classes_do_not_count_and_of_listed_ones_do(sets):
    # A false positive of class 2 in an image where class 2 is unknown, then verified absent.
    # Class 2 has its own ground truth in the image 8, found with a lower score.
    for neg, expected in (((), 100.0), ((2,), 50.0)):
        dataset = one_image(neg=neg)
        dataset["images"].append({**dataset["images"][0], "id": 8, "neg_category_ids": []})
        box = {"id": 5, "image_id": 8, "category_id": 2, "bbox": [0, 10, 20, 20], "area": 400}
        dataset["annotations"].append(box)
        name = sets.register(dataset, "lvis")
        detections = found((2, 0.9, 3)) | {8: [((0, 10, 20, 30), 2, 0.8)]}
        evaluator = LVISGroupEvaluator(name)
        sets.feed(evaluator, dataset, detections)
        # precision 1 / (1 + 1) = 50 % at every recall, if the false positive counts
        assert evaluator.per_class["c2"]["AP"] == pytest.approx(expected)


def test_unmatched_detections_of_not_exhaustive_classes_are_ignored(sets):
    for not_exhaustive, expected in (((), 50.0), ((1,), 100.0)):
        dataset = one_image(not_exhaustive=not_exhaustive)
        name = sets.register(dataset, "lvis")
        metrics = sets.feed(LVISGroupEvaluator(name), dataset, found((1, 0.9, 3), (1, 0.8, 0)))
        assert metrics["bbox"]["AP"] == pytest.approx(expected)


def test_files_hold_null_and_empty_fields_for_nan(sets, tmp_path):
    dataset = one_image(classes=(1,))
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path))
    sets.feed(evaluator, dataset, found((1, 0.9, 0)))
    path = tmp_path / f"per_class_ap_{name}.json"
    saved = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert saved["c1"] == {
        "group": "f",
        "train_image_count": None,
        "instances": 1,
        "AP": pytest.approx(100),
        "AP50": pytest.approx(100),
    }
    assert saved["c2"]["AP"] is None
    with open(tmp_path / f"per_class_ap_{name}.csv") as f:
        rows = {row["class"]: row for row in csv.DictReader(f)}
    assert rows["c2"]["AP"] == "" and float(rows["c1"]["AP"]) == pytest.approx(100)
    assert rows["c1"]["train_image_count"] == ""
    again = read_per_class(str(path))
    assert math.isnan(again["c2"]["AP"]) and again["c1"] == evaluator.per_class["c1"]
    # nothing else remains: no rank files, no temporary names
    written = {p.name for p in tmp_path.iterdir()} - {f"{name}.json"}
    figures = tmp_path / f"evaluation_{name}.json"
    assert written == {
        f"predictions_{name}.json",
        figures.name,
        path.name,
        path.with_suffix(".csv").name,
    }
    every = Evaluation.read(str(figures))
    assert (every.dataset, every.rules, every.images, every.detections) == (name, "lvis", 1, 1)
    assert math.isnan(every.results["bbox"]["APr"]) and every.results["bbox"]["AP"] == 100
    assert every.classes["c1"] == evaluator.per_class["c1"]
    assert any("APr is NaN" in note for note in every.notes)


def test_boxes_only_annotations_skip_masks_with_the_reason(sets, caplog):
    dataset = one_image()
    name = sets.register(dataset, "coco")
    with caplog.at_level(logging.WARNING):
        results = sets.feed(COCOGroupEvaluator(name), dataset, found((1, 0.9, 0)), masks=True)
    assert list(results) == ["bbox"]
    assert f"1 annotations of {name} have no segmentation, the first is 0" in caplog.text


def test_missing_area_iscrowd_and_image_labels_are_made_up_for(sets):
    dataset = one_image(classes=(1, 2))
    for ann in dataset["annotations"]:
        del ann["area"]
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        del dataset["images"][0][key]
    name = sets.register(dataset, "lvis")
    metrics = sets.feed(LVISGroupEvaluator(name), dataset, found((1, 0.9, 0), (2, 0.9, 1)))["bbox"]
    # 20 * 20 = 400 is small. Id 0 of the first annotation must not read as "no match".
    assert metrics["AP"] == pytest.approx(100) and metrics["APs"] == pytest.approx(100)


def test_image_ids_may_be_text(sets):
    dataset = one_image()
    dataset["images"][0]["id"] = dataset["annotations"][0]["image_id"] = "000a1"
    name = sets.register(dataset, "lvis")
    detections = {"000a1": found((1, 0.9, 0))[7]}
    assert sets.feed(LVISGroupEvaluator(name), dataset, detections)["bbox"]["AP"] == pytest.approx(
        100
    )


def test_detections_that_are_not_finite_are_skipped_and_counted(sets, caplog, tmp_path):
    dataset = one_image()
    name = sets.register(dataset, "lvis")
    detections = found((1, 0.9, 0), (1, math.nan, 0), (1, math.inf, 0))
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        metrics = sets.feed(evaluator, dataset, detections)
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    assert "2 detections skipped" in caplog.text


def test_a_restriction_to_images_leaves_the_others_out(sets):
    dataset = one_image()
    dataset["images"].append({**dataset["images"][0], "id": 8})
    dataset["annotations"].append({**dataset["annotations"][0], "id": 5, "image_id": 8})
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name)
    # one of two objects found: precision 1 at the recalls 0, .01 .. .5, which are 51 of 101
    metrics = sets.feed(evaluator, dataset, found((1, 0.9, 0)))["bbox"]
    assert metrics["AP"] == pytest.approx(5100 / 101)
    evaluator.reset()
    instances = Instances((100, 200), pred_boxes=Boxes(torch.tensor([[0.0, 10, 20, 30]])))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": 7}], [{"instances": instances}])
    assert evaluator.evaluate(img_ids=[7])["bbox"]["AP"] == pytest.approx(100)


def test_two_classes_of_one_name_keep_their_own_records(sets):
    dataset = one_image(classes=(1, 2))
    dataset["categories"][1]["name"] = "c1"
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name)
    sets.feed(evaluator, dataset, found((1, 0.9, 0)))
    assert list(evaluator.per_class) == ["c1 (id 1)", "c1 (id 2)", "c3"]
    assert evaluator.per_class["c1 (id 2)"]["AP"] == 0.0


def test_a_class_index_beyond_the_data_set_is_refused(sets):
    name = sets.register(one_image(), "lvis")
    instances = Instances((100, 200), pred_boxes=Boxes(torch.tensor([[0.0, 10, 20, 30]])))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([3])
    with pytest.raises(ValueError, match=f"class index 3, but {name} has 3 classes"):
        LVISGroupEvaluator(name).process([{"image_id": 7}], [{"instances": instances}])


def test_predictions_for_an_image_of_another_set_are_refused(sets):
    name = sets.register(one_image(), "lvis")
    evaluator = LVISGroupEvaluator(name)
    instances = Instances((9, 9), pred_boxes=Boxes(torch.zeros(0, 4)))
    instances.scores, instances.pred_classes = torch.zeros(0), torch.zeros(0).long()
    evaluator.process([{"image_id": 99}], [{"instances": instances}])
    with pytest.raises(ValueError, match=f"image 99, which is not in {name}"):
        evaluator.evaluate()


def test_outputs_without_instances_are_refused(sets):
    evaluator = LVISGroupEvaluator(sets.register(one_image(), "lvis"))
    with pytest.raises(ValueError, match="the model gave \\['proposals'\\]"):
        evaluator.process([{"image_id": 7}], [{"proposals": None}])


def test_bad_arguments_and_files_are_named(sets, tmp_path):
    name = sets.register(one_image(), "lvis")
    with pytest.raises(ValueError, match="max_dets must be at least 1, not 0"):
        LVISGroupEvaluator(name, max_dets=0)
    with pytest.raises(ValueError, match="must be of \\('bbox', 'segm'\\)"):
        COCOGroupEvaluator(name, tasks=("keypoints",))
    with pytest.raises(ValueError, match="without_a_file: LVIS evaluation reads"):
        LVISGroupEvaluator("evaluation_test_without_a_file")
    (tmp_path / "cut.json").write_text('{"images": [')
    MetadataCatalog.get("evaluation_test_cut").json_file = str(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="evaluation_test_cut: json_file is no JSON"):
        COCOGroupEvaluator("evaluation_test_cut")


def test_an_object_without_box_is_left_out_and_noted(sets, tmp_path):
    dataset = one_image(classes=(1, 1))
    del dataset["annotations"][1]["bbox"]
    name = sets.register(dataset, "lvis")
    evaluator = LVISGroupEvaluator(name, output_dir=str(tmp_path))
    metrics = sets.feed(evaluator, dataset, found((1, 0.9, 0)))
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    notes = Evaluation.read(str(tmp_path / f"evaluation_{name}.json")).notes
    assert any("1 bad annotations" in note and "box is missing" in note for note in notes)


def test_a_file_without_annotations_saves_predictions_only(sets, tmp_path):
    dataset = one_image()
    del dataset["annotations"]
    name = sets.register(dataset, "coco")
    evaluator = COCOGroupEvaluator(name, output_dir=str(tmp_path))
    assert sets.feed(evaluator, dataset, found((1, 0.9, 0))) == {}
    saved = json.loads((tmp_path / f"predictions_{name}.json").read_text())
    assert [r["category_id"] for r in saved] == [1]
