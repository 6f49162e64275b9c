"""`d2-balance analyze`: tail ratios and thresholds by hand, its page, and what is refused."""

import base64
import io
import json
import re

import pytest
import torch
import yaml
from PIL import Image

from d2_balance.analysis.tail import lambda_for_tail_ratio
from d2_balance.cli import main as cli
from d2_balance.data import ClassCounts
from d2_balance.losses.eql import tail_ratio, tail_weight

from ..analysis.conftest import coco

COUNT = torch.tensor([50, 2, 30, 8, 8, 2])  # sorted: 2, 2, 8, 8, 30, 50; sum 100


@pytest.fixture
def saved(tmp_path):
    path = str(tmp_path / "counts.json")
    ClassCounts(COUNT, COUNT * 3, 200, tuple("abcdef")).save(path)
    return path


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.03, 0.0),  # the two rarest classes together hold 4 %
        (0.04, (2 + 8) / 2 / 200),
        (0.19, (2 + 8) / 2 / 200),  # the next two would make it 20 %
        (0.20, (8 + 30) / 2 / 200),
        (1.0, (50 / 200 + 1) / 2),
    ],
)
def test_lambda_is_the_largest_whose_ratio_fits(ratio, expected):
    value = lambda_for_tail_ratio(COUNT / 200, COUNT, ratio)
    assert value == pytest.approx(expected)
    reached = tail_ratio(tail_weight(COUNT / 200, value, "step"), COUNT)
    assert reached <= ratio + 1e-9


