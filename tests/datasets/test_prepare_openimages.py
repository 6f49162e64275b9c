"""Open Images as one LVIS-style file, on four images whose labels can be followed by hand."""

import json

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from PIL import Image

from d2_balance import add_balance_config
from d2_balance.data import ImageLabels, register_json

# Entity > Animal > {Dog, Cat}; Entity > Vehicle > Car, and Wheel, a part of Car
HIERARCHY = {
    "LabelName": "/m/entity",
    "Subcategory": [
        {
            "LabelName": "/m/animal",
            "Subcategory": [{"LabelName": "/m/dog"}, {"LabelName": "/m/cat"}],
        },
        {
            "LabelName": "/m/vehicle",
            "Subcategory": [{"LabelName": "/m/car", "Part": [{"LabelName": "/m/wheel"}]}],
        },
    ],
}
CLASSES = ["animal", "dog", "cat", "car", "vehicle", "wheel"]  # ids 1 to 6
ANIMAL, DOG, CAT, CAR, VEHICLE, WHEEL = range(1, 7)
BOXES = [  # image, label, XMin, XMax, YMin, YMax, IsGroupOf
    ("p1", "dog", 0.1, 0.5, 0.2, 0.6, 0),
    ("p1", "animal", 0.1, 0.5, 0.2, 0.6, 0),  # the dog again: one box of animal, not two
    ("p1", "wheel", 0.0, 1.0, 0.0, 1.0, 0),
    ("p3", "cat", 0.0, 0.5, 0.5, 1.0, 1),
    ("p3", "dog", 0.5, 0.75, 0.0, 0.5, 0),
    ("gone", "car", 0.0, 0.5, 0.0, 0.5, 0),
]
LABELS = [
    ("p1", "dog", 1),
    ("p1", "vehicle", 0),
    ("p2", "car", 1),
    ("p2", "animal", 0),
    ("p3", "cat", 1),
    ("p3", "dog", 1),
    ("p3", "wheel", 0),
    ("p3", "animal", 0),  # against the dog: positive wins
]


@pytest.fixture
def files(tmp_path):
    """files(boxes=, labels=, hierarchy=, classes=) -> the arguments of the script but --train."""
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("p1", "p2", "p3"):
        Image.new("RGB", (200, 100)).save(directory / f"{name}.jpg")

    def write(boxes=BOXES, labels=LABELS, hierarchy=HIERARCHY, classes=CLASSES):
        head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf"
        rows = [f"{p},x,/m/{c},1,{a},{b},{d},{e},{g}" for p, c, a, b, d, e, g in boxes]
        (tmp_path / "boxes.csv").write_text("\n".join([head, *rows]))
        rows = [f"{p},verification,/m/{c},{v}" for p, c, v in labels]
        head = "ImageID,Source,LabelName,Confidence"
        (tmp_path / "labels.csv").write_text("\n".join([head, *rows]))
        (tmp_path / "classes.csv").write_text("\n".join(f"/m/{c},{c.title()}" for c in classes))
        (tmp_path / "hierarchy.json").write_text(json.dumps(hierarchy))
        arguments = [tmp_path / "boxes.csv", tmp_path / "out.json", "--images", directory]
        for key in ("labels", "classes"):
            arguments += [f"--{key}", tmp_path / f"{key}.csv"]
        return [*arguments, "--hierarchy", tmp_path / "hierarchy.json"]

    return write


@pytest.fixture
def prepared(files, script, tmp_path):
    status, out, err = script("prepare_openimages", *files())
    assert status == 0, err
    return json.loads((tmp_path / "out.json").read_text()), out


def test_boxes_count_for_every_class_above(prepared):
    data, _ = prepared
    found = [
        (a["image_id"], a["category_id"], a["bbox"], a.get("ignore", 0), a.get("iscrowd", 0))
        for a in data["annotations"]
    ]
    dog, cat = [20, 20, 80, 40], [0, 50, 100, 50]  # of 200 x 100 pixels
    assert found == [
        ("p1", ANIMAL, dog, 0, 0),
        ("p1", DOG, dog, 0, 0),
        ("p1", WHEEL, [0, 0, 200, 100], 0, 0),  # a part is no car
        ("p3", ANIMAL, cat, 1, 1),
        ("p3", ANIMAL, [100, 0, 50, 50], 0, 0),
        ("p3", DOG, [100, 0, 50, 50], 0, 0),
        ("p3", CAT, cat, 1, 1),
    ]
    assert [a["id"] for a in data["annotations"]] == list(range(1, 8))


def test_verified_labels_go_up_when_positive_and_down_when_negative(prepared):
    data, _ = prepared
    labels = {
        i["id"]: (i["neg_category_ids"], i["not_exhaustive_category_ids"]) for i in data["images"]
    }
    assert labels == {
        "p1": ([CAR, VEHICLE], []),  # no vehicle, so no car; the wheel has a box
        "p2": ([ANIMAL, DOG, CAT], [CAR, VEHICLE]),  # a car that nobody marked
        "p3": ([WHEEL], [ANIMAL, CAT]),  # cats stand in a group; dog and animal were seen
    }
    assert next((i["file_name"], i["height"], i["width"]) for i in data["images"]) == (
        "p1.jpg",
        100,
        200,
    )


