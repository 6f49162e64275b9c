"""`d2-balance eval`: figures equal those of a training's evaluator, and what is refused."""

import json
import math

import pytest

from d2_balance.cli import main as cli
from d2_balance.evaluation import COCOGroupEvaluator, LVISGroupEvaluator

from ..evaluation.conftest import rng, sets  # noqa: F401  fixtures

EVALUATORS = {"lvis": LVISGroupEvaluator, "coco": COCOGroupEvaluator}


def run(*arguments):
    return cli.main(["eval", *map(str, arguments)])


@pytest.mark.parametrize("style", EVALUATORS)
def test_figures_equal_those_of_the_evaluator(style, sets, rng, tmp_path, capsys):  # noqa: F811
    dataset = sets.make_dataset(rng, num_classes=12, num_images=20, lvis=style == "lvis")
    name = sets.register(dataset, style)
    evaluator = EVALUATORS[style](name, output_dir=str(tmp_path / "out"))
    results = sets.feed(evaluator, dataset, sets.make_detections(rng, dataset), masks=True)
    predictions = tmp_path / f"out/predictions_{name}.json"
    out, table = tmp_path / "figures.json", tmp_path / "classes.csv"
    truth = tmp_path / f"{name}.json"
    assert run(predictions, "--dataset", truth, "--json", out, "--csv", table) == 0
    found = json.loads(out.read_text())
    assert (found["rules"], found["images"], list(found["results"])) == (style, 20, list(results))
    for task, metrics in results.items():
        expected = {k: None if math.isnan(v) else pytest.approx(v) for k, v in metrics.items()}
        assert found["results"][task] == expected and metrics["AP"] > 5
    written = json.loads((tmp_path / f"out/per_class_ap_{name}.json").read_text())
    assert found["classes"] == written
    assert table.read_text() == (tmp_path / f"out/per_class_ap_{name}.csv").read_text()
    printed = capsys.readouterr().out
    assert f"| box  | {results['bbox']['AP']:.1f}" in printed and "| class12 " in printed


# One image, three classes; class c has no object. AP of a: the better of two detections fits, 1.
# AP of b: the fitting detection stands below one that does not, 1/2.
TRUTH = {
    "images": [{"id": 7, "width": 100, "height": 80}],
    "categories": [{"id": i, "name": n} for i, n in ((2, "a"), (4, "b"), (9, "c"))],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 20], "area": 400},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [40, 0, 20, 20], "area": 400},
    ],
}
FOUND = [
    {"image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 20], "score": 0.9},
    {"image_id": 7, "category_id": 2, "bbox": [60, 60, 9, 9], "score": 0.8},
    {"image_id": 7, "category_id": 4, "bbox": [70, 40, 9, 9], "score": 0.7},
    {"image_id": 7, "category_id": 4, "bbox": [40, 0, 20, 20], "score": 0.6},
]


@pytest.fixture
def files(tmp_path):
    """Writes the ground truth and predictions; a text is written as it is."""

    def write(found=FOUND, truth=TRUTH):
        paths = tmp_path / "found.json", tmp_path / "truth.json"
        for path, content in zip(paths, (found, truth), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths[0], "--dataset", paths[1]

    return write


def figures(files, tmp_path, *arguments, **contents):
    out = tmp_path / "figures.json"
    assert run(*files(**contents), "--json", out, "--overwrite", *arguments) == 0
    return json.loads(out.read_text())


def test_groups_come_from_the_training_set(files, tmp_path):
    train = json.loads(json.dumps(TRUTH))
    train["images"] += [{"id": i, "width": 9, "height": 9} for i in (8, 9)]
    train["annotations"] += [  # a: 3 images, two objects in one of them; b: 1, and a crowd
        {"id": 10 + n, "image_id": i, "category_id": c, "bbox": [0, 0, 5, 5], "iscrowd": crowd}
        for n, (i, c, crowd) in enumerate([(8, 2, 0), (8, 2, 0), (9, 2, 0), (9, 4, 1)])
    ]
    train["categories"] = train["categories"][:2]
    (tmp_path / "train.json").write_text(json.dumps(train))
    arguments = ["--train", tmp_path / "train.json", "--cuts", 1, 2]
    found = figures(files, tmp_path, *arguments)
    counts = {n: (r["group"], r["train_image_count"]) for n, r in found["classes"].items()}
    assert counts == {"a": ("f", 3), "b": ("r", 1), "c": ("r", 0)}
    bbox = found["results"]["bbox"]
    assert (bbox["APf"], bbox["APr"], bbox["AP"]) == pytest.approx((100, 50, 75))
    assert bbox["APc"] is None and found["classes"]["c"]["AP"] is None
    assert any("1 of 3 classes" in n and "not listed in" in n and "c" in n for n in found["notes"])


def test_an_empty_list_of_detections_gives_zero(files, tmp_path):
    found = figures(files, tmp_path, found=[])
    bbox = found["results"]["bbox"]
    assert any("hold no detection, so that every AP is 0" in note for note in found["notes"])
    assert bbox["AP"] == bbox["AP50"] == 0 and bbox["APl"] is None


def test_the_limit_of_detections_is_kept(files, tmp_path):
    assert figures(files, tmp_path)["results"]["bbox"]["AP"] == pytest.approx(75)
    # one detection an image and class: that of b which does not fit
    assert figures(files, tmp_path, "--max-dets", 1)["results"]["bbox"]["AP"] == pytest.approx(50)


def test_predictions_that_fit_nothing_get_a_note(files, tmp_path):
    elsewhere = [d | {"bbox": [80, 60, 9, 9]} for d in FOUND]
    notes = figures(files, tmp_path, found=elsewhere)["notes"]
    assert any(note.startswith("not one detection fits an object of") for note in notes)
    assert not any("not one" in n for n in figures(files, tmp_path)["notes"])


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0, math.nan, 5, 5], "box is not finite"),
        ([0, 0, -5, 5], "box of negative size"),
        ([200, 0, 5, 5], "box outside the image"),
    ],
)
def test_bad_boxes_of_the_ground_truth_are_left_out_and_noted(files, tmp_path, box, reason):
    truth = json.loads(json.dumps(TRUTH))
    truth["annotations"].append({"id": 3, "image_id": 7, "category_id": 9, "bbox": box})
    found = figures(files, tmp_path, truth=truth)
    assert found["classes"]["c"]["AP"] is None  # as if it were not there
    assert any("1 bad annotations of" in n and reason in n for n in found["notes"])


