"""What annotation tools and public files hold: read as what it means, or refused.

Each test stands for one way in which a good guess is wrong. Where a value is read, the loader, the
counts and the evaluation read it alike.
"""

import json
import logging
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools import mask as mask_utils

from d2_balance.cli import main as cli
from d2_balance.data import bad_annotations, load_json, register_json
from d2_balance.data.annotations import parse_annotations
from d2_balance.data.checks.classes import check_class_count
from d2_balance.data.checks.images import check_image_sizes
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.matching import GroundTruth
from d2_balance.evaluation.predictions import read_predictions

from .conftest import coco_data, lvis_data

NAN, INFINITE = math.nan, math.inf


def read(change=lambda data: None, data=None):
    """The columns of `coco_data` after a change."""
    data = data or coco_data()
    change(data)
    return parse_annotations(json.dumps(data).encode(), "a.json")


def second(**fields):
    """A change of the annotation 12, of class 7 in image 1."""
    return lambda data: data["annotations"][1].update(fields)


def image(**fields):
    return lambda data: data["images"][0].update(fields)


REFUSED = {
    "width": ("40", None, True, 0, -40, 40.5, NAN, INFINITE, [40]),
    "height": ("30", None, False, 0, NAN, 1e12),
    "image id": (None, True, NAN, 1.5, [1]),
    "image_id": ("1", None, True, NAN, 1.5, {}),
    "category_id": ("7", None, True, NAN, 7.5, [7]),
    "category id": ("7", None, True, NAN, 7.5),
    "name": (None, NAN, 7, "", True),
    "area": ("big", True, [], {}),
    "iscrowd": ("maybe", 2, -1, [], "2"),
    "ignore": ("maybe", 2, 0.5, {}),
}
CHANGES = {
    "width": lambda v: image(width=v),
    "height": lambda v: image(height=v),
    "image id": lambda v: image(id=v),
    "category id": lambda v: lambda d: d["categories"][1].update(id=v),
    "name": lambda v: lambda d: d["categories"][1].update(name=v),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in REFUSED.items() for v in vs])
def test_a_field_that_is_no_such_number_is_refused_by_its_name(field, value):
    change = CHANGES.get(field, lambda v: second(**{field: v}))
    with pytest.raises(ValueError, match=f"a.json: .*'{field.split()[-1]}'"):
        read(change(value))


READ = {
    "width": (40, 40.0),
    "height": (30, 30.0),
    "image id": (1, 1.0),
    "image_id": (1, 1.0),
    "category_id": (7, 7.0),
    "category id": (3, 3.0),
    "bbox": ([5, 5, 8.5, 9], ["5", " 5.0", "8.5", "9e0"], [5.0, 5, 8.5, 9.0]),
    "area": (76.5, "76.5", " 76.5 "),
    "iscrowd": (0, "0", 0.0, None, NAN, "", False, "False", "0.0", -0.0),
    "ignore": (0, "0", 0.0, None, NAN, "", False, " false "),
    "segmentation": (None, [], [[]], NAN, "", {}, False),
    "keypoints": (None, [], NAN),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in READ.items() for v in vs])
def test_a_field_is_read_alike_however_its_number_is_written(write, field, value):
    change = CHANGES.get(field, lambda v: second(**{field: v}))
    data, plain = coco_data(), coco_data()
    change(value)(data)
    change(READ[field][0])(plain)
    assert load_json(*write(data)) == load_json(*write(plain, "b.json"))
    found, wanted = read(data=data), read(data=plain)
    assert found.data == wanted.data and not found.report
    assert found.class_counts().instance_count.tolist() == [1, 2]
    assert len(GroundTruth(found, "bbox").row) == 3


def test_an_image_without_a_size_has_a_remedy():
    with pytest.raises(ValueError, match="image 1: 'height' is None.*Label Studio.*take them out"):
        read(image(height=None, width=None))


