"""Checks and counts of LVIS files, and LVIS with COCO's classes, on a file of four images."""

import copy
import json
from pathlib import Path

import pytest

from d2_balance.data import ClassCounts

TINY = Path(__file__).parents[2] / "../shared/data/tiny_coco"

# image_count as this file shows it: person 2, cow 1, abacus 1
TRAIN = {
    "images": [
        {
            "id": n,
            "width": 40,
            "height": 30,
            "coco_url": f"http://some.where/train2017/{n}.jpg",
            "neg_category_ids": negative,
            "not_exhaustive_category_ids": partly,
        }
        for n, negative, partly in ((1, [3], []), (2, [9], [5]), (3, [5, 9], []), (4, [], []))
    ],
    "annotations": [
        {"id": n, "image_id": i, "category_id": c, "bbox": [1, 1, w, 9], "area": 9 * w}
        for n, (i, c, w) in enumerate([(1, 5, 5), (1, 5, 6), (2, 5, 7), (2, 3, 8), (1, 9, 5)], 1)
    ],
    "categories": [
        {"id": 3, "name": "cow", "synset": "beef.n.01", "image_count": 1, "frequency": "r"},
        {"id": 5, "name": "person", "synset": "person.n.01", "image_count": 2, "frequency": "r"},
        {"id": 9, "name": "abacus", "synset": "abacus.n.01", "image_count": 1, "frequency": "r"},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write_json(name="train.json", change=None):
        data = copy.deepcopy(TRAIN)
        if change:
            change(data)
        (tmp_path / name).write_text(json.dumps(data))
        return tmp_path / name

    return write_json


def test_counts_are_written_for_training_and_agree_with_the_file(write, script, tmp_path):
    status, out, err = script("prepare_lvis", write(), write("val.json"))
    assert status == 0, err
    counts = ClassCounts.load(str(tmp_path / "train_counts.json"))
    assert counts.class_names == ("cow", "person", "abacus")
    assert counts.image_count.tolist() == [1, 2, 1]
    assert counts.instance_count.tolist() == [1, 3, 1]
    assert counts.num_images == 2  # the images 3 and 4 have no object
    assert "4 images, 5 annotations, 3 classes; 3 images list absent classes, 1 have" in out
    assert "images by directory of their coco_url: train2017: 4" in out
    assert "differs" not in out and "3 rare, 0 common, 0 frequent classes on 2 images" in out


def test_counts_that_differ_are_listed_by_class(write, script):
    def change(data):
        data["categories"][1] |= {"image_count": 3, "frequency": "f"}

    out = script("prepare_lvis", write(change=change))[1]
    assert "image_count differs for 1 classes: 5 'person': 3, counted 2" in out
    assert "frequency differs for 1 classes: 5 'person': f, by 2 images r" in out


def test_bad_annotations_are_listed_and_not_counted(write, script, tmp_path):
    out = script(
        "prepare_lvis", write(change=lambda d: d["annotations"][3].update(bbox=[1, 1, -2, 3]))
    )[1]
    assert "skipped: box of negative size: 1 (annotation id 4)" in out
    counts = ClassCounts.load(str(tmp_path / "train_counts.json"))
    assert counts.image_count.tolist() == [0, 2, 1]


def test_what_cannot_be_trained_on_is_named(write, script, tmp_path):
    other = write("val.json", lambda d: d["categories"][0].update(name="bull"))
    status, _, err = script("prepare_lvis", write(), other)
    assert status == 2 and "differ in 1 categories (3: 'cow' and 'bull')" in err
    assert not (tmp_path / "train_counts.json").exists()
    err = script("prepare_lvis", write(change=lambda d: d["annotations"].clear()))[2]
    assert "no annotation; the first file must be the training set" in err
    err = script("prepare_lvis", write(), "--images", tmp_path)[2]
    assert "4 of 4 images are missing" in err and "train2017/1.jpg" in err
    path = write()
    path.write_text(path.read_text()[:-20])
    assert "the file ends too early" in script("prepare_lvis", path)[2]


def test_coco_classes_take_over_annotations_and_image_labels(write, script, tmp_path):
    out = tmp_path / "out.json"
    status, said, err = script("prepare_cocofied_lvis", write(), out)
    assert status == 0, err
    data = json.loads(out.read_text())
    assert len(data["categories"]) == 80 and data["categories"][0]["name"] == "person"
    counts = {c["id"]: (c["image_count"], c["instance_count"]) for c in data["categories"]}
    # COCO calls person 1 and cow 21
    assert counts.pop(1) == (2, 3) and counts.pop(21) == (1, 1) and set(counts.values()) == {(0, 0)}
    assert [a["category_id"] for a in data["annotations"]] == [1, 1, 1, 21]
    labels = [(i["neg_category_ids"], i["not_exhaustive_category_ids"]) for i in data["images"]]
    assert labels == [([21], []), ([], [1]), ([1], []), ([], [])]
    assert "4 of 5 annotations, 2 of 80 classes matched" in said
    assert "without counterpart: bicycle, car, " in said

    val = write("val.json", lambda d: d["annotations"].clear())
    arguments = [val, tmp_path / "val_out.json", "--train", out]
    assert script("prepare_cocofied_lvis", *arguments)[0] == 0
    assert json.loads((tmp_path / "val_out.json").read_text())["categories"] == data["categories"]


def test_every_coco_class_stands_once_in_the_table(script, write, tmp_path):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    from .conftest import DIRECTORY

    rows = json.loads((DIRECTORY / "coco_synsets.json").read_text())
    assert {r["id"]: r["name"] for r in rows} == {
        c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]
    }
    synsets = {c["synset"]: c for c in LVIS_CATEGORIES}
    lacking = [r["name"] for r in rows if r["synset"] not in synsets]
    assert lacking == ["hot dog"]  # LVIS v1 has no class for it


def test_files_that_are_no_lvis_and_tables_that_are_wrong_are_named(write, script, tmp_path):
    out = tmp_path / "out.json"
    bare = write(change=lambda d: [c.pop("synset") for c in d["categories"]])
    assert "no category has a 'synset'" in script("prepare_cocofied_lvis", bare, out)[2]
    table = tmp_path / "table.json"
    for rows, message in (
        ({}, "must be a list of objects with synset, id and name"),
        ([{"synset": "a", "id": i, "name": "x"} for i in (1, 2)], "synset 'a' comes twice"),
    ):
        table.write_text(json.dumps(rows))
        err = script("prepare_cocofied_lvis", write(), out, "--synsets", table)[2]
        assert message in err
    assert not out.exists()


def test_the_directories_of_images_are_those_of_the_coco_urls(write, script):
    def change(data):  # as LVIS v1 val, whose images lie in two directories
        data["images"][3]["coco_url"] = "http://some.where/val2017/4.jpg"

    out = script("prepare_lvis", write(change=change))[1]
    assert "images by directory of their coco_url: train2017: 3, val2017: 1" in out


@pytest.mark.skipif(not TINY.exists(), reason="../shared/data/tiny_coco is not there")
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_directories_of_real_files_are_those_of_the_page(script, tmp_path, split):
    path = tmp_path / f"{split}.json"
    path.write_bytes((TINY / f"lvis_style_{split}.json").read_bytes())
    status, out, err = script("prepare_lvis", path)
    assert status == 0, err
    assert f"images by directory of their coco_url: {split}2017: 50" in out