def test_counts_are_images_with_a_single_object(prepared):
    data, out = prepared
    counts = {c["name"]: (c["image_count"], c["instance_count"]) for c in data["categories"]}
    assert counts == {
        "Animal": (2, 2),
        "Dog": (2, 2),
        "Cat": (0, 0),
        "Car": (0, 0),
        "Vehicle": (0, 0),
        "Wheel": (1, 1),
    }
    assert {c["frequency"] for c in data["categories"]} == {"r"}
    assert "3 images, 7 boxes" in out and "2 of them groups" in out
    assert "left out: 1 images" in out and "gone" in out


def test_validation_takes_the_counts_of_training(files, script, tmp_path, prepared):
    (tmp_path / "out.json").rename(tmp_path / "train.json")
    arguments = files(boxes=BOXES[:1], labels=[])
    assert script("prepare_openimages", *arguments, "--train", tmp_path / "train.json")[0] == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [c["image_count"] for c in data["categories"]] == [2, 2, 0, 0, 0, 1]
    arguments = files(boxes=BOXES[:1], labels=[], classes=CLASSES[::-1])
    arguments += ["--train", tmp_path / "train.json", "--overwrite"]
    status, _, err = script("prepare_openimages", *arguments)
    assert status == 2 and "category 1 is 'Wheel' here and 'Animal' there" in err


def test_images_without_object_train_as_verified_negatives(prepared, tmp_path):
    """What is verified to be absent reaches the loss, also of an image that shows no class."""
    name = "openimages_of_test"
    register_json(name, str(tmp_path / "out.json"), str(tmp_path / "images"))
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.SEED = 1
    try:
        batch = next(iter(build_detection_train_loader(cfg)))
        listed = ImageLabels([name], len(CLASSES)).verified(batch, "cpu")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    rows = {record["image_id"]: row for record, row in zip(batch, listed.tolist(), strict=True)}
    objects = {record["image_id"]: len(record["instances"]) for record in batch}
    assert objects == {"p1": 3, "p2": 0, "p3": 2}  # groups are not trained on
    assert rows["p2"] == [True, True, True, True, True, False]
    assert rows["p1"] == [True, True, False, True, True, True]


def changed(number, **fields):
    names = ("image", "label", "x0", "x1", "y0", "y1", "group")
    rows = [dict(zip(names, row, strict=True)) for row in BOXES]
    rows[number] |= fields
    return [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"boxes": changed(1, x1=1.2)}, "boxes.csv: line 3: image p1: XMin 0.1, XMax 1.2"),
        ({"boxes": changed(1, x0="nan")}, "boxes.csv: line 3: image p1: XMin nan"),
        ({"boxes": changed(1, x0="left")}, "edges are fractions of the image in [0, 1]"),
        ({"boxes": changed(0, label="yak")}, "line 2: the label '/m/yak' is not in the file of"),
        ({"boxes": BOXES[3:] + BOXES[:1] + BOXES[3:4]}, "image p3 comes back after others; sort"),
        ({"labels": [("p1", "dog", 0.7)]}, "labels.csv: line 2: Confidence is '0.7'"),
        ({"labels": [], "boxes": BOXES[-1:]}, "none of 1 images lies in"),
        ({"classes": ["dog", "dog"]}, "classes.csv: the label '/m/dog' comes twice"),
        ({"hierarchy": {"Subcategory": []}}, "hierarchy.json: a node below the top has no"),
        (
            {"hierarchy": {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/a"}]}},
            "the label '/m/a' stands below itself",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(files, script, tmp_path, contents, message):
    status, _, err = script("prepare_openimages", *files(**contents))
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.json").exists() and not list(tmp_path.glob("*.tmp"))


def test_a_truncated_line_and_a_missing_column_are_named(files, script, tmp_path):
    arguments = files()
    with open(tmp_path / "boxes.csv", "a") as file:
        file.write("\np9,x,/m/dog,1,0.1")
    assert "boxes.csv: line 8 is cut off" in script("prepare_openimages", *arguments)[2]
    (tmp_path / "boxes.csv").write_text("ImageID,LabelName\n")
    assert "lacks the column(s) XMin, XMax" in script("prepare_openimages", *arguments)[2]


def test_an_existing_file_stays(files, script, tmp_path):
    arguments = files()
    (tmp_path / "out.json").write_text("mine")
    status, _, err = script("prepare_openimages", *arguments)
    assert status == 2 and "out.json exists; --overwrite replaces it" in err
    assert (tmp_path / "out.json").read_text() == "mine"
    assert script("prepare_openimages", *arguments, "--overwrite")[0] == 0