@pytest.mark.parametrize("value", [None, True, "x", [], NAN, INFINITE, "nan", {}])
def test_one_wrong_number_of_a_box_leaves_the_others(value):
    found = read(second(bbox=[5, value, 8.5, 9]))
    assert found.usable.tolist() == [True, False, True] and found.report.total == 1


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_ids_given_twice_are_refused(key):
    with pytest.raises(ValueError, match=f"a.json: '{key}': the id.* more than once"):
        read(lambda d: d[key].append(dict(d[key][0])))


def test_categories_with_one_name_have_a_remedy():
    with pytest.raises(ValueError, match="categories 7 and 3 have the same name 'cat'.*delete"):
        read(lambda d: d["categories"][0].update(name="cat"))


@pytest.mark.parametrize("empty", ["images", "annotations", "categories"])
def test_empty_lists_are_read_or_named(empty):
    data = coco_data() | {empty: []}
    if empty == "annotations":
        assert read(data=data).class_counts().instance_count.tolist() == [0, 0]
        return
    with pytest.raises(ValueError, match=r"a.json: ('image_id'|'categories' is empty)"):
        read(data=data)


MASK = np.zeros((30, 40), np.uint8)
MASK[5:14, 5:13] = 1
RLE = mask_utils.encode(np.asfortranarray(MASK))
TEXT = RLE["counts"].decode()
RUNS = [155, *[9, 21] * 7, 9, 1200 - 155 - 8 * 9 - 7 * 21]


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [30.0, 40.0], "counts": TEXT},
        {"size": ["30", "40"], "counts": TEXT},
        {"counts": TEXT, "size": [3e1, 4e1]},
        {"size": [30, 40], "counts": RUNS},
        {"size": [30.0, 40], "counts": list(map(float, RUNS))},
        {"size": [30, 40], "counts": list(map(str, RUNS))},
    ],
)
@pytest.mark.parametrize("beside", [None, "text", NAN])
def test_an_rle_of_floats_or_text_is_that_of_integers(write, mask, beside):
    data = coco_data()
    second(segmentation=mask)(data)
    if beside is not None:  # sends the annotations another way
        data["annotations"][0]["segmentation"] = [[beside, 1, 2, 3, 4, 5]]
    truth = read(data=data)
    assert truth.mask_problem[1] < 0
    found = truth.segmentation(1)
    assert found["size"] == [30, 40] and all(type(n) is int for n in found["size"])
    kept = load_json(*write(data))[0]["annotations"][1]["segmentation"]
    assert (mask_utils.decode(kept) == MASK).all()
    assert (mask_utils.decode(GroundTruth(truth, "segm").rle(1)) == MASK).all()


WITHOUT_PIXEL = [
    {"size": [30, 40], "counts": [1200]},
    {"size": [30, 40], "counts": [1200, 0]},
    {"size": [30, 40], "counts": "`U1"},  # 1200 in COCO's text
    [[50, 5, 60, 5, 60, 20, 50, 20]],
    [[-9, -9, -1, -9, -1, -1], [5, 31, 9, 31, 9, 40]],
]


@pytest.mark.parametrize("mask", WITHOUT_PIXEL)
def test_a_mask_without_a_pixel_leaves_its_box_and_counts_in_no_mask_ap(tmp_path, mask):
    data = coco_data()
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotation["area"] = w * h
    second(segmentation=mask)(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    truth = read(data=data)
    assert list(truth.report.bad_masks.items()) == [("mask without a pixel of the image", [12])]
    perfect = []
    for n, annotation in enumerate(data["annotations"]):
        whole = {"size": [30, 40], "counts": TEXT} if n == 1 else GroundTruth(truth, "segm").rle(n)
        counts = whole["counts"]
        counts = counts if isinstance(counts, str) else counts.decode()
        perfect.append(
            {k: annotation[k] for k in ("image_id", "category_id", "bbox")}
            | {"score": 0.9, "segmentation": {"size": [30, 40], "counts": counts}}
        )
    (tmp_path / "p.json").write_text(json.dumps(perfect))
    results = measure(truth, read_predictions(str(tmp_path / "p.json"), truth)).evaluation.results
    assert results["bbox"]["AP"] == pytest.approx(100) == results["segm"]["AP"]


def detection(**fields):
    return {"image_id": 1, "category_id": 7, "bbox": [5, 5, 8.5, 9], "score": 0.5} | fields


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        *[({"score": v}, "score is") for v in ("0.5", None, NAN, INFINITE, 10**400)],
        *[({"score": v}, "'score' is") for v in ([], {}, True, False)],
        *[({"bbox": [5, v, 8, 9]}, "bbox is") for v in ("5", None, True, NAN, 10**400)],
        ({"category_id": True}, "'category_id' is True"),
        ({"category_id": "7"}, "category_id that a.json does not have: '7'"),
        ({"category_id": None}, "category_id that a.json does not have: None"),
        ({"image_id": True}, "'image_id' is True"),
        ({"image_id": "1"}, "images that a.json does not have, ids '1'"),
    ],
)
def test_a_detection_with_a_field_that_is_no_such_number_is_named(tmp_path, fields, text):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([detection(), detection(**fields)]))
    with pytest.raises(ValueError, match="p.json: ") as error:
        read_predictions(str(path), read())
    assert text in str(error.value)


