"""Measure what calibrations after training need.

These are the fractal dimension of every class in the training set and, if the config has
MODEL.WEIGHTS, mean and variance of its logits there.
"""

from __future__ import annotations

import argparse

from .arguments import add_overwrite, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance calibrate`."""
    parser.add_argument("--config-file", required=True, help="config of the model and its data")
    parser.add_argument(
        "--output", required=True, help="JSON file, for MODEL.BALANCE.CALIBRATION.STATISTICS"
    )
    parser.add_argument(
        "--max-iter",
        type=at_least(0),
        default=0,
        help="training batches of the pass; 0 is one epoch",
    )
    add_overwrite(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the config")


def run(args: argparse.Namespace) -> int:
    """Measure and write the file."""
    from d2_balance.data import register_from_config
    from d2_balance.engine import read_config
    from d2_balance.engine.calibrate import measure
    from d2_balance.utils.files import check_new

    check_new([args.output], args.overwrite)  # before the work
    cfg = read_config(args.config_file, args.opts)
    register_from_config(cfg)
    statistics = measure(cfg, args.max_iter)
    statistics.save(args.output)
    what = "fractal dimensions"
    if statistics.logit_mean is not None:
        what += ", mean and variance of logits"
    print(
        f"{what} of {len(statistics.class_names)} classes: {args.output}; use it with "
        f"MODEL.BALANCE.CALIBRATION.STATISTICS {args.output}"
    )
    return 0
