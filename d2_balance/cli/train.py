"""Train a detector, or evaluate one with --eval-only.

Everything goes to OUTPUT_DIR: log.txt, metrics.json, checkpoints, TensorBoard, and summary.md with
the results and plots. A stopped run continues with --resume. Under torchrun the processes of
torchrun are joined.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance train`, which are those of Detectron2's training scripts."""
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="YAML or lazy Python config, or its name"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS only")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the run")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help='address where machines meet, such as "tcp://HOST:PORT"; default: a free port here',
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="keys of the config and their values; of a lazy config path.key=value",
    )


def run(args: argparse.Namespace) -> int:
    """Start the processes of the run, and return 0 if they end well."""
    from d2_balance.engine.setup.launch import start
    from d2_balance.engine.train import train

    given = {key: value for key, value in vars(args).items() if key not in ("command", "run")}
    start(train, argparse.Namespace(**given))
    return 0
