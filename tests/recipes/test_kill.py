"""A run that is killed inside a training goes on there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .recipes import ROOT, contents, recipe, with_second_files


def start(*arguments):
    command = [sys.executable, "-m", "d2_balance", "challenge", "recipe.yaml", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_inside_a_training(directory, number):
    content = recipe()
    content["stages"][2]["overrides"]["SOLVER"] = {"MAX_ITER": 2}
    with_second_files(content)
    content["stages"][3]["overrides"]["SOLVER"] = {"MAX_ITER": 40, "CHECKPOINT_PERIOD": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    process = start()
    checkpoint = directory / "out/model/run/last_checkpoint"
    for _ in range(3000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    expected = 128 + number if number == signal.SIGTERM else -number
    assert process.returncode == expected, printed
    assert not (directory / "out/model/done.json").exists()
    before = contents("out/expert")
    process = start("--resume")
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    assert "expert (train): done before" in printed
    log = (directory / "out/logs/model.log").read_text()
    resumed = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert resumed[0] == 0 and 0 < resumed[1] < 40
    assert "ignore regions from" in log and "2 classes of more are classes of parts_rest" in log
    assert contents("out/expert") == before
    assert "11 of 11 stages" in (directory / "out/report.md").read_text()
