#!/usr/bin/env python3
"""Every quick schedule of configs/ trains to its end: time per iteration, losses, finite weights.

    python benchmarks/bm_quick.py [--only PART_OF_A_NAME ...] [--json FILE]

Forty iterations on the built-in set show that a method trains, not how well. A loss that is not
finite ends its run (see `d2_balance.engine.hooks.nonfinite`); the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from detectron2.engine import HookBase
from tabulate import tabulate
from tqdm import tqdm

from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.utils.files import atomic_path

CONFIGS = Path(__file__).parents[1] / "configs"


class Clock(HookBase):
    """Wall seconds of every iteration."""

    def before_train(self) -> None:
        self.times: list[float] = []

    def before_step(self) -> None:
        self._begin = time.perf_counter()

    def after_step(self) -> None:
        self.times.append(time.perf_counter() - self._begin)


def train(file: Path, directory: str) -> dict[str, object]:
    """Trains one configuration without evaluation; a row of the table."""
    cfg = read_config(str(file))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (), directory
    seed_everything(cfg.SEED)
    row: dict[str, object] = {"config": file.stem}
    try:
        trainer = BalancedTrainer(cfg)
        clock = Clock()
        trainer.register_hooks([clock])
        trainer.train()
    except Exception as error:  # the other files are still to be tried
        return row | {"result": f"{type(error).__name__}: {error}"}
    first, last = (json.loads(line) for line in _ends(Path(directory) / "metrics.json"))
    finite = all(p.isfinite().all() for p in trainer.model.state_dict().values())
    return row | {
        "iterations": len(clock.times),
        "s / iteration": round(statistics.median(clock.times), 3),
        "loss after 20": round(first["total_loss"], 3),
        "at the end": round(last["total_loss"], 3),
        "result": "ok" if finite else "weights are not finite",
    }


def _ends(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [lines[0], lines[-1]]


def main() -> int:
    """Prints the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts of names")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    files = [
        file
        for file in sorted((CONFIGS / "quick_schedules").glob("*_mini_lvis.yaml"))
        if not file.stem.startswith("Base-") and any(part in file.stem for part in args.only)
    ]
    rows = []
    for file in tqdm(files, desc="training"):
        with tempfile.TemporaryDirectory() as directory:
            rows.append(train(file, directory))
    print(tabulate(rows, headers="keys", tablefmt="github"))
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as out:
            json.dump({"threads": torch.get_num_threads(), "rows": rows}, out, indent=1)
    return int(any(row["result"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
