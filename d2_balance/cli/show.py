"""Draw the images of a dataset with their objects, and with detections if a file is given.

Rare classes come first, coloured by frequency group; the output is a directory of PNG files.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance show`."""
    parser.add_argument("dataset", help="a registered dataset, or an annotation file")
    parser.add_argument(
        "--images", help="directory of the images, where an annotation file is given"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="JSON list of detections to draw beside the objects"
    )
    parser.add_argument("--output", metavar="DIRECTORY", required=True, help="where the files go")
    parser.add_argument("--count", type=int, default=20, help="images to draw (default 20)")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="only images that show one of these classes"
    )
    parser.add_argument(
        "--min-score", type=float, default=0.3, help="detections to draw (default 0.3)"
    )
    parser.add_argument(
        "--train",
        help="training set whose images per class say which are rare: a registered name or "
        "annotation file; without it, what DATASET says, or its own counts",
    )


def run(args: argparse.Namespace) -> int:
    """Write the files and print their names."""
    from d2_balance.evaluation.draw import draw_dataset

    paths = draw_dataset(
        args.dataset,
        args.output,
        images=args.images,
        predictions=args.predictions,
        count=args.count,
        class_names=args.classes,
        min_score=args.min_score,
        train=args.train,
    )
    print("\n".join(paths))
    return 0
