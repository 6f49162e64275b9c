"""`d2-balance challenge`: what runs, what runs again, what stays, the report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from d2_balance.recipes.recipe import Recipe
from d2_balance.recipes.runner import Runner

from .recipes import contents, recipe, run


def test_all_stages_run_and_the_report_has_each(directory, fakes, capsys):
    recipe()
    assert run() == 0
    assert fakes.calls == ["expert", "model", "held", "val", "expert_val"]
    text = (directory / "out/report.md").read_text()
    assert "11 of 11 stages" in text and (directory / "out/report.html").stat().st_size > 1000
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    head = [cell.strip() for cell in rows["stage"].split("|")]
    assert [c for c in head if "box" in c] == [
        f"box {m}" for m in ("AP", "AP50", "APr", "APc", "APf")
    ]
    values = dict(zip(head, (c.strip() for c in rows["val"].split("|")), strict=True))
    assert values["evaluated on"] == "challenge_val" and float(values["box APf"]) > 50
    merged = json.loads((directory / "out/merged/predictions.json").read_text())
    assert len(merged) == 4 * 4  # the expert's two classes join the model's four
    assert len(json.loads((directory / "out/rescored/predictions.json").read_text())) == 4 * 2
    config = yaml.safe_load((directory / "out/model/config.yaml").read_text())
    assert config["MODEL"]["WEIGHTS"] == str(directory / "out/expert/run/model_final.pth")
    two = json.loads((directory / "out/two/annotations.json").read_text())
    assert [c["name"] for c in two["categories"]] == ["rare", "often"]


@pytest.mark.parametrize("stage", ["expert", "model", "val"])
def test_a_run_goes_on_behind_the_stage_that_failed(directory, fakes, capsys, stage):
    recipe()
    fakes.fails = stage
    assert run() == 1
    assert f"stage {stage}: the training ended with status 3" in capsys.readouterr().err
    before = contents("out")
    assert not (directory / f"out/{stage}/done.json").exists()
    assert "not done" in (directory / "out/report.md").read_text()
    fakes.fails, fakes.calls = "", []
    assert run("--resume") == 0
    assert (
        fakes.calls
        == (["expert", "model", "held", "val", "expert_val"])[
            ["expert", "model", "held", "val"].index(stage) :
        ]
    )
    after = contents("out")
    changed = {str(p.relative_to("out")) for p, text in before.items() if after.get(p) != text}
    # what a failed stage left is gone or its own; outputs of the others are as they were
    assert all(p.startswith(("report", "logs", f".{stage}", f"{stage}/")) for p in changed)
    assert not list(Path("out").glob(".*.partial"))


def test_figures_of_a_training_are_of_the_first_test_set(directory, fakes):
    content = recipe()
    content["stages"][3]["test"] = ["parts_held", "challenge_val"]
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run() == 0
    for name, ap in (("parts_held", 11.0), ("challenge_val", 22.0)):
        path = directory / f"out/model/run/inference/evaluation_{name}.json"
        path.write_text(json.dumps({"results": {"bbox": {"AP": ap}}}))
    assert run("--resume") == 0
    text = (directory / "out/report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| model "))
    assert "parts_held" in row and "11.0" in row


def test_images_without_annotations_are_no_evaluation(directory, fakes, capsys):
    content = recipe()
    content["stages"][-1]["dataset"] = "bare"
    content["datasets"].append(["bare", "bare.json", "images"])
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    truth = json.loads(Path("val.json").read_text()) | {"annotations": []}
    Path("bare.json").write_text(json.dumps(truth))
    assert run() == 1
    assert "stage again: the dataset bare has no annotations" in capsys.readouterr().err


def test_a_finished_run_does_nothing(directory, fakes):
    recipe()
    assert run() == 0
    before, fakes.calls = contents("out"), []
    assert run("--resume") == 0 and fakes.calls == [] and contents("out") == before


def test_a_directory_that_is_not_empty_needs_resume(directory, fakes, capsys):
    recipe()
    (directory / "out").mkdir()
    (directory / "out/mine.txt").write_text("x")
    assert run() == 2
    assert "out is not empty, and nothing is overwritten: pass --resume" in capsys.readouterr().err
    assert list((directory / "out").iterdir()) == [directory / "out/mine.txt"]


def test_two_runs_do_not_share_a_directory(directory, fakes, capsys):
    recipe()
    (directory / "out").mkdir()
    code = (
        "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert run() == 2
        other.stdin.close()
    assert "is being written by another run" in capsys.readouterr().err and fakes.calls == []
    assert run() == 0


def test_what_another_run_has_finished_meanwhile_is_not_done_again(directory, fakes):
    recipe()
    first, second = (Runner(Recipe.read("recipe.yaml"), "out", resume=True) for _ in range(2))
    second.run()
    before, calls = contents("out"), list(fakes.calls)
    with pytest.raises(ValueError, match="another run has finished again, expert, .*--resume"):
        first.run()
    assert contents("out") == before and fakes.calls == calls


def remove(path):
    subprocess.run(["rm", "-r", path], check=True)


def cut(path):
    Path(path).write_text(Path(path).read_text()[:20])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: remove("out/expert"), "stage expert is missing in .*out, and stage model, which"),
        (lambda: remove("out/val/predictions.json"), "stage val is done, but its predictions.json"),
        (lambda: remove("out/model/run"), "stage model is done, but its run/model_final.pth is"),
        (lambda: remove("out/again/done.json"), "stage again is not done, for .*again has no done"),
        (lambda: cut("out/again/done.json"), "out/again/done.json"),
    ],
)
def test_what_is_missing_on_resume_is_named(directory, fakes, capsys, spoil, message):
    recipe()
    assert run() == 0
    spoil()
    fakes.calls = []
    assert run("--resume") == 2 and fakes.calls == []
    assert re.search(message, capsys.readouterr().err)


def test_the_overrides_of_predictions_are_checked_before_the_first_stage(directory, fakes, capsys):
    for overrides, expected in (
        ({"TEST": {"DETECTION_PER_IMAGE": 3}}, "TEST.DETECTION_PER_IMAGE"),
        ({"TEST": {"DETECTIONS_PER_IMAGE": "all"}}, "DETECTIONS_PER_IMAGE"),
    ):
        content = recipe()
        stage = next(stage for stage in content["stages"] if stage["name"] == "held")
        stage["overrides"] = overrides
        Path("recipe.yaml").write_text(yaml.safe_dump(content))
        for more in ([], ["--check"]):
            assert run(*more) == 2 and fakes.calls == []
            error = capsys.readouterr().err
            assert "stage held: overrides: " in error and expected in error


def test_a_training_does_not_go_on_with_other_settings(directory, fakes, capsys):
    content = recipe()
    fakes.fails = "model"
    assert run() == 1
    before, fakes.fails, fakes.calls = contents("out"), "", []
    model = next(stage for stage in content["stages"] if stage["name"] == "model")
    model["overrides"] = {"SOLVER": {"BASE_LR": 0.5}}
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--resume") == 2 and fakes.calls == [] and contents("out") == before
    error = capsys.readouterr().err
    assert re.search(r"stage model in .*out was begun with other settings \(overrides\)", error)
    remove("out/model")
    assert run("--resume") == 0 and "model" in fakes.calls


def test_other_settings_are_not_mixed_with_what_is_done(directory, fakes, capsys):
    content = recipe()
    assert run() == 0
    content["stages"][8]["max_dets"] = 3
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--resume") == 2
    error = capsys.readouterr().err
    assert re.search(r"stage factors in .*out was made with other settings \(max_dets\)", error)
    remove("out/factors")
    assert run("--resume") == 2  # made from the old factors
    assert "stage rescored, which is done, was made from it" in capsys.readouterr().err
    remove("out/rescored")
    assert run("--resume") == 0
    recipe()
    (directory / "small.yaml").write_text(
        (directory / "small.yaml").read_text() + "\nOUTPUT_DIR: x\n"
    )
    assert run("--resume") == 2


def test_stages_that_do_not_need_each_other_run_side_by_side(directory, capsys):
    """Two datasets are made at once, by processes of their own, as one after the other."""
    sets = [
        {"name": "two", "kind": "classes", "from": "challenge_train", "keep": ["often", "rare"]},
        {"name": "parts", "kind": "split", "from": "challenge_train", "fraction": 0.4},
        {"name": "half", "kind": "split", "from": "two", "fraction": 0.5},
    ]
    recipe(stages=sets)
    assert run() == 0
    capsys.readouterr()
    assert run("--output", "beside", "--jobs", "2") == 0
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:6]]
    two, parts, half = (f"[{n}/3] {s['name']} ({s['kind']})" for n, s in enumerate(sets, start=1))
    assert lines[:2] == [f"{two} ...", f"{parts} ..."]  # the second starts before the first ends
    assert lines.index(f"{half} ...") > lines.index(two)
    for file in ("two/annotations.json", "parts/held.json", "half/rest.json"):
        assert Path("out", file).read_bytes() == Path("beside", file).read_bytes()
    assert run("--output", "beside", "--jobs", "2", "--resume") == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_a_stage_that_fails_beside_another_is_named(directory, capsys):
    sets = [
        {"name": "none", "kind": "split", "from": "challenge_train", "fraction": 0.001},
        {"name": "parts", "kind": "split", "from": "challenge_train", "fraction": 0.4},
        {"name": "half", "kind": "split", "from": "parts_rest", "fraction": 0.5},
    ]
    recipe(stages=sets)
    assert run("--jobs", "2") == 1
    error = capsys.readouterr().err
    assert "stage none: " in error and "leaves a part empty" in error
    assert Path("out/parts/done.json").is_file()  # what ran beside it is kept
    for option, least in (("--jobs", 1), ("--num-gpus", 0)):
        with pytest.raises(SystemExit) as end:
            run(option, str(least - 1))
        assert end.value.code == 2
        message = f"argument {option}: {least - 1} is not an integer of at least {least}"
        assert message in capsys.readouterr().err
