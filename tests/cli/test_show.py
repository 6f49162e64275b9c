"""`d2-balance show`: which images, in which order, and what is drawn on them."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_balance.cli import main as cli
from d2_balance.evaluation.draw import rarest_first

CATEGORIES = [{"id": 4, "name": "often"}, {"id": 7, "name": "seldom"}, {"id": 9, "name": "never"}]


def objects(*classes, crowd=()):
    return [{"category_id": k, "iscrowd": int(k in crowd)} for k in classes]


def test_each_class_in_turn_gives_a_image_the_rarest_first():
    records = [
        {"image_id": n, "annotations": a}
        for n, a in enumerate(
            [objects(0), objects(0, 1), objects(), objects(2, crowd=[2]), objects(1), objects(0, 2)]
        )
    ]
    counts = [50, 9, 3]

    def ids(limit):
        return [r["image_id"] for r in rarest_first(records, counts, limit)]

    # class 2 is in image 5 only (a crowd in 3), then class 1 with 1, class 0 with 0, class 1: 4
    assert ids(4) == [5, 1, 0, 4]
    assert ids(3) == [5, 1, 0]
    # what shows no object comes last
    assert ids(9) == [5, 1, 0, 4, 2, 3]


@pytest.fixture
def files(tmp_path):
    """Three grey images of 80 x 60 pixels: a file with them, and their directory."""
    directory = tmp_path / "images"
    directory.mkdir()
    for n in range(3):
        Image.new("RGB", (80, 60), (128, 128, 128)).save(directory / f"p{n}.png")
    boxes = [(0, 4, [5, 5, 30, 30]), (1, 7, [40, 20, 30, 30]), (2, 4, [5, 5, 9, 9])]
    data = {
        "images": [
            {"id": n, "file_name": f"p{n}.png", "width": 80, "height": 60} for n in range(3)
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b}
            for n, (i, c, b) in enumerate(boxes, start=1)
        ],
        "categories": CATEGORIES,
    }
    data["images"][1] |= {"neg_category_ids": [9], "not_exhaustive_category_ids": [7]}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    yield path, "--images", directory
    DatasetCatalog.pop(str(path), None)
    MetadataCatalog.pop(str(path), None)


def run(*arguments):
    return cli.main(["show", *map(str, arguments)])


def pixels_of(path, group):
    """How many pixels lean to the colour of a group: rare is orange, frequent is blue.

    The images are grey, so that only what is drawn has a colour.
    """
    red, _, blue = np.asarray(Image.open(path).convert("RGB"), dtype=int).transpose(2, 0, 1)
    return int(((red - blue if group == "r" else blue - red) > 60).sum())


def test_objects_are_drawn_in_the_colour_of_their_group(files, tmp_path, capsys):
    train = json.loads(files[0].read_text())
    train["images"] = [{"id": n, "width": 80, "height": 60} for n in range(120)]
    train["annotations"] = [
        {"id": n, "image_id": n, "category_id": 4 if n < 110 else 7, "bbox": [1, 1, 5, 5]}
        for n in range(120)
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    out = tmp_path / "out"
    assert run(*files, "--output", out, "--train", tmp_path / "train.json", "--count", 2) == 0
    paths = [out / "001_p1.png", out / "002_p0.png"]  # the rare class first
    assert capsys.readouterr().out.split() == [str(p) for p in paths]
    assert sorted(out.iterdir()) == paths
    legend = pixels_of(paths[1], "r")  # of an image without a rare class
    assert pixels_of(paths[0], "r") > legend + 500
    assert pixels_of(paths[1], "f") > pixels_of(paths[0], "f") + 500


def test_detections_stand_beside_the_objects(files, tmp_path, capsys):
    box = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 40, 30]}
    (tmp_path / "found.json").write_text(json.dumps([box | {"score": s} for s in (0.9, 0.1)]))
    arguments = [*files, "--predictions", tmp_path / "found.json", "--count", 1]
    assert run(*files, "--count", 1, "--output", tmp_path / "alone") == 0
    sizes = {}
    for name, score in (("one", 0.5), ("none", 0.95)):
        assert run(*arguments, "--output", tmp_path / name, "--min-score", score) == 0
        sizes[name] = Image.open(tmp_path / name / "001_p1.png").size
    alone = Image.open(tmp_path / "alone/001_p1.png").size
    assert sizes["one"] == sizes["none"] and sizes["one"][0] > 1.9 * alone[0]
    drawn = {n: pixels_of(tmp_path / n / "001_p1.png", "r") for n in ("one", "none")}
    assert drawn["one"] > drawn["none"] + 500


def test_classes_choose_images(files, tmp_path, capsys):
    assert run(*files, "--output", tmp_path / "out", "--classes", "often") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["001_p0.png", "002_p2.png"]
    capsys.readouterr()
    assert run(*files, "--output", tmp_path / "more", "--classes", "offten") == 2
    assert "has no class 'offten'; did you mean often?" in capsys.readouterr().err
    assert run(*files, "--output", tmp_path / "more", "--classes", "never") == 2
    assert "no image shows never" in capsys.readouterr().err


def test_files_that_exist_stay(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "002_p0.png").write_text("mine")
    assert run(*files, "--output", out) == 2
    assert "002_p0.png exists, and show replaces no file" in capsys.readouterr().err
    assert [p.read_text() for p in out.iterdir()] == ["mine"]


def test_a_registered_set_is_drawn_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert run("mini_lvis_val", "--count", 1, "--output", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("001_*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is neither a registered dataset nor an annotation file"),
        (["{truth}"], "truth.json: --images must name the directory"),
        (["mini_lvis_val", "--images", "."], "--images is for annotation files"),
        (
            ["{truth}", "--images", "{images}", "--count", "0"],
            "--count is 0; it must be at least 1",
        ),
        (["{truth}", "--images", "{images}", "--min-score", "3"], "it must be in [0, 1]"),
        (["{truth}", "--images", "{images}", "--predictions", "{foreign}"], "images that"),
        (["{truth}", "--images", "{images}", "--predictions", "{images}/p0.png"], "not valid JSON"),
    ],
)
def test_what_cannot_be_drawn_is_named(files, tmp_path, capsys, arguments, message):
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps([{"image_id": 8, "category_id": 4, "score": 1, "bbox": [0] * 4}]))
    names = {"truth": files[0], "images": files[2], "foreign": foreign}
    assert run(*[a.format(**names) for a in arguments], "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_image_of_another_size_is_named(files, tmp_path, capsys):
    Image.new("RGB", (60, 80)).save(files[2] / "p1.png")
    assert run(*files, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1 of 3 checked images are not of the size" in error
    assert "image 1 (" in error and "p1.png) is 60 x 80, not 80 x 60; give the images" in error
