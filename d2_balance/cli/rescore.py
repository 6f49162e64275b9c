"""Raise the scores of rare classes before the cap on detections of an image.

`fit` chooses factors by frequency group, or NorCal's gamma, on held-out training images; `apply`
writes the predictions of other images with them.
"""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance rescore`."""
    actions = parser.add_subparsers(dest="action", metavar="fit | apply", required=True)
    fit = actions.add_parser("fit", help="choose factors on held-out training images")
    apply = actions.add_parser("apply", help="write predictions with new scores, then cut")
    for action in (fit, apply):
        action.add_argument("predictions", help="prediction file, with more than --max-dets each")
        action.add_argument("--output", required=True, metavar="FILE", help="file to write, new")
        action.add_argument(
            "--max-dets",
            type=int,
            default=300,
            help="best detections of an image that count (default 300)",
        )
    fit.add_argument("--dataset", required=True, help="the held-out images")
    apply.add_argument("--dataset", required=True, help="the images of the predictions")
    fit.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="DATASET",
        help="what is evaluated on; fitting on one of these images is refused",
    )
    fit.add_argument(
        "--run",
        dest="run_directory",  # `run` is the function of the command
        metavar="DIRECTORY",
        help="output directory of the model: its DATASETS.TEST joins --test, and images of its "
        "DATASETS.TRAIN are reported",
    )
    fit.add_argument("--train", help="training set that gives groups and image counts")
    fit.add_argument("--method", default="groups", choices=("groups", "norcal"))
    fit.add_argument("--task", default="", choices=("bbox", "segm"), help="default: masks if any")
    fit.add_argument(
        "--metric",
        default="AP",
        choices=("AP", "APr", "APc", "APf"),
        help="what to raise (default AP)",
    )
    apply.add_argument("--factors", required=True, metavar="FILE", help="what `fit` wrote")


def run(args: argparse.Namespace) -> int:
    """Fit or apply."""
    from d2_balance.evaluation.merge.rescore import apply_factors, fit_factors

    if args.action == "apply":
        text = apply_factors(
            args.predictions, args.factors, args.dataset, args.output, max_dets=args.max_dets
        )
    else:
        tests, train = list(args.test), []
        if args.run_directory:
            found = _sets_of_run(args.run_directory)
            tests += found[0]
            train = found[1]
        text = fit_factors(
            args.predictions,
            args.dataset,
            args.output,
            tests=tests,
            trained_on=train,
            train=args.train,
            method=args.method,
            task=args.task,
            metric=args.metric,
            max_dets=args.max_dets,
        )
    print(text)
    return 0


def _sets_of_run(directory: str) -> tuple[list[str], list[str]]:
    """DATASETS.TEST and DATASETS.TRAIN of a run; registers what its config registers."""
    from d2_balance.data import register_from_config
    from d2_balance.engine import read_config

    path = os.path.join(directory, "config.yaml")
    if not os.path.isfile(path):
        raise ValueError(f"--run: {path} does not exist; name the OUTPUT_DIR of a run")
    cfg = read_config(path)
    register_from_config(cfg)
    return list(cfg.DATASETS.TEST), list(cfg.DATASETS.TRAIN)
