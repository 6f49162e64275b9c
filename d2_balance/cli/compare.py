"""Put evaluations of one dataset side by side.

Written are AP, AP by frequency group, and AP of each class against its training images, as tables,
a page and images.
"""

from __future__ import annotations

import argparse
import os

from .arguments import add_overwrite, at_least

FILES = ("compare.md", "compare.html", "compare_box.png", "compare_mask.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance compare`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output directory of a run, or file of `d2-balance eval --json`; the first is the "
        "one that others are compared with",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        help="how to call the runs, one name each; runs of one name are seeds, and "
        "so are output directories whose configs differ in SEED only",
    )
    parser.add_argument("--dataset", default="", help="which dataset, where a run has several")
    parser.add_argument("--output", metavar="DIRECTORY", help=f"write {', '.join(FILES)} there")
    parser.add_argument("--classes", type=at_least(0), default=5, help="gains and losses to print")
    parser.add_argument(
        "--resamples",
        type=at_least(0),
        default=1000,
        help="of the images, for intervals (default 1000; 0: none)",
    )
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the files."""
    from d2_balance.evaluation import compare as comparison
    from d2_balance.utils.files import check_new
    from d2_balance.utils.text import table

    if args.output:
        check_new([os.path.join(args.output, file) for file in FILES], args.overwrite)
    names = args.names or [""] * len(args.runs)
    if len(names) != len(args.runs):
        raise ValueError(f"--names has {len(names)} names for {len(args.runs)} runs")
    pairs = zip(args.runs, names, strict=True)
    runs = [comparison.read_run(path, name, args.dataset) for path, name in pairs]
    runs = comparison.join_seeds(runs, bool(args.names))
    tasks = comparison.check_comparable(runs)
    found = {task: comparison.significance(runs, task, args.resamples) for task in tasks}
    for task, tests in found.items():
        print(f"{comparison.title(task)} AP on {runs[0].found.dataset}\n")
        print(table(comparison.metric_rows(runs, task, tests), ["run", *comparison.METRICS]) + "\n")
        if text := comparison.significance_text(runs, tests):
            print(text + "\n")
        if args.classes > 0:
            rows = comparison.gain_rows(runs, task, args.classes, tests)
            print(table(rows, comparison.gain_headers(runs)) + "\n")
    if args.output:
        print("\n".join(comparison.write_comparison(runs, found, args.output)))
    return 0