def changed(**fields):
    return [FOUND[0], FOUND[1] | fields]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("", "found.json: the file is empty; copy or write it again"),
        ('[{"image_id": 7, "cat', "the file ends too early"),
        (TRUTH, "must be a list of detections, not a dict"),
        ([3], "detection 0: 3 is no object"),
        ([{"image_id": 7, "score": 1}], "detection 0: lacks 'category_id'"),
        ([{"image_id": 7, "score": 1, "category_id": 2}], "neither bbox nor segmentation"),
        (changed(score=math.nan), "detection 1: score is nan; it must be a finite number"),
        (changed(score="high"), "detection 1: score is 'high'"),
        (changed(image_id=[7]), "detection 1: 'image_id' is [7]"),
        (changed(bbox=[0, 0, math.nan, 5]), "detection 1: bbox is [0, 0, nan, 5]"),
        (changed(bbox=[0, 0, -3, 5]), "width and height must be at least 0"),
        (changed(bbox=[0, 0, 3]), "four finite numbers"),
        (changed(image_id=8), "1 of 2 detections are of 1 images that"),
        (changed(category_id=0), "(2 to 9), not the model's class index"),
        (
            changed(segmentation={"size": [100, 80], "counts": "a"}),
            "detection 1: the mask is [100, 80] pixels (height, width), but image 7 is [80, 100]",
        ),
        (changed(segmentation=[[0, 0, 1, 1, 2, 2]]), "segmentation must be an RLE"),
        (
            changed(segmentation={"size": 80, "counts": "a"}),
            "size is 80; it must be [height, width]",
        ),
        (
            changed(segmentation={"size": [80, 100], "counts": [9]}),
            "counts is a list; it must be a",
        ),
        (
            changed(segmentation={"size": [80, 100], "counts": "4"}),
            "the mask is no RLE: its runs have 4 pixels, not the 8,000 of its size",
        ),
    ],
)
def test_predictions_that_cannot_be_used_are_named(files, capsys, found, message):
    assert run(*files(found=found)) == 2
    error = capsys.readouterr().err
    assert message in error and "found.json" in error and len(error.splitlines()) == 1


def test_ground_truth_that_cannot_be_used_is_named(files, tmp_path, capsys):
    twins = TRUTH | {"categories": [{"id": i, "name": "a"} for i in (2, 4)]}
    assert run(*files(truth=twins)) == 2
    assert "categories 2 and 4 have the same name 'a'" in capsys.readouterr().err
    predictions, *_ = files()
    assert run(predictions, "--dataset", "no_such_set") == 2
    assert "--dataset: 'no_such_set' is neither a registered dataset" in capsys.readouterr().err
    assert run(*files(), "--train", tmp_path / "gone.json") == 2
    assert "--train: " in capsys.readouterr().err
    assert run(*files(), "--tasks", "segm") == 2
    assert "segm needs 'segmentation' in every detection; 4 have none" in capsys.readouterr().err
    assert run(*files(), "--max-dets", 0) == 2
    assert "max_dets must be at least 1, not 0" in capsys.readouterr().err


def test_existing_outputs_stay_without_overwrite(files, tmp_path, capsys):
    out = tmp_path / "figures.json"
    out.write_text("mine")
    assert run(*files(), "--json", out) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_registered_sets_are_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "found.json").write_text("[]")
    arguments = ["--dataset", "mini_lvis_val", "--train", "mini_lvis_train", "--classes", 3]
    assert run(tmp_path / "found.json", *arguments) == 0
    printed = capsys.readouterr().out
    assert "0 detections on 200 images of mini_lvis_val, LVIS rules" in printed
    assert "3 of 30 classes, rarest first" in printed