def test_ids_of_detections_written_as_floats_are_integers(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([detection(image_id=1.0, category_id=7.0, score=1)]))
    found = read_predictions(str(path), read())
    assert found.image.tolist() == [0] and found.category.tolist() == [7]


@pytest.mark.parametrize("odd", [False, True])
def test_predictions_with_a_byte_order_mark_are_read_and_utf_16_is_named(tmp_path, odd):
    found = [detection(), detection(score=0.25, category_id=7.0 if odd else 7)]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(found), encoding="utf-8-sig")
    predictions = read_predictions(str(path), read())
    assert predictions.score.tolist() == [0.5, 0.25]
    start, end = predictions.span[1].tolist()
    assert json.loads(path.read_bytes()[start:end]) == found[1]
    path.write_text(json.dumps(found), encoding="utf-16")
    with pytest.raises(ValueError, match="p.json: the text is UTF-16; predictions must be UTF-8"):
        read_predictions(str(path), read())


def boxes(*rows):
    """A file of some boxes in one image of 40 x 30."""
    data = coco_data()
    data["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": list(box)} for n, box in enumerate(rows)
    ]
    return read(data=data).report.hints


CORNERS = [(2, 3, 30, 20), (20, 10, 38, 29), (1, 1, 9, 9), (25, 2, 39, 12)]


def test_boxes_given_as_two_corners_or_by_their_centre_are_named():
    [hint] = boxes(*CORNERS)
    assert "2 of 4 boxes leave their image" in hint and "x0, y0, x1, y1" in hint
    centres = [((a + c) / 2, (b + d) / 2, c - a, d - b) for a, b, c, d in CORNERS]
    [hint] = boxes(*centres)
    assert "centre" in hint
    assert not boxes(*[(a, b, c - a, d - b) for a, b, c, d in CORNERS])
    [hint] = boxes((30, 20, 30, 5), (35, 1, 4, 4), (1, 1, 5, 5), (2, 2, 60, 5))  # just wrong
    assert "x0, y0" not in hint and "centre" not in hint


def test_a_box_far_outside_may_be_a_rotated_rectangle():
    [hint] = boxes((1, 1, 5, 5), (30, 5, 14, 9))  # to x 44 of 40
    assert "1 boxes without a mask leave" in hint and "(annotation id 1)" in hint
    assert "Label Studio" in hint
    assert not boxes((1, 1, 5, 5), (30, 5, 11.9, 9))  # by less than 2 pixels


def test_corners_given_as_fractions_are_named():
    [hint] = boxes(*[(a / 40, b / 30, c / 40, d / 30) for a, b, c, d in CORNERS])
    assert "fractions of the image" in hint


def test_one_file_under_two_ids_is_named_however_it_is_written():
    for first, other in (("a.png", "./a.png"), ("x/a.png", "x\\a.png"), ("é.png", "é.png")):
        data = coco_data()
        data["images"][0]["file_name"], data["images"][1]["file_name"] = first, other
        assert "(ids 1, 2)" in " ".join(read(data=data).report.hints), first


