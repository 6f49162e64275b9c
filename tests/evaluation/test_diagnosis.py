"""Curves, calibration, confusion and error types on examples that can be counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from d2_balance.cli import main as cli
from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation.diagnosis import diagnose
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.predictions import read_predictions

A, B, C = 2, 4, 9  # category ids


def truth(tmp_path, objects, lvis=False, not_exhaustive=()):
    """One image of 100 x 80 pixels; objects are (class, box)."""
    image = {"id": "p", "width": 100, "height": 80}
    categories = [{"id": i, "name": n} for i, n in ((A, "a"), (B, "b"), (C, "c"))]
    if lvis:
        image |= {
            "neg_category_ids": [],
            "not_exhaustive_category_ids": list(not_exhaustive),
        }
        for category, letter in zip(categories, "rff", strict=True):
            category["frequency"] = letter
    annotations = [
        {"id": n, "image_id": "p", "category_id": c, "bbox": b, "area": b[2] * b[3]}
        for n, (c, b) in enumerate(objects, start=1)
    ]
    path = tmp_path / "truth.json"
    data = {"images": [image], "categories": categories, "annotations": annotations}
    path.write_text(json.dumps(data))
    return load_annotations(str(path))


def detections(*found):
    return [{"image_id": "p", "category_id": c, "bbox": b, "score": s} for c, b, s in found]


def measured(ground, found):
    path = Path(ground.path).parent / "found.json"
    path.write_text(json.dumps(found))
    return measure(ground, read_predictions(str(path), ground))


def diagnosis(ground, found, **arguments):
    result = measured(ground, found)
    return diagnose(result.matchers["bbox"], result.evaluation, **arguments)


OBJECTS = [(A, [0, 0, 20, 20]), (A, [0, 50, 20, 20]), (B, [40, 0, 20, 20])]
FOUND = detections(
    (A, [0, 0, 20, 20], 0.95),  # right
    (A, [1, 0, 20, 20], 0.85),  # IoU 19 / 21 with an object that is taken
    (A, [40, 0, 20, 20], 0.75),  # the object of class b
    (B, [40, 0, 8, 20], 0.65),  # IoU 8 / 20
    (A, [80, 60, 10, 10], 0.55),  # nothing there
)


def test_each_kind_of_error_is_told_apart(tmp_path):
    errors = diagnosis(truth(tmp_path, OBJECTS), FOUND).errors
    counts = {name: error["count"] for name, error in errors.items()}
    assert counts == {
        "classification": 1,
        "localisation": 1,
        "class and location": 0,
        "duplicate": 1,
        "background": 1,
        "missed": 1,  # the second a
    }
    # b's object is found when the better of the two detections at it is fixed, that of class a:
    # the AP50 of b rises from 0 to 1, the mean over a and b by 50
    assert errors["classification"]["AP50 lost"] == pytest.approx(50)
    assert errors["localisation"]["AP50 lost"] == 0
    without = [d for d in FOUND if d["score"] != 0.75]
    errors = diagnosis(truth(tmp_path, OBJECTS), without).errors
    assert errors["localisation"]["AP50 lost"] == pytest.approx(50)


def test_confusion_counts_objects_by_row_and_detections_by_column(tmp_path):
    found = diagnosis(truth(tmp_path, OBJECTS), FOUND, min_score=0.7)
    # rows a, b, c, no object; columns a, b, c, missed; 0.65 and 0.55 are below the score
    expected = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert found.confusion.tolist() == expected
    assert found.most_confused() == [("b", "a", 1, 1.0)]


def test_calibration_error_is_the_weighted_distance_of_the_bins(tmp_path):
    found = diagnosis(truth(tmp_path, OBJECTS), FOUND)
    # one right detection of confidence 0.95; wrong ones of 0.85, 0.75, 0.65, 0.55
    part = found.calibration["all"]
    assert part.detections == 5
    assert part.ece == pytest.approx((0.05 + 0.85 + 0.75 + 0.65 + 0.55) / 5)
    assert part.bins[9]["accuracy"] == 1 and part.bins[8]["accuracy"] == 0


def test_marks_stand_where_a_threshold_cuts_the_curve(tmp_path):
    ground = truth(tmp_path, [(A, [0, 0, 20, 20]), (A, [0, 50, 20, 20])])
    found = detections((A, [0, 0, 20, 20], 0.9), (A, [70, 0, 9, 9], 0.6), (A, [0, 50, 20, 20], 0.4))
    curve = diagnosis(ground, found, thresholds=(0.1, 0.5, 0.95)).curves["all"]
    # precision 1 up to recall 1/2, then 2 of 3; 0.95 leaves nothing
    assert curve.precision[:51] == pytest.approx([1.0] * 51)
    assert curve.precision[51:] == pytest.approx([2 / 3] * 50)
    assert curve.marks == {0.1: (1.0, pytest.approx(2 / 3)), 0.5: (0.5, pytest.approx(1.0))}


def test_rules_of_lvis_hold(tmp_path):
    unlisted = (C, [60, 60, 9, 9], 0.9)  # c is not annotated exhaustively
    ground = truth(tmp_path, OBJECTS, lvis=True, not_exhaustive=[A])
    found = detections(*[(d["category_id"], d["bbox"], d["score"]) for d in FOUND], unlisted)
    result = diagnosis(ground, found)
    # a is not marked completely: its three detections without an object do not count
    assert result.calibration["all"].detections == 2
    assert result.confusion[:, 2].sum() == 0
    assert set(result.curves) == {"all", "rare", "frequent"}
    assert result.curves["rare"].precision[:51] == pytest.approx([1.0] * 51)


def test_predictions_without_detections_have_curves_of_zero(tmp_path):
    found = diagnosis(truth(tmp_path, OBJECTS), [])
    assert max(found.curves["all"].precision) == 0 and found.curves["all"].marks == {}
    assert found.calibration == {}
    assert found.errors["missed"]["count"] == 3 and found.confusion[:, -1].sum() == 3


@pytest.mark.parametrize("arguments", [{"thresholds": (1.5,)}, {"min_score": -0.1}])
def test_scores_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], not"):
        diagnosis(truth(tmp_path, OBJECTS), FOUND, **arguments)


@pytest.mark.parametrize("empty", [False, True])
def test_the_report_is_one_page_with_its_images(tmp_path, capsys, empty):
    truth(tmp_path, OBJECTS, lvis=True)
    found = [] if empty else [{k: v for k, v in d.items() if v is not None} for d in FOUND]
    (tmp_path / "found.json").write_text(json.dumps(found))
    directory = tmp_path / "report"
    arguments = ["eval", str(tmp_path / "found.json"), "--dataset", str(tmp_path / "truth.json")]
    arguments += ["--report", str(directory)]
    assert cli.main(arguments) == 0
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    assert "found.json" in page and "Types of errors" in page
    written = json.loads((directory / "diagnosis.json").read_text())
    ece = written["diagnosis"][0]["calibration"]
    assert ("all" in ece) == (not empty)
    names = ["calibration", "confusion", "errors", "precision_recall"]
    assert sorted(p.name for p in directory.glob("*.png")) == [f"{n}_box.png" for n in names]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "report.html exists; --overwrite replaces it" in capsys.readouterr().err


def test_the_curve_has_the_area_of_the_ap(sets, rng, tmp_path):
    dataset = sets.make_dataset(rng, num_classes=20, num_images=30)
    name = sets.register(dataset, "lvis")
    ground = load_annotations(str(tmp_path / f"{name}.json"))
    found = [
        {
            "image_id": image,
            "category_id": c,
            "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).clip(0).tolist()],
            "score": s,
        }
        for image, rows in sets.make_detections(rng, dataset).items()
        for b, c, s in rows
    ]
    result = measured(ground, found)
    curves = diagnose(result.matchers["bbox"], result.evaluation).curves
    metrics = result.evaluation.results["bbox"]
    assert 100 * np.mean(curves["all"].precision) == pytest.approx(metrics["AP50"], abs=1e-9)
