"""`d2-balance compare`: differences, what is listed, and what is refused."""

import copy
import math

import pytest

from d2_balance.cli import main as cli
from d2_balance.evaluation.record import Evaluation

NAMES = {"a": ("r", 5), "b": ("c", 50), "c": ("f", 500), "d": ("f", 900)}


def evaluation(aps, dataset="set", **fields):
    """AP by class; groups' AP as in the classes."""
    classes = {
        name: {"group": g, "train_image_count": n, "instances": 3, "AP": ap, "AP50": 2 * ap}
        for (name, (g, n)), ap in zip(NAMES.items(), aps, strict=True)
    }
    mean = {"AP": sum(aps[:3]) / 3, "AP50": 40.0, "AP75": 10.0, "APs": math.nan}
    groups = {f"AP{g}": ap for g, ap in zip("rcf", aps[:3], strict=True)}
    results = {"bbox": mean | {"APm": 1.0, "APl": 1.0} | groups}
    values = {"train": "", "rules": "lvis", "max_dets": 300, "images": 9, "detections": 99}
    return Evaluation(dataset=dataset, results=results, classes=classes, **(values | fields))


@pytest.fixture
def write(tmp_path):
    def to(name, found):
        path = tmp_path / name
        found.write(str(path))
        return str(path)

    return to


def run(*arguments):
    return cli.main(["compare", *map(str, arguments)])


PLAIN = (10.0, 20.0, 30.0, math.nan)
BETTER = (15.5, 21.0, 28.0, math.nan)


def test_differences_are_those_to_the_first_run(write, tmp_path, capsys):
    write("plain/inference/evaluation_set.json", evaluation(PLAIN))
    better = write("better.json", evaluation(BETTER))
    out = tmp_path / "out"
    assert run(tmp_path / "plain", better, "--names", "CE", "EQL", "--output", out) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| EQL"))
    # AP (15.5 + 21 + 28) / 3 = 21.5 against 20
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["EQL", "21.5 (+1.5)"]
    assert cells[-3:] == ["15.5 (+5.5)", "21.0 (+1.0)", "28.0 (-2.0)"]
    gains = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert [name for name in gains if name in NAMES] == ["a", "b", "c"]  # d has no AP
    markdown = (out / "compare.md").read_text()
    assert "| EQL   | 21.5 (+1.5) " in markdown and "](compare_box.png)" in markdown
    page = (out / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert (out / "compare_box.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "compare_mask.png").exists()


def test_only_the_largest_gains_and_losses_are_listed(write, capsys):
    files = [write(f"{n}.json", evaluation(v)) for n, v in (("x", PLAIN), ("y", BETTER))]
    assert run(*files, "--classes", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert "a" in rows and "c" in rows and "b" not in rows


def test_existing_files_stay_without_overwrite(write, tmp_path, capsys):
    files = [write(f"{n}.json", evaluation(PLAIN)) for n in "xy"]
    (tmp_path / "compare.html").write_text("mine")
    assert run(*files, "--output", tmp_path) == 2
    assert "compare.html exists; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "compare.html").read_text() == "mine"
    assert run(*files, "--output", tmp_path, "--overwrite") == 0
    assert "mine" not in (tmp_path / "compare.html").read_text()


def other_classes():
    found = evaluation(PLAIN)
    found.classes = {("z" if n == "a" else n): r for n, r in found.classes.items()}
    return found


def masks_only():
    found = evaluation(PLAIN)
    found.results = {"segm": found.results["bbox"]}
    return found


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (evaluation(PLAIN, images=8), "differ in their number of images"),
        (evaluation(PLAIN, rules="coco"), "differ in their rules"),
        (evaluation(PLAIN, max_dets=100), "differ in their limit of detections"),
        (other_classes(), "differ in their classes or ground truths"),
        (masks_only(), "no task in common"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(write, capsys, second, message):
    assert run(write("x.json", evaluation(PLAIN)), write("y.json", second)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_runs_that_cannot_be_read_are_named(write, tmp_path, capsys):
    good = write("x.json", evaluation(PLAIN))
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"dataset": "s')
    write("two/inference/s/evaluation_s.json", evaluation(PLAIN, "s"))
    write("two/inference/t/evaluation_t.json", evaluation(PLAIN, "t"))
    for path, message in (
        ("gone", "does not exist"),
        ("empty", "holds no evaluation (inference/evaluation_*.json); evaluate it with"),
        ("list.json", "no evaluation: it lacks dataset"),
        ("cut.json", "the file ends too early"),
        ("two", "has evaluations of s, t; choose one of them with --dataset"),
    ):
        assert run(good, tmp_path / path) == 2
        error = capsys.readouterr().err
        assert message in error and path in error and len(error.splitlines()) == 1
    assert run(good, tmp_path / "two", "--dataset", "s") == 0
    assert run(good) == 2
    assert "takes 2 to 7 runs, not 1" in capsys.readouterr().err
    assert run(good, good) == 2
    assert "give them different --names" in capsys.readouterr().err
    assert run(good, good, "--names", "x") == 2
    assert "--names has 1 names for 2 runs" in capsys.readouterr().err


def test_classes_without_counts_leave_the_plot_by_count_empty(write, tmp_path):
    found = evaluation(PLAIN)
    for record in found.classes.values():
        record["train_image_count"] = None
    files = [write(f"{n}.json", copy.deepcopy(found)) for n in "xy"]
    assert run(*files, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out/compare_box.png").exists()