def test_crowds_are_counted_by_class_in_every_report(tmp_path, write, capsys):
    data = coco_data()
    for number in range(3):
        data["annotations"].append(
            {"id": 20 + number, "image_id": 2, "category_id": 7, "bbox": [1, 1, 5, 5]}
        )
    second(iscrowd=1)(data)  # one of five dogs: no hint
    path, _ = write(data)
    report = read(data=data).report
    assert report.crowds == {"dog": 1} and not report
    assert cli.main(["analyze", path]) == 0
    out = capsys.readouterr().out
    assert "crowds" in next(line for line in out.splitlines() if line.startswith("| class "))
    (tmp_path / "p.json").write_text(json.dumps([detection()]))
    assert cli.main(["eval", str(tmp_path / "p.json"), "--dataset", path]) == 0
    assert "crowds (iscrowd 1), which are not trained on: dog 1" in capsys.readouterr().out


def test_crowds_only_end_an_analysis_with_the_tools_that_write_them(write, capsys):
    data = coco_data()
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    assert cli.main(["analyze", write(data)[0]]) == 2
    assert "3 of 3 have iscrowd 1 (or ignore 1), as CVAT" in capsys.readouterr().err


def test_a_class_that_was_left_out_is_named_beside_the_number_of_classes(write, names, cfg):
    data = coco_data()
    data["categories"] = [
        {"id": 3, "name": "cat", "supercategory": "none"},
        {"id": 7, "name": "cat", "supercategory": "cat"},
    ]
    data["annotations"] = data["annotations"][1:]
    name = names()
    register_json(name, *write(data))
    assert len(DatasetCatalog.get(name)) == 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(ValueError, match=r"set .*NUM_CLASSES to 1 \(The category 3 'cat' is left"):
        check_class_count(cfg, name, 1)


def one_image(path, size):
    return [{"file_name": str(path), "height": size[1], "width": size[0], "image_id": 1}]


@pytest.mark.parametrize("orientation", [2, 3, 4])
@pytest.mark.parametrize("square", [False, True])
def test_an_exif_turn_that_keeps_the_size_is_warned_of(tmp_path, caplog, orientation, square):
    size = (20, 20) if square else (20, 10)
    exif = Image.Exif()
    exif[274] = orientation + 4 if square else orientation
    Image.new("RGB", size).save(tmp_path / "a.jpg", exif=exif)
    with caplog.at_level(logging.WARNING, logger="d2_balance.data.checks.images"):
        check_image_sizes(one_image(tmp_path / "a.jpg", size), "mine")
    assert "rotated or flipped by their EXIF tag" in caplog.text


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("L", "bmp")],
)
def test_images_of_other_modes_are_read_as_they_look(tmp_path, caplog, mode, suffix):
    path = tmp_path / f"a b.{suffix}"
    half = Image.new("L", (20, 10))
    half.paste(255, (0, 0, 10, 10))
    half.convert("RGB").convert(mode).save(path)
    with caplog.at_level(logging.WARNING, logger="d2_balance.data.checks.images"):
        check_image_sizes(one_image(path, (20, 10)), "mine")
    assert not caplog.text
    pixels = read_image(str(path), "BGR")
    assert pixels[:, :8].min() > 200 and pixels[:, 12:].max() < 60


