"""Processes of a run: what cannot be started is refused, and torchrun gives what launch gives."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2_balance.engine.setup.launch import TORCHRUN, check_launch, under_torchrun

ROOT = Path(__file__).parents[2]
MAIN = """
import atexit, os, sys
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from d2_balance.engine.setup.launch import start

def threads():
    return [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]

def main(args):
    comm.all_gather(0)
    total = torch.ones(()) * (comm.get_rank() + 1)
    torch.distributed.all_reduce(total)
    line = f"rank {comm.get_rank()} of {comm.get_world_size()}, local {comm.get_local_rank()} of "
    line += f"{comm.get_local_size()}, sum {total.item()}"
    file = os.path.join(args.config_file, str(comm.get_rank()))
    open(file, "w").write(line)
    atexit.register(lambda: open(file + ".threads", "w").write("\\n".join(threads())))
    if args.resume and comm.get_rank() == 1:
        sys.exit(2)

if __name__ == "__main__":
    start(main, default_argument_parser().parse_args())
"""


def arguments(num_gpus=1, num_machines=1, machine_rank=0):
    return argparse.Namespace(
        num_gpus=num_gpus, num_machines=num_machines, machine_rank=machine_rank
    )


@pytest.fixture
def torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")


def test_torchrun_is_known_by_its_variables(monkeypatch, torchrun):
    assert under_torchrun()
    monkeypatch.delenv("MASTER_PORT")
    assert not under_torchrun()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_gpus": 0}, "--num-gpus is 0; must be a number from 1"),
        ({"num_machines": 0}, "--num-machines 0; they must be at least 1"),
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank is 2 .* from 0 to one less"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(given, expected):
    check_launch(arguments())
    with pytest.raises(ValueError, match=expected):
        check_launch(arguments(**given))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(arguments(num_gpus=2))
    with pytest.raises(ValueError, match="--num-gpus is 3; must be a number from 1 to 2"):
        check_launch(arguments(num_gpus=3))


def test_torchrun_does_not_start_processes_twice(torchrun):
    check_launch(arguments())
    with pytest.raises(ValueError, match="leave out --num-gpus 2"):
        check_launch(arguments(num_gpus=2))


def test_torchrun_with_more_processes_than_gpus_is_refused(monkeypatch, torchrun):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="must be --nproc-per-node 2 at most"):
        check_launch(arguments())


def started(directory, launcher, *more):
    script = directory / "main.py"
    script.write_text(MAIN)
    before = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "launch": [],
    }[launcher]
    after = ["--num-gpus", "2"] if launcher == "launch" else []
    command = [sys.executable, *before, str(script), "--config-file", str(directory), *after, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for gloo")
@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_both_ways_give_the_same_processes(tmp_path, launcher):
    done = started(tmp_path, launcher)
    assert done.returncode == 0, done.stderr
    for rank in range(2):  # a thread of gloo can abort the process when Python ends
        assert "gloo" not in (tmp_path / f"{rank}.threads").read_text()
    found = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    # 1 + 2
    assert found == [f"rank {rank} of 2, local {rank} of 2, sum 3.0" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for gloo")
def test_the_status_of_a_process_that_failed_is_the_status_of_the_run(tmp_path):
    done = started(tmp_path, "launch", "--resume")
    assert done.returncode == 2, done.stderr
    assert "gloo" not in (tmp_path / "1.threads").read_text()
