"""The scripts in examples/ run as their docstrings say, in an empty directory, with results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "deploy.py": [],  # run from the wheel by test_wheel.py
    "longtail_classification.py": [],
    "lvis_with_eql.py": ["--output", "run"],
    "own_coco_data.py": ["--output", "run"],
}


def run(name, directory, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *EXAMPLES[name], *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_every_script_is_here():
    assert sorted(EXAMPLES) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_own_coco_data_trains_and_detects(tmp_path):
    done = run("own_coco_data.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("class ")]
    assert [line.split(",")[0] for line in lines] == [
        "class circle",
        "class square",
        "class triangle",
    ]
    assert numbers(r"class circle.*, AP ([\d.]+)", done.stdout)[0] > 10  # 45 where it was written
    assert re.search(
        r"val_001.png: \d+ detections.*\n  (circle|square|triangle) 0\.\d\d", done.stdout
    )
    again = run("own_coco_data.py", tmp_path)
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.slow
def test_lvis_example_chooses_a_tail_and_trains_with_it(tmp_path):
    done = run("lvis_with_eql.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (share,) = numbers(r"with ([\d.]+)% of the images", done.stdout)
    assert 2 <= share <= 10
    assert numbers(r"^AP ([\d.]+)", done.stdout[done.stdout.rindex("\nAP ") + 1 :])[0] > 0
    (chosen,) = numbers(r"lambda ([\d.]+) protects", done.stdout)
    saved = (tmp_path / "run/run/config.yaml").read_text()
    assert numbers(r"\n    EQL:\n      LAMBDA: ([\d.]+)", saved) == [
        pytest.approx(chosen, abs=1e-4)
    ]


def test_classification_example_raises_rare_classes(tmp_path):
    done = run("longtail_classification.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    few = dict(re.findall(r"^([A-Za-z-]+): accuracy .* few ([\d.]+)", done.stdout, re.MULTILINE))
    assert float(few["BalancedSoftmax"]) > float(few["cross-entropy"]) + 10
