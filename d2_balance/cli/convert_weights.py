"""Convert weights of mmdet, or of the releases of EQL and BAGS, to a directory like that of a run.

`predict`, `export` and `train MODEL.WEIGHTS` take it. Detectron2's own weights load as they are.
"""

from __future__ import annotations

import argparse

from .predict import read_names

SOURCES = ("mmdet", "eql", "bags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance convert-weights`."""
    parser.add_argument("checkpoint", help="file of the other project")
    parser.add_argument(
        "--source",
        required=True,
        choices=SOURCES,
        help="mmdet: Faster R-CNN, Mask R-CNN, RetinaNet with a ResNet FPN backbone; "
        "eql, bags: the authors' Faster and Mask R-CNN",
    )
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="new directory")
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="class names in the order of training: a COCO file, a JSON list, or one on a line",
    )
    parser.add_argument(
        "--counts", default="", metavar="FILE", help="class counts of the training set"
    )
    parser.add_argument(
        "--bins", default="", metavar="FILE", help="bags: label2binlabel.pt of the release"
    )
    parser.add_argument(
        "--style",
        default="pytorch",
        choices=("pytorch", "caffe"),
        help="mmdet: which ImageNet weights the backbone began with (default pytorch: RGB)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and print what the user should know."""
    from d2_balance.deploy.convert import convert

    notes = convert(
        args.checkpoint,
        args.source,
        args.output,
        names=read_names(args.names) if args.names else None,
        counts=args.counts,
        bins=args.bins,
        style=args.style,
    )
    print(f"{args.output}: config.yaml, classes.json and model_final.pth")
    for note in notes:
        print(note)
    return 0
