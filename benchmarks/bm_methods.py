#!/usr/bin/env python3
"""Each method on the built-in long-tail set with one common schedule: AP by group, time.

    python benchmarks/bm_methods.py FILE.json [--only PART_OF_A_NAME ...] [--iterations N]

All start from one checkpoint: a Faster R-CNN that is trained once with plain cross-entropy
(`--start` iterations). Backbone, pyramid, RPN and box head are taken from it where a method has
them; the last classification layer starts anew for every method, because its shape is the loss's.
Every method then trains with the settings of its file in configs/quick_schedules, for the same
number of iterations on the same images. `--train-only roi_heads` freezes the rest: methods of
RoI heads then differ in nothing but the head, and an iteration takes a fraction of the time.

Figures are written after every method, and a second call with the same FILE goes on with the
methods that are missing.

Times are seconds of this process on the processor, not of the clock on the wall, so that other
work on the machine does not count; run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from tabulate import tabulate

from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.utils.files import atomic_path

QUICK = Path(__file__).parents[1] / "configs" / "quick_schedules"
START = "faster_rcnn_R_18_softmax_mini_lvis"
LAST_LAYERS = "cls_score"  # part of the names that no method takes over
SCORE_THRESHOLD = 0.001  # for all: a loss that lowers scores shall not pay for a cut
METRICS = ("AP", "AP50", "APr", "APc", "APf")


class Clock(HookBase):
    """Processor seconds of every iteration."""

    def before_train(self) -> None:
        self.times: list[float] = []

    def before_step(self) -> None:
        self._begin = time.process_time()

    def after_step(self) -> None:
        self.times.append(time.process_time() - self._begin)


def schedule(
    file: Path,
    iterations: int,
    weights: str,
    directory: str,
    seed: int,
    only: list[str] | None = None,
) -> CfgNode:
    """A quick schedule with the common number of iterations, threshold and start."""
    cfg = read_config(str(file))
    cfg.MODEL.BALANCE.TRAINABLE = only or []
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SEED = weights, directory, seed
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = iterations, (int(iterations * 0.8),)
    cfg.SOLVER.CHECKPOINT_PERIOD = 10 * iterations
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.FCOS):
        node.SCORE_THRESH_TEST = SCORE_THRESHOLD
    return cfg


def train(cfg: CfgNode) -> tuple[BalancedTrainer, Clock]:
    """Trains and evaluates."""
    seed_everything(cfg.SEED)
    trainer, clock = BalancedTrainer(cfg), Clock()
    trainer.register_hooks([clock])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, clock


def start(path: Path, iterations: int) -> None:
    """Trains the common start, and saves it without its last classification layer."""
    with tempfile.TemporaryDirectory() as directory:
        cfg = schedule(QUICK / f"{START}.yaml", iterations, "", directory, seed=1)
        cfg.DATASETS.TEST = ()
        state = train(cfg)[0].model.state_dict()
    kept = {name: value for name, value in state.items() if LAST_LAYERS not in name}
    with atomic_path(path) as temporary:
        torch.save({"model": kept}, temporary)


def measure(
    file: Path, iterations: int, weights: Path, seed: int, only: list[str]
) -> dict[str, object]:
    """A row of the table."""
    row: dict[str, object] = {"config": file.stem.removesuffix("_mini_lvis"), "seed": seed}
    with tempfile.TemporaryDirectory() as directory:
        cfg = schedule(file, iterations, str(weights), directory, seed, only)
        try:
            trainer, clock = train(cfg)
        except Exception as error:  # the other methods are still to be tried
            return row | {"result": f"{type(error).__name__}: {error}"}
        results = trainer._last_eval_results["bbox"]
        last = json.loads((Path(directory) / "metrics.json").read_text().splitlines()[-2])
    row |= {name: round(float(results[name]), 2) for name in METRICS}
    seconds = round(statistics.median(clock.times), 4)
    return row | {"s / iteration": seconds, "loss": last.get("total_loss"), "result": "ok"}


def main() -> int:
    """Prints the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", metavar="FILE.json", type=Path, help="figures, read and extended")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts of names")
    parser.add_argument("--iterations", type=int, default=120, help="of every method (120)")
    parser.add_argument("--start", type=int, default=400, help="of the common start (400)")
    parser.add_argument("--train-only", nargs="+", default=[], metavar="PART", help="of the model")
    parser.add_argument("--seed", type=int, default=1, help="order of images, new layers (1)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    weights = args.json.with_suffix(".pth")
    if not weights.exists():
        start(weights, args.start)
    about = {
        "iterations": args.iterations,
        "start": args.start,
        "train only": args.train_only,
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}",
        "rows": [],
    }
    figures = json.loads(args.json.read_text()) if args.json.exists() else about
    done = {(row["config"], row["seed"]) for row in figures["rows"]}
    names = [
        file.stem.removesuffix("_mini_lvis")
        for part in args.only
        for file in sorted(QUICK.glob("*_mini_lvis.yaml"))
        if part in file.stem and not file.stem.startswith("Base-")
    ]
    for name in dict.fromkeys(names):
        if (name, args.seed) in done:
            continue
        file = QUICK / f"{name}_mini_lvis.yaml"
        row = measure(file, args.iterations, weights, args.seed, args.train_only)
        figures["rows"].append(row)
        print(row, flush=True)
        with atomic_path(args.json) as path:
            Path(path).write_text(json.dumps(figures, indent=1))
    print(tabulate(figures["rows"], headers="keys", tablefmt="github"))
    return int(any(row["result"] != "ok" for row in figures["rows"]))


if __name__ == "__main__":
    sys.exit(main())
