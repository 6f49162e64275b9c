"""Re-scoring: what it may be fitted on, what factors change, and that 1 changes nothing."""

import json
import re

import numpy as np
import pytest

from d2_balance.cli import main as cli
from d2_balance.data.annotations import read_annotations
from d2_balance.evaluation.merge.rescore import Cap, Rescoring
from d2_balance.evaluation.predictions import capped, read_predictions

CATEGORIES = [
    {"id": 2, "name": "rare", "frequency": "r", "image_count": 4},
    {"id": 5, "name": "common", "frequency": "c", "image_count": 50},
    {"id": 7, "name": "often", "frequency": "f", "image_count": 900},
]
BOX, AWAY = [0, 0, 20, 20], [40, 40, 20, 20]


def truth(ids=(1, 2), directory="train"):
    images = [
        {"id": i, "width": 80, "height": 80, "file_name": f"{directory}/{i}.jpg"}
        | {"neg_category_ids": [2, 5, 7], "not_exhaustive_category_ids": []}
        for i in ids
    ]
    objects = [
        {"id": n, "image_id": i, "category_id": c, "bbox": BOX, "area": 400}
        for n, (i, c) in enumerate([(ids[0], 2), (ids[1], 7)], start=1)
    ]
    return {"images": images, "categories": CATEGORIES, "annotations": objects}


def detection(image, category, score, box=BOX):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


# With one detection an image, the rare object loses to a wrong frequent one unless it counts more
# than 0.5 / 0.2 = 2.5 times; from 0.9 / 0.1 = 9 times on a wrong rare one pushes out the right
# frequent one.
FOUND = [
    detection(1, 7, 0.5, AWAY),
    detection(1, 2, 0.2),
    detection(2, 2, 0.1, AWAY),
    detection(2, 7, 0.9),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("held.json", truth()),
        ("val.json", truth((11, 12), "val")),
        ("found.json", FOUND),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def run(*arguments):
    return cli.main(["rescore", *map(str, arguments)])


def fit(*more, output="factors.json"):
    common = ["--dataset", "held.json", "--output", output, "--max-dets", 1]
    return run("fit", "found.json", *common, *(more or ("--test", "val.json")))


def apply(factors, *more, output="out.json"):
    arguments = ("--factors", factors, "--dataset", "held.json", "--output", output)
    return run("apply", "found.json", *arguments, *more)


def rule(**factors):
    groups = {"rare": "r", "common": "c", "often": "f"}
    Rescoring("groups", groups, factors).write("hand.json")
    return "hand.json"


def test_factors_raise_the_ap_of_rare_classes_at_the_cap(files, capsys):
    assert fit() == 0
    found = json.loads((files / "factors.json").read_text())
    # 3 is the smallest step above 2.5; the largest factor is 1
    assert found["rescoring"]["factors"] == pytest.approx({"r": 1, "c": 1 / 3, "f": 1 / 3})
    assert (found["before"]["APr"], found["after"]["APr"]) == (0, pytest.approx(100))
    assert found["after"]["APf"] == found["before"]["APf"] == pytest.approx(100)
    printed = capsys.readouterr().out
    assert "| rare     |         1 |            2 |" in printed


def test_norcal_is_fitted_from_the_image_counts(files):
    assert fit("--test", "val.json", "--method", "norcal") == 0
    found = json.loads((files / "factors.json").read_text())
    assert found["rescoring"]["gamma"] > 0 and found["after"]["APr"] == pytest.approx(100)
    assert len(found["tried"]) == 16
    assert apply("factors.json", "--max-dets", 1) == 0
    kept = json.loads((files / "out.json").read_text())
    assert [d["category_id"] for d in kept] == [2, 7]


def test_factors_that_are_fitted_are_applied_before_the_cap(files, capsys):
    assert fit() == 0 and apply("factors.json", "--max-dets", 1) == 0
    kept = json.loads((files / "out.json").read_text())
    assert [(d["image_id"], d["category_id"]) for d in kept] == [(1, 2), (2, 7)]
    assert [d["score"] for d in kept] == pytest.approx([0.2, 0.3])
    rows = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "rare" in line
    ]
    assert [int(v) for v in rows[-1][2:]] == [2, 0, 1]  # in the file, kept before and after


@pytest.mark.parametrize("method", ["groups", "norcal"])
def test_factors_of_one_change_nothing(files, method):
    factors = {"r": 1.0, "c": 1.0, "f": 1.0} if method == "groups" else {}
    groups = {"rare": "r", "common": "c", "often": "f"}
    Rescoring(method, groups, factors, 0.0, {}).write("hand.json")
    assert apply("hand.json") == 0
    text = (files / "out.json").read_text()
    assert sorted(map(json.dumps, json.loads(text))) == sorted(map(json.dumps, FOUND))
    assert all(json.dumps(d) in text for d in FOUND)  # to the letter