def test_the_command_prints_the_ratio_of_a_lambda_and_the_lambda_of_a_ratio(saved, capsys):
    assert cli.main(["analyze", saved, "--lambda", "0.1", "--tail-ratio", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "200 images, 300 objects, 6 classes" in out
    assert "| rare     | 4         | 2 to 8" in out and "| common   | 2         | 30 to 50" in out
    # below 20 images: 4 classes with 20 of 100; 5 % fits the two classes of 2 images
    assert "| 0.1                        | 4              | 20.0 % |" in out
    assert "| 0.025                      | 2              | 4.0 %  |" in out


def test_registered_sets_are_counted(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    from detectron2.data import DatasetCatalog, MetadataCatalog

    records = [{"annotations": [{"category_id": 0}]}, {"annotations": [{"category_id": 1}]}]
    DatasetCatalog.register("analyze_me", lambda: records)
    MetadataCatalog.get("analyze_me").thing_classes = ["x", "y"]
    try:
        assert cli.main(["analyze", "analyze_me"]) == 0
    finally:
        DatasetCatalog.remove("analyze_me")
        MetadataCatalog.remove("analyze_me")
    assert "2 images, 2 objects, 2 classes" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    assert cli.main(["analyze", "nowhere"]) == 2
    assert "neither a registered dataset nor an annotation file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--lambda", "--tail-ratio"])
def test_shares_out_of_range_are_refused(saved, option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyze", saved, option, "1.5"])
    assert "1.5 is not in [0, 1]" in capsys.readouterr().err


RETINANET = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  RESNETS: {OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[48], [96], [192], [384], [768]]}
  RETINANET: {NUM_CLASSES: 3}
INPUT: {MIN_SIZE_TRAIN: [96]}
"""


@pytest.fixture
def files(tmp_path):
    """An annotation file with a tail, small boxes and a duplicate, and a config."""
    data = coco([[0], [0, 1]] * 25 + [[2]], sizes=(96, 96), box=(10, 10, 22, 22))
    data["annotations"].append({**data["annotations"][0], "id": 777})
    for image in data["images"]:
        image["neg_category_ids"] = [3] if image["id"] < 9 else []
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "retinanet.yaml").write_text(RETINANET)
    return tmp_path


def analyze(directory, *arguments, config=True):
    with_config = ["--config-file", str(directory / "retinanet.yaml")] if config else []
    return cli.main(["analyze", str(directory / "data.json"), *with_config, *arguments])


def test_the_page_is_one_file_with_all_parts(files, capsys):
    assert analyze(files, "--html", str(files / "page.html")) == 0
    page = (files / "page.html").read_text()
    for part in (
        "51 images, 77 objects, 3 classes",
        "Optimal prior pi*",
        "no anchor with an IoU of 0.5",
        "Tail ratio",
        "A threshold of 0.001 does nothing here",
        "Image-level labels",
        "duplicate: the same class and box",
        "What to set",
        "SIZES:",
    ):
        assert part in page
    assert re.search(r"<td>777 *</td>", page)
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing is fetched
    images = re.findall(r"base64,([^\"]+)", page)
    assert len(images) == 6
    for data in images:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.format == "PNG" and len(image.convert("L").getcolors(256)) > 8
    out = capsys.readouterr().out
    assert "WARNING: What looks like a rare or hard class is out of reach" in out
    assert "duplicate: the same class and box once more in the image" in out


def test_settings_go_to_a_file_that_builds_on_the_config(files, capsys):
    (files / "below").mkdir()
    path = files / "below" / "suggested.yaml"
    given = ("--set", "SOLVER.MAX_ITER", "7")
    assert analyze(files, "--yaml", str(path), *given) == 0
    written = yaml.safe_load(path.read_text())
    assert written["_BASE_"] == "../retinanet.yaml"
    assert written["SOLVER"]["MAX_ITER"] == 7
    assert written["MODEL"]["ANCHOR_GENERATOR"]["SIZES"][0][0] < 48
    from d2_balance.engine import read_config

    assert read_config(str(path)).MODEL.BALANCE.CLS_LOSS == "EFL"


def test_without_a_config_the_data_are_shown(files, capsys):
    assert analyze(files, config=False) == 0
    out = capsys.readouterr().out
    assert "Give --config-file to see what its anchors make of the objects." in out
    assert "Foreground" not in out and "CLS_LOSS: EQL" in out


def test_cut_points_of_ones_own(files, capsys):
    assert analyze(files, "--cuts", "1", "30", config=False) == 0
    out = capsys.readouterr().out
    assert "| rare     | 1         | 1 to 1" in out and "| common   | 1         | 25 to 25" in out
    assert "Rare: up to 1 images, common: up to 30." in out


@pytest.mark.parametrize("option", ["--html", "--yaml"])
def test_outputs_are_not_replaced_by_accident(option, files, capsys):
    path = files / "there"
    path.write_text("mine")
    assert analyze(files, option, str(path)) == 2
    assert f"{path} exists; --overwrite replaces it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert analyze(files, option, str(path), "--overwrite") == 0
    assert path.read_text() != "mine"


def test_a_page_that_fails_leaves_nothing(files, monkeypatch):
    from d2_balance.analysis import plots

    def fail(found):
        raise RuntimeError("no drawing")

    monkeypatch.setattr(plots, "plot_classes", fail)
    with pytest.raises(RuntimeError):
        analyze(files, "--html", str(files / "page.html"), config=False)
    assert not [f for f in files.iterdir() if "page" in f.name]


def spoil(data, kind):
    if kind == "cut":
        return json.dumps(data)[:-30]
    if kind == "category":
        data["annotations"][0]["category_id"] = 99
    if kind == "name":
        data["categories"][1]["name"] = "class0"
    if kind == "empty":
        data["annotations"] = []
    return json.dumps(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "data.json: not valid JSON .* the file ends too early"),
        ("category", r"data.json: 'category_id' 99 of 1 annotation\(s\) \(ids 100\)"),
        ("name", "data.json: the categories 1 and 2 have the same name 'class0'"),
        ("empty", "data.json: no image has an object to train on"),
    ],
)
def test_bad_files_end_with_one_message(kind, message, files, capsys):
    path = files / "data.json"
    path.write_text(spoil(json.loads(path.read_text()), kind))
    assert analyze(files) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config-file", "none.yaml"],
            "none.yaml' does not exist; it must be a file",
        ),
        (["--set", "SEED", "1"], "--set changes keys of a --config-file, and there is none"),
        (["--cuts", "9", "3"], "--cuts 9 3: RARE must not be above COMMON"),
    ],
)
def test_mistaken_arguments_end_with_one_message(arguments, message, files, capsys):
    assert analyze(files, *arguments, config=False) == 2
    assert message in capsys.readouterr().err


def test_missing_and_other_images_are_named(files, capsys):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    images = files / "images"
    images.mkdir()
    for number in range(51):
        size = (90, 96) if number == 7 else (96, 96)
        if number != 5:
            Image.new("RGB", size).save(images / f"{number}.png")
    (images / "9.png").write_text("no image")
    try:
        register = ["--register", str(files / "data.json"), str(images)]
        assert cli.main(["analyze", "analyze_images", *register]) == 0
    finally:
        DatasetCatalog.pop("analyze_images", None)
        MetadataCatalog.pop("analyze_images", None)
    out = capsys.readouterr().out
    assert re.search(r"image that does not exist +\| 1 .*5\.png", out)
    assert re.search(r"image of another size than the file says +\| 1 .*7\.png", out)
    assert re.search(r"image that cannot be read +\| 1 .*9\.png", out)
