"""Boxes of a second file become regions of the same images, unless they are objects there."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from d2_balance.data import register_json
from d2_balance.data.ignore_regions import RegionFile, add_regions, region_files

from .conftest import coco_data, lvis_data


def second_file():
    """On a.png the cat again (IoU 1), and under another id a dog elsewhere, a bus and a crowd."""
    return {
        "images": [
            {"id": 77, "file_name": "train/a.png", "width": 40, "height": 30},
            {"id": 78, "file_name": "c.png", "width": 5, "height": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 77, "category_id": 1, "bbox": [1, 2, 10, 12]},
            {"id": 2, "image_id": 77, "category_id": 2, "bbox": [20, 3, 10, 10]},
            {"id": 3, "image_id": 77, "category_id": 9, "bbox": [1, 2, 10, 12]},
            {"id": 4, "image_id": 77, "category_id": 1, "bbox": [1, 2, 10, 12], "iscrowd": 1},
            {"id": 5, "image_id": 77, "category_id": 1, "bbox": [5, 5, -3, 2]},
        ],
        "categories": [
            {"id": 1, "name": "Cat"},
            {"id": 2, "name": "dog"},
            {"id": 9, "name": "bus"},
        ],
    }


@pytest.fixture
def files(write, names):
    """files(data of the training set, second data, class map) -> (records, RegionFile)."""

    def make(data, second, class_map=""):
        name = names()
        register_json(name, *write(data))
        path, _directory = write(second, "second.json")
        if class_map:
            class_map, _ = write(class_map, "map.yaml")
        return DatasetCatalog.get(name), RegionFile(name, path, class_map)

    return make


@pytest.mark.parametrize("data", [coco_data, lvis_data])
def test_boxes_are_regions_where_no_object_of_their_class_is(files, data):
    records, regions = files(data(), second_file())
    a, b = add_regions(records, regions)
    # the first box is the cat; the bus of the same box is another class, and crowds stay
    assert a["ignore_boxes"].tolist() == [[20, 3, 30, 13], [1, 2, 11, 14], [1, 2, 11, 14]]
    assert a["ignore_boxes"].dtype == np.float32
    assert "ignore_boxes" not in b and "ignore_boxes" not in records[0]
    assert a["annotations"] == records[0]["annotations"]


def test_an_overlap_below_a_half_is_another_object(files):
    second = second_file()
    second["annotations"] = [
        {"id": 1, "image_id": 77, "category_id": 1, "bbox": [1, 2, 10, 6]},  # IoU 60 / 120
        {"id": 2, "image_id": 77, "category_id": 1, "bbox": [1, 2, 10, 5.9]},
    ]
    records, regions = files(coco_data(), second)
    found = add_regions(records, regions)[0]["ignore_boxes"]
    assert found.tolist() == [[1, 2, 11, pytest.approx(7.9)]]


def test_a_class_map_says_which_classes_are_the_same(files):
    records, regions = files(coco_data(), second_file(), "bus: cat\nCat: null\n")
    found = add_regions(records, regions)[0]["ignore_boxes"].tolist()
    assert found == [[1, 2, 11, 14], [20, 3, 30, 13], [1, 2, 11, 14]]  # the bus is the cat now


def test_two_files_add_their_regions_and_an_empty_image_keeps_all(files):
    data = coco_data()
    data["annotations"] = data["annotations"][2:]
    records, regions = files(data, second_file())
    first = add_regions(records, regions)
    assert len(first[0]["ignore_boxes"]) == 4
    assert len(add_regions(first, regions)[0]["ignore_boxes"]) == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["images"][0].update(width=41), "image 77 is 41 x 30 pixels and the training"),
        (
            lambda d: d["images"][0].update(file_name="z.png"),
            "none of its 2 images is one of",
        ),
        (lambda d: d["images"][1].update(file_name="b/a.png"), "images 77 and 78 are both called"),
        (lambda d: d["images"][1].pop("file_name"), "image 78 has neither 'file_name'"),
        (lambda d: d["annotations"][0].update(category_id=5), "'category_id' 5 of 1 annotation"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name_and_id(files, change, text):
    second = second_file()
    change(second)
    records, regions = files(coco_data(), second)
    with pytest.raises(ValueError, match=text) as error:
        add_regions(records, regions)
    assert regions.json_file in str(error.value)


def test_a_class_map_with_unknown_names_is_refused(files):
    records, regions = files(coco_data(), second_file(), "Cat: cta\n")
    with pytest.raises(ValueError, match=r"map.yaml: 'Cat': .* has no class 'cta'; did you mean"):
        add_regions(records, regions)


def test_entries_are_read_with_their_files(cfg, write):
    path, _ = write(second_file(), "second.json")
    cfg.DATASETS.TRAIN = ("mine",)
    cfg.DATASETS.IGNORE_REGIONS = [["mine", path], ["mine", path, path]]
    assert region_files(cfg) == [RegionFile("mine", path), RegionFile("mine", path, path)]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["mine"], "must be .dataset, annotation file."),
        (["mine", 3], "must be .dataset, annotation file."),
        ("mine", "must be .dataset, annotation file."),
        (["other", "{path}"], "'other' is not a training set; must be one of mine"),
        (["mine", "no.json"], "the annotation file 'no.json' does not exist"),
        (["mine", "{path}", "no.yaml"], "the class map 'no.yaml' does not exist"),
    ],
)
def test_entries_that_cannot_work_are_refused(cfg, write, entry, text):
    path, _ = write(second_file(), "second.json")
    cfg.DATASETS.TRAIN = ("mine",)
    entry = [path if part == "{path}" else part for part in entry] if entry != "mine" else entry
    cfg.DATASETS.IGNORE_REGIONS = [entry]
    with pytest.raises(ValueError, match=rf"DATASETS.IGNORE_REGIONS\[0\].*{text}"):
        region_files(cfg)
