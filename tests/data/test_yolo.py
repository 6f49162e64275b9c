"""YOLO layouts and lists of image ids become annotation files."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from d2_balance.data import load_json
from d2_balance.data.annotations import read_annotations
from d2_balance.data.preparing import cut_images, read_ids
from d2_balance.data.yolo import convert_yolo, image_root

from .conftest import lvis_data


@pytest.fixture
def layout(tmp_path):
    """layout(labels, **data.yaml) -> its path; two images of 40 x 20 in train, one in val."""

    def make(labels="", **content):
        for name in ("train/images/a.jpg", "train/images/sub/b.png", "val/images/c.jpg"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20)).save(path)
        (tmp_path / "train/labels").mkdir()
        (tmp_path / "train/labels/a.txt").write_text(labels)
        path = tmp_path / "data.yaml"
        given = {"train": "train/images", "val": "val/images", "names": ["cat", "dog"]} | content
        path.write_text(yaml.safe_dump(given))
        return str(path)

    return make


def test_boxes_and_polygons_by_hand(layout, tmp_path):
    # box: centre (20, 10), 10 x 8 pixels -> x 15, y 6; triangle (4, 2), (12, 2), (12, 10): area 32
    data = layout("1 0.5 0.5 0.25 0.4\n0 0.1 0.1 0.3 0.1 0.3 0.5\n\n1 0.5 0.5 0.25 0.4 0.9\n")
    paths = convert_yolo(data, str(tmp_path / "out"))
    assert list(paths) == ["train", "val"]
    found = read_annotations(paths["train"])
    assert found.class_names == {1: "cat", 2: "dog"}
    assert found.category.tolist() == [1, 0, 1] and found.image.tolist() == [0, 0, 0]
    assert found.box.tolist() == [
        pytest.approx([15, 6, 10, 8]),
        pytest.approx([4, 2, 8, 8]),
        pytest.approx([15, 6, 10, 8]),
    ]
    assert found.area.tolist() == pytest.approx([80, 32, 80])
    assert found.segmentation(0) is None
    assert found.segmentation(1)[0] == pytest.approx([4, 2, 12, 2, 12, 10])
    records = load_json(paths["train"], image_root(data))
    assert [len(r["annotations"]) for r in records] == [3, 0]  # an image without a label file
    assert all(Path(r["file_name"]).is_file() for r in records)
    assert len(read_annotations(paths["val"]).id) == 0


@pytest.mark.parametrize(
    "content",
    [
        {"path": "."},
        {"train": "../train/images"},  # as Roboflow writes it
        {"train": ["train/images/sub", "train/images"]},
        {"names": {0: "cat", 1: "dog"}},
        {"nc": 2},
    ],
)
def test_forms_of_the_yaml_file(layout, tmp_path, content):
    paths = convert_yolo(layout("0 .5 .5 .1 .1", **content), str(tmp_path / "out"))
    found = read_annotations(paths["train"])
    assert found.class_names == {1: "cat", 2: "dog"} and len(found.id) == 1
    assert len(load_json(paths["train"], str(tmp_path))) == len(found.image_id)


def test_absolute_paths_and_lists_of_images(layout, tmp_path):
    (tmp_path / "list.txt").write_text(f"{tmp_path}/train/images/a.jpg\n./val/images/c.jpg\n")
    data = layout("0 .5 .5 .1 .1", train=str(tmp_path / "list.txt"), path=str(tmp_path))
    found = read_annotations(convert_yolo(data, str(tmp_path / "out"))["train"])
    assert [t.decode() for t in found.file_name] == ["train/images/a.jpg", "val/images/c.jpg"]


@pytest.mark.parametrize(
    ("labels", "content", "text"),
    [
        ("2 .5 .5 .1 .1", {}, r"a.txt: line 1: the class is 2; .*\[0, 2\)"),
        ("0 .5 .5 .1 .1\n0.5 .5 .5 .1 .1", {}, "line 2: the class is 0.5"),
        ("0 .5 .5 .1", {}, "line 1: 3 numbers after the class"),
        ("0 .5 .5 .1 x", {}, "must be numbers"),
        ("0 20 10 5 5", {}, "must be fractions of the image"),
        ("0 nan .5 .1 .1", {}, "must be fractions of the image"),
        ("", {"names": []}, "'names' must be a list"),
        ("", {"names": ["a", "a"]}, "the class name 'a' occurs twice"),
        ("", {"names": {0: "a", 2: "b"}}, "'names' must be a list"),
        ("", {"nc": 3}, "nc is 3, but there are 2 names"),
        ("", {"train": "nowhere"}, "train: 'nowhere' does not exist"),
        ("", {"train": None, "val": None}, "none of train, val, test names images"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(
    layout, tmp_path, labels, content, text
):
    with pytest.raises(ValueError, match=text):
        convert_yolo(layout(labels, **content), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "train.json").exists()


def test_no_file_is_replaced(layout, tmp_path):
    data = layout()
    convert_yolo(data, str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="train.json exists"):
        convert_yolo(data, str(tmp_path / "out"))
    convert_yolo(data, str(tmp_path / "out"), overwrite=True)


@pytest.mark.parametrize("text", ["[2]", "2\n", " 2 "])
def test_images_of_a_list_are_cut_out(write, tmp_path, text):
    path, _ = write(lvis_data())
    (tmp_path / "ids.txt").write_text(text)
    output = str(tmp_path / "minival.json")
    cut_images(path, read_ids(str(tmp_path / "ids.txt")), output)
    found, whole = read_annotations(output), read_annotations(path)
    assert found.image_id.tolist() == [2] and found.id.tolist() == [13]
    assert found.categories == whole.categories and found.federated
    assert found.training_image_count == whole.training_image_count == (4, 400)
    assert json.loads(Path(output).read_text())["images"][0]["neg_category_ids"] == [3]
    with pytest.raises(FileExistsError):
        cut_images(path, [2], output)
    with pytest.raises(ValueError, match="1 of 2 ids are no images of it: 9"):
        cut_images(path, [2, 9], str(tmp_path / "other.json"))
