"""`d2-balance compare`: differences, what is listed, and what is refused."""

import copy
import json
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


@pytest.fixture
def evaluated(tmp_path):
    """Evaluates detections of 30 images and returns the file; `shift` moves all boxes."""
    images = [{"id": n, "width": 60, "height": 60} for n in range(30)]
    boxes = [[5 + n % 9, 5, 20, 20 + n % 7] for n in range(30)]
    truth = {
        "images": images,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": box, "area": box[2] * box[3]}
            for n, box in enumerate(boxes, start=0)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    def to(name, shift, skipped=()):
        found = [
            {"image_id": n, "category_id": 1 + n % 2, "score": 0.5 + n / 100}
            | {"bbox": [box[0] + shift * (n % 3), *box[1:]]}
            for n, box in enumerate(boxes)
            if n not in skipped
        ]
        (tmp_path / f"{name}.found.json").write_text(json.dumps(found))
        files = [str(tmp_path / f"{name}{end}") for end in (".found.json", ".json")]
        arguments = [
            "eval",
            files[0],
            "--dataset",
            str(tmp_path / "truth.json"),
            "--json",
            files[1],
        ]
        assert cli.main(arguments) == 0
        return files[1]

    return to


def test_a_clear_difference_and_none_are_told_apart(evaluated, tmp_path, capsys):
    plain, same, worse = evaluated("plain", 2), evaluated("same", 2), evaluated("worse", 5)
    capsys.readouterr()
    out = tmp_path / "out"
    assert run(plain, same, worse, "--resamples", 200, "--output", out) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "against plain" in line)
    same_line, worse_line = lines[start + 2 : start + 4]
    assert same_line.split("|")[1:3] == [" same            ", " within noise "]
    assert [cell.strip() for cell in worse_line.split("|")[1:3]] == ["worse", "worse"]
    assert any("(+0.0, +0.0 to +0.0)" in li for li in lines)
    assert any("one seed cannot say" in li for li in lines)
    page = (out / "compare.html").read_text()
    assert "within noise" in page and "95 % intervals" in page


def test_runs_of_one_name_are_seeds(evaluated, capsys):
    files = [evaluated(f"run{n}", 2, (n,)) for n in range(4)]
    capsys.readouterr()
    assert run(*files, "--names", "CE", "CE", "EQL", "EQL", "--resamples", 50) == 0
    printed = capsys.readouterr().out
    assert "CE, 2 seeds" in printed and "EQL, 2 seeds" in printed and " ± " in printed
    assert "| EQL   | training" in printed and "one seed cannot" not in printed


def test_output_directories_that_differ_in_the_seed_are_seeds(write, tmp_path, capsys):
    for name, seed, loss, aps in (
        ("ce_seed1", 1, "CE", PLAIN),
        ("ce_seed2", 2, "CE", BETTER),
        ("eql", 1, "EQL", BETTER),
    ):
        write(f"{name}/inference/evaluation_set.json", evaluation(aps))
        text = f"MODEL:\n  LOSS: {loss}\nOUTPUT_DIR: {name}\nSEED: {seed}\n"
        (tmp_path / name / "config.yaml").write_text(text)
    assert run(*(tmp_path / n for n in ("ce_seed1", "ce_seed2", "eql"))) == 0
    printed = capsys.readouterr().out
    # AP 20 and 21.5
    assert "| ce, 2 seeds | 20.8 ± 1.1" in printed and "no intervals" in printed


def test_predictions_that_have_changed_give_no_intervals(evaluated, tmp_path, capsys):
    plain, other = evaluated("plain", 2), evaluated("other", 3)
    (tmp_path / "other.found.json").write_text("[]")
    capsys.readouterr()
    assert run(plain, other) == 0
    assert "has changed since other was evaluated" in capsys.readouterr().out
