"""Every field of an annotation file is read in one way, or refused with its id and value."""

import codecs
import gzip
import json
import math

import numpy as np
import pytest

from d2_balance.data.annotations import parse_annotations, read_annotations
from d2_balance.data.records import load_json
from d2_balance.data.resolve import load_annotations

from .conftest import coco_data, lvis_data


def read(change=lambda data: None, data=None):
    """The columns of `coco_data` after a change."""
    data = data or coco_data()
    change(data)
    return parse_annotations(json.dumps(data).encode(), "a.json")


def set_all(**fields):
    return lambda data: [a.update(fields) for a in data["annotations"]]


def test_columns_by_hand():
    found = read(set_all(area=7, segmentation=[[1, 2, 11, 2, 11, 14]]), lvis_data())
    assert found.class_names == {3: "cat", 7: "dog"} and found.federated
    assert found.image_id.tolist() == [1, 2] and found.size.tolist() == [[30, 40]] * 2
    assert found.id.tolist() == [11, 12, 13] and found.image.tolist() == [0, 0, 1]
    assert found.category.tolist() == [0, 1, 1] and found.area.tolist() == [7, 7, 7]
    assert found.box.tolist() == [[1, 2, 10, 12], [5, 5, 8.5, 9], [0, 0, 40, 30]]
    assert found.integral.tolist() == [True, False, True]
    assert found.negative.of(1).tolist() == [0] and found.not_exhaustive.of(1).tolist() == [1]
    assert found.negative.of(0).tolist() == [] and found.negative.given.all()
    assert found.segmentation(1) == [[1, 2, 11, 2, 11, 14]]
    assert found.image_places(0) == ["train/a.png", "a.png"]


@pytest.mark.parametrize("field", ["iscrowd", "ignore"])
@pytest.mark.parametrize(
    ("value", "flag"),
    [
        ("0", 0),
        ("1", 1),
        (0.0, 0),
        (1.0, 1),
        (None, 0),
        ("", 0),
        ("false", 0),
        (True, 1),
        ("0.0", 0),
    ],
)
def test_a_flag_is_read_as_what_it_means(write, field, value, flag):
    data = coco_data()
    set_all(**{field: value})(data)
    found = read(data=data)
    column = found.crowd if field == "iscrowd" else found.ignore
    assert column.tolist() == [bool(flag)] * 3
    assert found.class_counts().instance_count.tolist() == ([0, 0] if flag else [1, 2])
    records = load_json(*write(data))  # the loader, the counts and the dicts say the same
    assert all(a.get("iscrowd", 0) == flag for r in records for a in r["annotations"])
    assert [a[field] for a in found.data["annotations"]] == [flag] * 3


@pytest.mark.parametrize("value", ["maybe", 2, -1, [0], {"a": 1}, 0.5])
def test_a_flag_that_means_nothing_is_refused_with_id_and_value(value):
    with pytest.raises(ValueError, match=r"a.json: annotation 12: 'iscrowd' is .*; it must be 0"):
        read(lambda d: d["annotations"][1].update(iscrowd=value))


def test_ids_and_sizes_written_as_floats_are_integers():
    def change(data):
        for record in (*data["images"], *data["annotations"], *data["categories"]):
            record |= {key: float(v) for key, v in record.items() if type(v) is int}

    found, plain = read(change), read()
    for name in ("image_id", "id", "category_id", "image", "category", "size", "box"):
        column = getattr(found, name)
        assert column.tolist() == getattr(plain, name).tolist(), name
        assert name == "box" or column.dtype.kind == "i", name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["annotations"][1].update(id=1.5), r"'annotations': .*1.5"),
        (lambda d: d["annotations"][1].update(id=True), r"annotations\[1\] .*'id' is True"),
        (lambda d: d["annotations"][1].update(id=None), r"annotations\[1\] .*'id' is None"),
        (lambda d: d["annotations"][1].update(id=1 << 70), r"'annotations': 'id' is 118059162"),
        (lambda d: d["images"][1].update(id=1 << 70), r"'images': 'id' is 118059162"),
        (lambda d: d["annotations"][1].update(image_id="1"), r"'image_id' '1' of 1 .*ids 12"),
        (lambda d: d["annotations"][1].update(category_id=3.5), r"'category_id' 3.5 of 1 .*12"),
        (lambda d: d["annotations"][1].update(category_id=[3]), r"'category_id' is \[3\]"),
        (lambda d: d["annotations"][1].update(area="big"), r"annotation 12: 'area' is 'big'"),
        (lambda d: d["annotations"][1].update(area=True), r"annotation 12: 'area' is True"),
        (lambda d: d["annotations"].__setitem__(1, 5), r"annotations\[1\] is 5; .*an object"),
        (lambda d: d["images"][1].update(file_name=5), r"image 2: 'file_name' is 5; .*string"),
        (lambda d: d["images"][1].update(width="40"), r"image 2: 'width' is '40'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(change, text):
    with pytest.raises(ValueError, match=f"a.json: .*{text}"):
        read(change)


def test_a_field_of_megabytes_is_not_printed():
    with pytest.raises(ValueError, match=r"characters\)") as error:
        read(lambda d: d["annotations"][1].update(area="x" * 5_000_000))
    assert len(str(error.value)) < 300


def test_ids_may_be_strings():
    def change(data):
        for image in data["images"]:
            image["id"] = f"im{image['id']}"
        for annotation in data["annotations"]:
            annotation["image_id"] = f"im{annotation['image_id']}"
        data["annotations"][0]["id"] = "first"

    found = read(change)
    assert found.image_id.tolist() == ["im1", "im2"] and found.id.tolist() == ["first", 12, 13]


@pytest.mark.parametrize(
    ("value", "area"),
    [
        ("1200", 1200),
        (" 7.5 ", 7.5),
        (None, math.nan),
        ("", math.nan),
        (math.nan, math.nan),
        (3, 3),
    ],
)
def test_an_area_is_a_number_or_not_given(value, area):
    assert np.array_equal(read(set_all(area=value)).area, [area] * 3, equal_nan=True)


def test_nan_in_one_box_leaves_the_others():
    found = read(lambda d: d["annotations"][1].update(bbox=[1, math.nan, 3, 4]))
    assert found.box_problem.tolist() == [-1, 1, -1] and found.report.skipped == {
        "box is not finite": [12]
    }


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("make", [coco_data, lvis_data])
def test_other_forms_of_unicode_are_read_alike(tmp_path, form, make):
    data = make()
    data["categories"][0]["name"] = "Hündchen"
    path, plain = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding=form)
    plain.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    found, wanted = read_annotations(str(path)), read_annotations(str(plain))
    assert found.class_names == wanted.class_names == {3: "cat", 7: "Hündchen"}
    assert found.federated == wanted.federated == (make is lvis_data)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (gzip.compress(json.dumps(coco_data()).encode()), "compressed by gzip"),
        (codecs.BOM_UTF16_LE + b"{\x00\x22", "cut off or no UTF-16"),
        (b"[" * 100_000, "too deep|not valid JSON"),
        (json.dumps(coco_data()).encode()[:-30], "ends too early"),
        (json.dumps(coco_data()).encode() + b"}", "not valid JSON at character"),
    ],
    ids=["gzip", "utf-16", "deep", "cut", "more"],
)
def test_a_file_that_is_no_json_is_named(tmp_path, content, text):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: .*({text})"):
        load_annotations(str(path))