def test_a_cap_that_cuts_nothing_is_refused_before_the_search(files, capsys):
    assert fit("--test", "val.json", "--max-dets", 9) == 2
    assert "the cap cuts nothing" in capsys.readouterr().err
    assert not (files / "factors.json").exists()


@pytest.mark.parametrize("max_dets", [1, 2, 3, 7])
def test_the_cap_of_the_search_is_the_cap_of_the_file(files, max_dets):
    rng = np.random.default_rng(max_dets)
    found = [
        detection(i, 7, s)
        for i, s in zip(rng.integers(1, 3, 12), rng.integers(0, 5, 12), strict=True)
    ]
    (files / "found.json").write_text(json.dumps(found, default=int))
    predictions = read_predictions("found.json", read_annotations("held.json"))
    scores = rng.integers(0, 4, 12).astype(float)
    kept = np.flatnonzero(Cap(predictions.image, max_dets)(scores))
    assert kept.tolist() == sorted(capped(predictions, scores, max_dets).tolist())


def test_norcal_by_hand(files):
    groups = {"rare": "r", "common": "c", "often": "f"}
    found = Rescoring("norcal", groups, {}, 0.5, {"rare": 4, "common": 50, "often": 900})
    predictions = read_predictions("found.json", read_annotations("held.json"))
    names = {c["id"]: c["name"] for c in CATEGORIES}
    # 0.5 / sqrt 900 = 1/60 -> (1/60) / (1/60 + 1/2); 0.2 / 2 -> 0.1 / (0.1 + 0.8)
    expected = [2 / 62, 1 / 9, 0.05 / 0.95, 0.03 / 0.13]
    np.testing.assert_allclose(found.scores(predictions, names), expected)


@pytest.mark.parametrize(
    "held, message",
    [
        (truth(directory="val"), "2 of 2 images of held.json are in val.json as well"),
        (truth((2, 3), "val"), "1 of 2 images .* image ids 2"),
    ],
)
def test_images_that_are_evaluated_on_are_refused(files, capsys, held, message):
    (files / "held.json").write_text(json.dumps(held))
    (files / "val.json").write_text(json.dumps(truth(directory="val")))
    assert fit() == 2 and not (files / "factors.json").exists()
    assert re.search(message, capsys.readouterr().err)
    assert fit("--test", "held.json") == 2
    assert "held.json is held.json, which is evaluated on" in capsys.readouterr().err
    assert run("fit", "found.json", "--dataset", "held.json", "--output", "factors.json") == 2
    assert "name what is evaluated on" in capsys.readouterr().err


def test_other_images_may_have_the_same_ids(files):
    (files / "val.json").write_text(json.dumps(truth(directory="other") | {}))
    held = truth()
    for image in held["images"]:
        image["file_name"] = f"train/a{image['id']}.jpg"
    (files / "held.json").write_text(json.dumps(held))
    assert fit() == 0


def test_the_test_sets_of_the_run_are_refused_too(files, capsys):
    (files / "run").mkdir()
    assert fit("--run", "run") == 2
    assert "config.yaml does not exist" in capsys.readouterr().err
    (files / "run/config.yaml").write_text(
        "DATASETS:\n  REGISTER: [[rescore_held, held.json, .]]\n  TRAIN: [rescore_held]\n"
        "  TEST: [rescore_held]\nVERSION: 2\n"
    )
    assert fit("--run", "run") == 2
    assert "held.json is rescore_held, which is evaluated on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "no file of factors"),
        ({"rescoring": {"method": "x", "groups": {}, "factors": {}}}, "method 'x' is unknown"),
        ({"rescoring": {"method": "groups", "groups": {}, "factors": {"q": 1}}}, "factor 'q'"),
        ({"rescoring": {"method": "groups", "groups": {}, "factors": {"r": 0}}}, "factor 'r': 0"),
        (
            {"rescoring": {"method": "groups", "groups": {}, "factors": {}}},
            "3 of 3 classes have no",
        ),
        (
            {"rescoring": {"method": "norcal", "groups": {}, "factors": {}, "gamma": -1}},
            "gamma is -1",
        ),
    ],
)
def test_files_of_factors_that_cannot_be_used(files, capsys, content, message):
    (files / "bad.json").write_text(json.dumps(content))
    assert apply("bad.json") == 2
    assert message in capsys.readouterr().err and not (files / "out.json").exists()


def test_masks_are_needed_to_fit_on_masks(files, capsys):
    assert fit("--test", "val.json", "--task", "segm") == 2
    assert "segm needs a mask in every detection, 4 have none" in capsys.readouterr().err


def test_outputs_that_are_there_stay(files, capsys):
    (files / "out.json").write_text("x")
    assert apply(rule(r=1.0)) == 2 and (files / "out.json").read_text() == "x"
    assert fit(output="out.json") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
