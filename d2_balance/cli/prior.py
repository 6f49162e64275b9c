"""Count how rare foreground is in the training set of a configuration.

Prints the prior and the initial bias of every classifier (arXiv:1909.04868), and stores them for
MODEL.BALANCE.PRIOR_FILE.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .arguments import add_overwrite, add_set, at_least

if TYPE_CHECKING:
    from d2_balance.data.priors.foreground import ForegroundPrior

COMMON_PRIORS = (0.01, 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance prior`."""
    parser.add_argument("--config-file", required=True, help="YAML file of the model and its data")
    parser.add_argument("--output", help="JSON file to write, for MODEL.BALANCE.PRIOR_FILE")
    parser.add_argument(
        "--max-images",
        type=at_least(0),
        default=5000,
        help="of more images than this a random sample is counted; 0 takes all (default 5000)",
    )
    add_overwrite(parser)
    add_set(parser)
    parser.add_argument(
        "more_opts",
        nargs="*",
        metavar="KEY VALUE",
        help="the same, as `d2-balance train` takes them",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and write the file if one was asked for."""
    from d2_balance.data import register_from_config
    from d2_balance.data.priors.foreground import ForegroundPrior
    from d2_balance.engine import read_config
    from d2_balance.utils.files import check_new

    check_new([args.output], args.overwrite)  # before the work
    cfg = read_config(args.config_file, [*args.opts, *args.more_opts])
    register_from_config(cfg)
    prior = ForegroundPrior.from_config(cfg, args.max_images)
    print(report(prior))
    if args.output:
        prior.save(args.output, overwrite=args.overwrite)
        print(f"\nwritten to {args.output}; use it with MODEL.BALANCE.PRIOR_FILE {args.output}")
    return 0


def report(prior: ForegroundPrior) -> str:
    """Return the table as text."""
    from d2_balance.utils.text import plural, table

    rows = []
    for name, part in prior.parts.items():
        losses = [f"{part.loss(value):.4g}" for value in (part.prior, *COMMON_PRIORS)]
        counts = [f"{value:,}" for value in (part.positives, part.samples, part.outputs)]
        rows.append([name, *counts, f"{part.prior:.3e}", f"{part.bias:.3f}", *losses])
    headers = ["part", "N_f", "N", "C", "prior", "bias"]
    headers += ["loss there", *(f"at {value:g}" for value in COMMON_PRIORS)]
    images = plural(prior.num_images, "image")
    if prior.num_images < prior.total_images:
        images += f" of {prior.total_images:,}, sampled with seed 0 (--max-images 0 counts all)"
    notes = ["The loss is sigmoid cross-entropy at the start, over all samples, by positive."]
    if "ROIHeads" in prior.parts:
        notes.append(
            "ROIHeads: all proposals of the RPN, and of the positives the objects themselves only: "
            "a lower bound."
        )
    return "\n".join([images, "", table(rows, headers), "", *notes])
