import logging
import math

import pytest
from detectron2.data import DatasetCatalog

from d2_balance.data import bad_annotations, load_json, register_json
from d2_balance.data.records import without_bad_masks

from .conftest import coco_data

BAD = {
    # polygons and boxes in an image of 40 x 30
    "missing": ({"bbox": None}, "box is missing or not four numbers"),
    "three": ({"bbox": [1, 2, 3]}, "box is missing or not four numbers"),
    "text": ({"bbox": ["1", "2", "three", "4"]}, "box is missing or not four numbers"),
    "nan": ({"bbox": [1, math.nan, 3, 4]}, "box is not finite"),
    "infinite": ({"bbox": [1, 2, math.inf, 4]}, "box is not finite"),
    "huge": ({"bbox": [1, 2, 10**400, 4]}, "box is not finite"),
    "negative": ({"bbox": [9, 9, -3, 4]}, "box of negative size"),
    "no area": ({"bbox": [1, 2, 3, 0]}, "box of no area"),
    "right of it": ({"bbox": [40, 2, 3, 4]}, "box outside the image"),
    "left of it": ({"bbox": [-3, 2, 3, 4]}, "box outside the image"),
    "below it": ({"bbox": [1, 30.5, 3, 4]}, "box outside the image"),
}


@pytest.mark.parametrize("fields, reason", BAD.values(), ids=BAD)
def test_bad_annotation_is_skipped_and_reported_by_id(write, names, fields, reason):
    data = coco_data()
    data["annotations"][1] |= fields
    name = names()
    register_json(name, *write(data))
    first, second = DatasetCatalog.get(name)
    assert len(first["annotations"]) == 1 and len(second["annotations"]) == 1
    report = bad_annotations(name)
    [(found, ids)] = report.skipped.items()
    assert found.startswith(reason) and ids == [12]
    assert report.total == 1 and report.counts == {found: 1}


BAD_MASK = {
    # masks in an image of 40 x 30; the box is [5, 5, 8.5, 9]
    "two points": ({"segmentation": [[1, 2, 3, 4]]}, "polygon of fewer than 3 points"),
    "odd": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon of fewer than 3 points"),
    "nan mask": ({"segmentation": [[1, 2, 3, 4, 5, math.nan]]}, "segmentation is neither"),
    "pairs": ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "segmentation is neither"),
    "text mask": ({"segmentation": "circle"}, "segmentation is neither"),
    "no counts": ({"segmentation": {"size": [30, 40]}}, "segmentation is neither"),
    "RLE size": ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "RLE mask of another"),
    "RLE short": ({"segmentation": {"size": [30, 40], "counts": [9, 9]}}, "RLE mask whose runs"),
    "RLE text": ({"segmentation": {"size": [30, 40], "counts": "4"}}, "RLE mask whose runs"),
    "flat": ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "polygon without area"),
    "one point": ({"segmentation": [[7, 7, 7, 7, 7, 7, 7, 7]]}, "polygon without area"),
    "flat far out": ({"segmentation": [[30.1, 9, 33.1, 9, 39.7, 9]]}, "polygon without area"),
}


@pytest.mark.parametrize("fields, reason", BAD_MASK.values(), ids=BAD_MASK)
def test_a_bad_mask_leaves_its_box_and_is_reported_by_id(write, names, fields, reason):
    data = coco_data()
    data["annotations"][1] |= fields
    name = names()
    register_json(name, *write(data))
    records = DatasetCatalog.get(name)
    kept = records[0]["annotations"][1]
    assert kept["bbox"] == [5, 5, 8.5, 9] and "segmentation" not in kept
    report = bad_annotations(name)
    [(found, ids)] = report.bad_masks.items()
    assert found.startswith(reason) and ids == [12] and report.total == 0
    assert "box kept, skipped where masks are trained or measured" in report.describe()
    trained = without_bad_masks(records)
    assert [len(r["annotations"]) for r in trained] == [1, 1]
    assert trained.objects.category.tolist() == [0, 1]


@pytest.mark.parametrize("empty", [[], [[]], None, {}])
def test_a_mask_that_says_nothing_is_none(write, names, empty):
    data = coco_data()
    data["annotations"][1]["segmentation"] = empty
    name = names()
    register_json(name, *write(data))
    record = DatasetCatalog.get(name)[0]
    assert "segmentation" not in record["annotations"][1] and not bad_annotations(name)


def test_a_thin_polygon_has_area(write, names):
    data = coco_data()
    data["annotations"][1]["segmentation"] = [[1, 2, 39, 2, 39, 2.01]]
    name = names()
    register_json(name, *write(data))
    assert "segmentation" in DatasetCatalog.get(name)[0]["annotations"][1]


def test_missing_box_is_skipped(write):
    data = coco_data()
    del data["annotations"][0]["bbox"]
    assert [len(r["annotations"]) for r in load_json(*write(data))] == [1, 1]


def test_box_that_sticks_out_is_clipped_and_counted_apart(write, names):
    data = coco_data()
    data["annotations"][0]["bbox"] = [-2, 5, 10, 30]  # x -2..8 -> 0..8, y 5..35 -> 5..30
    data["annotations"][1]["bbox"] = [30, 20, 10.005, 5]  # rounding of the file, not a fault
    name = names()
    register_json(name, *write(data))
    boxes = [annotation["bbox"] for annotation in DatasetCatalog.get(name)[0]["annotations"]]
    assert boxes == [[0, 5, 8, 25], [30, 20, 10.005, 5]]
    report = bad_annotations(name)
    assert report.clipped == [11] and report.total == 0 and report


def test_broken_polygon_beside_a_sound_one_is_left_out_alone(write, names):
    data = coco_data()
    sound = [1, 2, 11, 2, 11, 14]
    data["annotations"][0]["segmentation"] = [[1, 2, 3, 4], sound]
    name = names()
    register_json(name, *write(data))
    assert DatasetCatalog.get(name)[0]["annotations"][0]["segmentation"] == [sound]
    assert bad_annotations(name).trimmed == [11]


def test_one_warning_lists_ten_ids_per_reason_and_is_logged_once(write, names, caplog):
    data = coco_data()
    for number in range(12):
        data["annotations"].append(
            {"id": 100 + number, "image_id": 1, "category_id": 3, "bbox": [1, 1, 0, 5]}
        )
    data["annotations"][0]["bbox"] = [50, 50, 5, 5]
    name = names()
    register_json(name, *write(data))
    # Detectron2's logger may not hand its records on; the module's own logger does
    with caplog.at_level(logging.WARNING, logger="d2_balance.data.checks.annotations"):
        DatasetCatalog.get(name)
        DatasetCatalog.get(name)
    [record] = [r for r in caplog.records if name in r.getMessage()]
    text = record.getMessage()
    assert "13 bad annotation(s) skipped" in text
    assert "box of no area: 12 (annotation id 100, 101, 102, 103, 104, 105, 106, 107, 108, 109 and"
    assert "109 and 2 more)" in text and "110" not in text
    assert "box outside the image: 1 (annotation id 11)" in text


def test_sound_file_has_an_empty_report_and_an_unknown_set_none(write, names):
    name = names()
    assert bad_annotations(name) is None
    register_json(name, *write(coco_data()))
    DatasetCatalog.get(name)
    assert bad_annotations(name).total == 0 and not bad_annotations(name)
