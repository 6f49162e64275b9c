"""One trial: a directory, a training in a process of its own, and what it leaves.

`python -m d2_balance.sweep.trial DIRECTORY` trains the config of a trial with --resume and writes
result.json at the end. A trial that has it is never run again.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import yaml

from d2_balance.utils.executors import STOP_SECONDS, Job, run_job
from d2_balance.utils.files import read_json, read_records, read_yaml, write_json, write_text
from d2_balance.utils.lock import directory_lock

CONFIG, RESULT, LOG = "trial.yaml", "result.json", "trial.log"
_TOLD = re.compile(r"(?:Error|error): (.+)")
_DEVICE_MEMORY = re.compile(r"max_mem: (\d+)M")


def prepare(directory: str, config: Mapping[str, Any]) -> None:
    """Write the config of a trial.

    Raises:
        ValueError: the directory holds a trial with another config.
    """
    path = os.path.join(directory, CONFIG)
    plain = json.loads(json.dumps(config))
    if not os.path.exists(path):
        write_text(path, yaml.safe_dump(plain, sort_keys=False))
    elif read_yaml(path) != plain:
        raise ValueError(
            f"{path} is of another sweep; give another --output, nothing is overwritten"
        )


def command(directory: str, gpus: int = 0) -> list[str]:
    """Return the command that trains a trial."""
    return [sys.executable, "-m", __name__, directory, str(gpus)]


def read_result(directory: str) -> dict[str, Any] | None:
    """Return what a finished trial has written, None for another."""
    path = os.path.join(directory, RESULT)
    return read_json(path) if os.path.exists(path) else None


def measured(directory: str) -> dict[int, dict[str, float]]:
    """Return the figures of each evaluation so far, by iteration, from metrics.json.

    Lines of a run that was killed and went on may stand there twice; the later one counts.
    """
    found: dict[int, dict[str, float]] = {}
    for values in read_records(os.path.join(directory, "metrics.json")):
        figures = {k: v for k, v in values.items() if k.partition("/")[0] in ("bbox", "segm")}
        if figures:
            found[int(values["iteration"]) + 1] = figures
    return found


def failure(directory: str, status: int) -> str:
    """Return in one line why a training has ended with a status other than 0."""
    number = -status if status < 0 else status - 128  # of the wrapper, or told by it
    if number == signal.SIGKILL:
        return "killed by SIGKILL; the machine may have run out of memory"
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    path = os.path.join(directory, LOG)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file.readlines()[-200:] if line.strip()]
    except OSError:
        lines = []
    told = [m.group(1) for line in lines if (m := _TOLD.search(line))]
    last = told[-1] if told else (lines[-1] if lines else "no output")
    return f"status {status}: {last[:300]}"


def collect(directory: str) -> dict[str, Any]:
    """Return result.json of a training that has ended: figures, seconds and memory."""
    results: dict[str, dict[str, float]] = {}
    inference = os.path.join(directory, "inference")
    for name in sorted(os.listdir(inference)) if os.path.isdir(inference) else ():
        if name.startswith("evaluation_") and name.endswith(".json"):
            results.update(read_json(os.path.join(inference, name))["results"])
    return {
        "results": {t: {k: _finite(v) for k, v in m.items()} for t, m in results.items()},
        "seconds_per_iteration": _seconds_per_iteration(directory),
        "peak_bytes": _peak_bytes(directory),
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _seconds_per_iteration(directory: str) -> float | None:
    """Return the median time of an iteration, without waiting for data; None if none is logged."""
    times = [
        values["time"] - values.get("data_time", 0.0)
        for values in read_records(os.path.join(directory, "metrics.json"))
        if "time" in values
    ]
    return statistics.median(times) if times else None


def _peak_bytes(directory: str) -> int:
    """Return the peak of device memory, or, on a CPU, of the largest process of the training."""
    path = os.path.join(directory, "log.txt")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            found = [int(m.group(1)) for line in file if (m := _DEVICE_MEMORY.search(line))]
        if found:
            return max(found) * 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def main(directory: str, gpus: int) -> int:
    """Train a trial to its end and write its result; return the status of the training.

    A signal is passed on to the training, which saves a checkpoint. A training of this directory
    that another sweep has left is waited for: it was told to end with its parent.
    """
    arguments = [sys.executable, "-m", "d2_balance", "train", "--resume"]
    arguments += ["--config-file", os.path.join(directory, CONFIG)]
    arguments += ["--num-gpus", str(gpus)] if gpus else []
    _wait_for_lock(directory)
    status = run_job(Job(arguments, os.path.join(directory, LOG)))
    if status:
        return 128 - status if status < 0 else status
    write_json(os.path.join(directory, RESULT), collect(directory), indent=1, sync=True)
    return 0


def _wait_for_lock(directory: str) -> None:
    end = time.monotonic() + STOP_SECONDS + 20
    while True:
        try:
            with directory_lock(directory):
                return
        except ValueError:
            if time.monotonic() > end:
                return  # the training says in its own words who holds it
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