def test_a_mode_that_is_not_rgb_is_refused_before_training(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("LAB", (20, 10)).save(path)
    with pytest.raises(ValueError, match=r"a.tif \(mode LAB\); convert them to RGB"):
        check_image_sizes(one_image(path, (20, 10)), "mine")


@pytest.mark.parametrize("written", ["images/a.png", "images\\a.png", "./images/A.PNG"])
def test_the_last_directory_of_the_root_may_stand_in_the_names(write, written):
    data = coco_data()
    data["images"], data["annotations"] = data["images"][:1], data["annotations"][:1]
    data["images"][0]["file_name"] = written
    [record] = load_json(*write(data))
    assert record["file_name"].endswith("images/a.png")


def test_directories_of_a_server_are_left_out_of_names_that_stay_different(write):
    data = coco_data()
    for number, record in enumerate(data["images"]):
        record["file_name"] = f"/data/upload/{number}/{record['file_name']}"
    assert [r["file_name"][-12:] for r in load_json(*write(data))] == [
        "images/a.png",
        "images/b.png",
    ]
    data["images"][1]["file_name"] = "/data/upload/8/a.png"
    with pytest.raises(ValueError, match="2 of 2 images are missing"):
        load_json(*write(data))


@pytest.fixture
def shown(tmp_path, write):
    """shown(data): run `d2-balance show` on a file; its status and the files."""
    paths = []

    def show(data, **images):
        path, directory = write(data)
        paths.append(path)
        output = tmp_path / "drawn"
        status = cli.main(["show", path, "--images", directory, "--output", str(output)])
        return status, sorted(p.name for p in output.glob("*")), output

    yield show
    for path in paths:
        DatasetCatalog.pop(path, None)
        MetadataCatalog.pop(path, None)


def cut(path):
    """Cut the second half of an image off."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_show_and_analyze_name_an_image_that_is_cut_off(tmp_path, shown, capsys, names, caplog):
    data = coco_data()
    (tmp_path / "images").mkdir(exist_ok=True)
    cut(tmp_path / "images/b.png")
    with caplog.at_level(logging.WARNING, logger="d2_balance.evaluation.draw"):
        status, drawn, _ = shown(data)
    assert status == 0 and drawn == ["001_a.png"]
    assert "1 of 2 images cannot be read" in caplog.text and "b.png" in caplog.text
    name = names()
    register = ["--register", str(tmp_path / "a.json"), str(tmp_path / "images")]
    assert cli.main(["analyze", name, *register]) == 0
    out = capsys.readouterr().out
    assert "image that cannot be read" in out and "images/b.png" in out


def test_analyze_names_an_image_above_the_limit_of_pillow(write, names, capsys, monkeypatch):
    path, directory = write(coco_data())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # an error from twice that on
    assert cli.main(["analyze", names(), "--register", path, directory]) == 0
    out = capsys.readouterr().out
    assert "pixels: cut it into tiles" in out and "images/a.png" in out


def test_show_ends_with_one_message_where_nothing_can_be_drawn(tmp_path, shown, capsys):
    data = coco_data()
    for name in ("a", "b"):
        cut(tmp_path / f"images/{name}.png")
    assert shown(data)[:2] == (2, [])
    assert "2 of 2 images cannot be read and are not drawn" in capsys.readouterr().err


def test_a_thin_strip_is_not_enlarged_beyond_bounds(tmp_path, shown):
    data = coco_data()
    data["images"], data["annotations"] = data["images"][:1], data["annotations"][:1]
    data["images"][0] |= {"width": 8, "height": 500}
    data["annotations"][0]["bbox"] = [1, 20, 5, 50]
    Image.new("RGB", (8, 500)).save(tmp_path / "images/a.png")
    status, [drawn], output = shown(data)
    assert status == 0 and max(Image.open(output / drawn).size) < 1200


def counted(tmp_path, capsys, counts, *arguments):
    """Output of `eval` on an LVIS-style file whose dogs and cats have these counts."""
    data = lvis_data()
    for category, count in zip(data["categories"], counts, strict=True):
        category["image_count"] = count
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    (tmp_path / "p.json").write_text(json.dumps([detection()]))
    files = [str(tmp_path / "p.json"), "--dataset", str(tmp_path / "lvis.json")]
    status = cli.main(["eval", *files, *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_eval_says_whose_images_image_count_counts(tmp_path, capsys):
    status, text = counted(tmp_path, capsys, (400, 4))
    assert status == 0 and "training images are image_count of" in text and "| 400 " in text
    status, text = counted(tmp_path, capsys, (2, 1))
    assert status == 0 and "counts its own images, not those of a training" in text
    assert counted(tmp_path, capsys, (400, 4), "--cuts", "1", "5")[0] == 0
    status, text = counted(tmp_path, capsys, (2, 1), "--cuts", "1", "5")
    assert status == 2 and "--train" in text


def test_a_report_without_flaws_has_none_of_this(write, names, caplog):
    name = names()
    register_json(name, *write(coco_data()))
    DatasetCatalog.get(name)
    assert not bad_annotations(name) and not bad_annotations(name).crowds
