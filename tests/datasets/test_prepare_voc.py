"""VOC XML as COCO-style JSON, with boxes counted by hand."""

import json

import pytest
from PIL import Image

from d2_balance.data import load_json


def xml(size=(50, 40), objects=(), filename="a.jpg"):
    """Text of a VOC file; size is (width, height), objects are (name, box, difficult)."""
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(
            f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>"
        for name, box, difficult in objects
    ]
    head = f"<filename>{filename}</filename>" if filename else ""
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{head}{size}{''.join(parts)}</annotation>"


OBJECTS = {
    "a": [("dog", (1, 1, 10, 20), 0), ("cat", (11, 5, 50, 40), 1)],
    "b": [("dog", (3, 4, 3, 4), 0)],
}


@pytest.fixture
def root(tmp_path):
    """A directory of two images of 50 x 40 pixels, in the layout of VOC."""
    for directory in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "voc" / directory).mkdir(parents=True)
    for stem, objects in OBJECTS.items():
        Image.new("RGB", (50, 40)).save(tmp_path / f"voc/JPEGImages/{stem}.jpg")
        text = xml(objects=objects, filename=f"{stem}.jpg")
        (tmp_path / f"voc/Annotations/{stem}.xml").write_text(text)
    (tmp_path / "voc/ImageSets/Main/b.txt").write_text("b  1\n")
    return tmp_path / "voc"


def test_boxes_count_pixels_from_zero_and_difficult_objects_are_crowds(root, script, tmp_path):
    status, out, err = script("prepare_voc", root, tmp_path / "out.json")
    assert status == 0, err
    assert "2 images, 3 objects, 2 classes" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert data["images"] == [
        {"id": 1, "file_name": "a.jpg", "height": 40, "width": 50},
        {"id": 2, "file_name": "b.jpg", "height": 40, "width": 50},
    ]
    found = [
        (a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in data["annotations"]
    ]
    assert found == [
        (1, 2, [0, 0, 10, 20], 0),  # pixels 1 to 10 and 1 to 20
        (1, 1, [10, 4, 40, 36], 1),
        (2, 2, [2, 3, 1, 1], 0),  # one pixel
    ]
    records = load_json(str(tmp_path / "out.json"), str(root / "JPEGImages"))
    assert [[o["category_id"] for o in r["annotations"]] for r in records] == [[1, 0], [1]]


def test_a_list_chooses_images_and_classes_stay(root, script, tmp_path):
    arguments = [root, tmp_path / "out.json", "--list", root / "ImageSets/Main/b.txt"]
    assert script("prepare_voc", *arguments)[0] == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [i["file_name"] for i in data["images"]] == ["b.jpg"]
    assert [c["name"] for c in data["categories"]] == ["cat", "dog"]
    (tmp_path / "classes.txt").write_text("dog\n\nox\n")
    arguments += ["--classes", tmp_path / "classes.txt", "--overwrite"]
    assert script("prepare_voc", *arguments)[0] == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [c["name"] for c in data["categories"]] == ["dog", "ox"]


def test_a_image_is_found_by_the_name_of_its_xml_file(root, script, tmp_path):
    (root / "Annotations/a.xml").write_text(xml(filename="renamed.png"))
    (root / "Annotations/b.xml").write_text(xml(filename="", size=None, objects=OBJECTS["b"]))
    assert script("prepare_voc", root, tmp_path / "out.json")[0] == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [i["file_name"] for i in data["images"]] == ["a.jpg", "b.jpg"]


def test_a_turned_image_has_the_size_that_it_is_seen_in(root, script, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees: 50 x 40 is seen as 40 x 50
    Image.new("RGB", (50, 40)).save(root / "JPEGImages/a.jpg", exif=exif)
    (root / "Annotations/a.xml").write_text(xml(size=(40, 50)))
    assert script("prepare_voc", root, tmp_path / "out.json")[0] == 0
    image = json.loads((tmp_path / "out.json").read_text())["images"][0]
    assert (image["height"], image["width"]) == (50, 40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (xml(objects=OBJECTS["a"])[:60], "a.xml: not valid XML: unclosed token"),
        (xml(size=(40, 50)), "<size> is 40 x 50 pixels, but"),
        (xml(objects=[("dog", (10, 1, 5, 9), 0)]), "object 1 (dog): xmax and ymax must not be"),
        (xml(objects=[("dog", ("nan", 1, 5, 9), 0)]), "a.xml: <xmin> is 'nan'; it must be a num"),
        (xml(objects=[("dog", ("", 1, 5, 9), 0)]), "a.xml: <xmin> is ''"),
        (xml(objects=[(" ", (1, 1, 5, 9), 0)]), "a.xml: object 1 lacks <name> or <bndbox>"),
    ],
)
def test_xml_that_cannot_be_used_is_named(root, script, tmp_path, text, message):
    (root / "Annotations/a.xml").write_text(text)
    status, _, err = script("prepare_voc", root, tmp_path / "out.json")
    assert status == 2 and message in err and "a.xml" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_missing_images_files_and_classes_are_named(root, script, tmp_path):
    out = tmp_path / "out.json"
    assert "is no directory; ROOT must hold Annotations/" in script("prepare_voc", tmp_path, out)[2]
    (tmp_path / "list.txt").write_text("c\n")
    err = script("prepare_voc", root, out, "--list", tmp_path / "list.txt")[2]
    assert "c.xml: cannot be read: No such file" in err
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    err = script("prepare_voc", root, out, "--classes", tmp_path / "classes.txt")[2]
    assert "class name(s) cat come twice; list each once" in err
    (tmp_path / "classes.txt").write_text("cat\n")
    err = script("prepare_voc", root, out, "--classes", tmp_path / "classes.txt")[2]
    assert "a.xml: the class 'dog' is not in" in err
    (root / "JPEGImages/b.jpg").unlink()
    assert "b.jpg: no image that can be read" in script("prepare_voc", root, out)[2]