def roboflow(name, supercategory="cats"):
    """A parent of id 0 without objects."""

    def change(data):
        for category in data["categories"]:
            category["supercategory"] = supercategory
        data["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})

    return change


def test_an_unused_parent_with_the_name_of_a_class_is_no_class(write):
    data = coco_data()
    roboflow("cat")(data)
    found = read(data=data)
    assert found.class_names == {3: "cat", 7: "dog"} and found.category.tolist() == [0, 1, 1]
    assert any("0 'cat'" in hint and "Roboflow" in hint for hint in found.report.hints)
    assert [len(r["annotations"]) for r in load_json(*write(data))] == [2, 1]


def test_a_parent_with_objects_is_a_doubled_name():
    with pytest.raises(ValueError, match="categories 0 and 3 have the same name 'cat'"):
        read(lambda d: (roboflow("cat")(d), d["annotations"][1].update(category_id=0)))


def test_an_unused_parent_of_another_name_is_named():
    found = read(roboflow("cats"))
    assert found.num_classes == 3
    [hint] = found.report.hints
    assert "0 'cats'" in hint and "NUM_CLASSES" in hint


def hint_of(change):
    return " ".join(read(change).report.hints)


def test_boxes_in_fractions_are_named():
    assert "fractions" in hint_of(set_all(bbox=[0.1, 0.2, 0.5, 0.8]))
    assert "fractions" not in hint_of(lambda d: d["annotations"][0].update(bbox=[0, 0, 0.5, 0.5]))


def test_one_area_for_all_boxes_is_named():
    def four(data, area):
        data["annotations"].append(data["annotations"][0] | {"id": 14})
        set_all(area=area)(data)

    assert "'area' is 1 for all 4 objects" in hint_of(lambda d: four(d, 1))
    assert "'area' is 0 for all 4 objects" in hint_of(lambda d: four(d, "0"))
    assert not hint_of(lambda d: (four(d, 1), set_all(bbox=[1, 1, 1, 1])(d)))


def test_a_class_of_crowds_is_named():
    hint = hint_of(lambda d: d["annotations"][1].update(iscrowd=1))
    assert "dog 1 of 2" in hint and "cat" not in hint.split(":")[1] and "CVAT" in hint
    assert "3 of 3" in hint_of(set_all(iscrowd=1))
    assert not hint_of(set_all(ignore=1))  # said by the user, not by a tool


def test_one_file_under_two_ids_is_named():
    hint = hint_of(lambda d: d["images"][1].update(file_name="a.png"))
    assert "a.png (ids 1, 2)" in hint


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("sub/a b.png", "sub\\a b.png"),
        ("sub/a b.png", "sub/a%20b.png"),
        ("ü.png", "u\u0308.png"),
        ("a.PNG", "A.png"),
    ],
)
def test_images_are_found_by_names_written_otherwise(tmp_path, there, written):
    path = tmp_path / "images" / there
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    data = coco_data()
    data["images"], data["annotations"] = data["images"][:1], []
    data["images"][0]["file_name"] = written
    (tmp_path / "a.json").write_text(json.dumps(data))
    [record] = load_json(str(tmp_path / "a.json"), str(tmp_path / "images"))
    assert record["file_name"] == str(path)


def test_a_name_that_fits_two_images_is_missing(tmp_path):
    for name in ("a.PNG", "A.PNG"):
        (tmp_path / name).write_bytes(b"")
    data = coco_data()
    data["images"], data["annotations"] = data["images"][:1], []
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="1 of 1 images are missing"):
        load_json(str(tmp_path / "a.json"), str(tmp_path))


def test_image_counts_of_the_file_itself_are_no_training_counts():
    def counted(*counts):
        def change(data):
            for category, count in zip(data["categories"], counts, strict=True):
                category["image_count"] = count

        return change

    assert read(counted(2, 1)).training_image_count is None  # dog 2, cat 1: its own
    assert read(counted(400, 4)).training_image_count == (4, 400)
    assert read().training_image_count is None
    assert read(lambda d: d["categories"][0].update(image_count=9)).training_image_count is None
