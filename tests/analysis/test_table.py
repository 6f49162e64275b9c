"""Columns of a dataset: counts, and what is wrong in it."""

import json

import numpy as np
import pytest

from d2_balance.analysis.table import (
    CROWDS_ONLY,
    DUPLICATE,
    EMPTY,
    EMPTY_VERIFIED,
    UNSEEN,
    DataTable,
)

from .conftest import annotations, coco


def read(data):
    return DataTable.from_annotations("made", annotations(data))


def test_problems_are_found_with_their_ids():
    data = coco([[0, 1], [2], [0], [], []])
    data["images"][4]["neg_category_ids"] = [1]
    data["categories"].append({"id": 9, "name": "never"})
    first, second, third, _fourth = data["annotations"]
    data["annotations"] += [
        {**first, "id": 200},  # once more
        {**first, "id": 201, "bbox": [first["bbox"][0] + 0.004, *first["bbox"][1:]]},  # rounds so
        {**first, "id": 202, "category_id": 2},  # another class is no duplicate
        {**second, "id": 203, "bbox": [1, 1, float("nan"), 4]},
        {**second, "id": 204, "bbox": [1, 1, -3, 4]},
        {**second, "id": 205, "bbox": [90, 90, 30, 5]},
    ]
    third["iscrowd"] = 1
    found = read(data)
    assert found.problems == {
        "left out: box is not finite": [203],
        "left out: box of negative size": [204],
        "box sticks out of its image and is clipped": [205],
        DUPLICATE: [200, 201],
        EMPTY: [3],
        EMPTY_VERIFIED: [4],
        CROWDS_ONLY: [1],
        UNSEEN: ["class2", "never"],
    }


def test_a_clean_set_has_no_problems():
    assert read(coco([[0], [1, 0]])).problems == {}


@pytest.mark.parametrize("filter_empty", [True, False])
def test_statistics_leave_out_crowds(filter_empty):
    data = coco([[0, 0, 1], [1], [1], []])
    data["annotations"][3]["iscrowd"] = 1  # the only object of image 1
    found = read(data).statistics(filter_empty)
    assert found.image_count.tolist() == [1, 2]
    assert found.instance_count.tolist() == [2, 2]
    assert found.num_images == (2 if filter_empty else 4)


def test_a_set_without_an_object_is_refused():
    data = coco([[0]])
    data["annotations"] = []
    with pytest.raises(ValueError, match="made: no image has an object to train on"):
        read(data).statistics()


def test_image_labels_are_pairs_of_image_and_class():
    data = coco([[0, 2], [1]])
    data["images"][0] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
    data["images"][1] |= {"neg_category_ids": [3, 1, 3]}
    found = read(data)
    assert found.absent.tolist() == [[0, 1], [1, 0], [1, 2]]
    assert found.not_exhaustive.tolist() == [[0, 2]]


def test_dicts_give_the_columns_of_their_file(tmp_path):
    from d2_balance.data import load_json

    from ..data.conftest import lvis_data

    data = lvis_data()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "data.json").write_text(json.dumps(data))
    records = load_json(str(tmp_path / "data.json"), str(tmp_path))
    dicts = DataTable.from_dicts("made", records, ("cat", "dog"), {3: 0, 7: 1}, ("r", "f"))
    file = read(data)
    for column in ("sizes", "image", "label", "boxes", "crowd", "absent", "not_exhaustive"):
        np.testing.assert_array_equal(getattr(dicts, column), getattr(file, column), column)
    assert dicts.class_names == file.class_names and dicts.file_groups == file.file_groups
