#!/usr/bin/env python3
"""Losses beside other work on the machine, as multiples of cross-entropy in the same state.

    python benchmarks/bm_contention.py [--threads N ...] [--runs N] [--only NAME ...]
                                       [--states STATE ...] [--json FILE]

A state is what else runs: nothing of ours (idle), a busy loop on each core (loops), a PyTorch
training of two threads (training), or a copy of 256 MB on each core again and again (copies). In
every run each loss and `binary_cross_entropy_with_logits` take turns, forward and backward on
100,000 x 80 logits, and their medians give a ratio. The table has the median and the worst ratio
of the runs. Work that the benchmark has not started is not kept away: name the load of the machine
with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from loss_cases import build, make_samples, plain_loss, training_step
from measuring import about, in_words, keep_memory, seconds
from tabulate import tabulate

from d2_balance.utils.files import atomic_path

SHAPE = (100_000, 80, 300)  # samples, classes, positives
LOSSES = ("Focal", "BalancedCE", "GHMC", "DR", "AP", "RankSort")
PAIRS = 5  # of a run

_LOOP = "while True: pass"
_TRAINING = """
import torch
torch.set_num_threads(2)
layers = [torch.nn.Conv2d(16, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 16, 3)]
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
while True:
    optimizer.zero_grad()
    model(torch.randn(4, 16, 96, 96)).square().mean().backward()
    optimizer.step()
"""
_COPIES = """
import torch
torch.set_num_threads(1)
source = torch.zeros(2**26)
target = torch.ones_like(source)
while True:
    target.copy_(source)
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
STATES = {
    "idle": [],
    "loops": [_LOOP] * CORES,
    "training": [_TRAINING],
    "copies": [_COPIES] * CORES,
}


@contextmanager
def neighbours(state: str) -> Iterator[None]:
    """The other work of a state, inside of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in STATES[state]]
    try:
        if processes:
            time.sleep(3)  # they import torch
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ratios(name: str, runs: int) -> Iterator[tuple[float, float]]:
    """Median seconds of the loss and of cross-entropy, one pair for each run."""
    loss = build(name, SHAPE[1])
    samples = make_samples(SHAPE[0], loss.num_outputs(SHAPE[1]), SHAPE[1], SHAPE[2], "cpu")
    run, plain = training_step(loss, samples), plain_loss(samples, softmax=False)
    run(), plain()
    for _ in range(runs):
        times = [(seconds(run), seconds(plain)) for _ in range(PAIRS)]
        ours, theirs = (statistics.median(each) for each in zip(*times, strict=True))
        yield ours, theirs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="of torch (2)")
    parser.add_argument("--runs", type=int, default=20, help="of each loss in each state (20)")
    parser.add_argument("--only", nargs="+", default=LOSSES, metavar="NAME", help="losses")
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    keep_memory()
    print(in_words(about() | {"cores": CORES, "load": os.getloadavg()[0]}))
    table = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for state in args.states:
            with neighbours(state):
                for name in args.only:
                    times = list(ratios(name, args.runs))
                    values = [ours / theirs for ours, theirs in times]
                    table.append(
                        {
                            "threads": threads,
                            "beside": state,
                            "loss": name,
                            "ms": 1000 * statistics.median(ours for ours, _ in times),
                            "BCE, ms": 1000 * statistics.median(theirs for _, theirs in times),
                            "times BCE": statistics.median(values),
                            "worst run": max(values),
                        }
                    )
                    print(table[-1], file=sys.stderr)
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".2f"))
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"about": about(), "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()
