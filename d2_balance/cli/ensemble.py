"""Merge prediction files of several models, which may know different classes, into one."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance ensemble`."""
    parser.add_argument(
        "predictions",
        nargs="*",
        help="prediction files with the classes of --dataset (JSON, result format of COCO, LVIS)",
    )
    parser.add_argument(
        "--expert",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE CLASSES", "MAP"),
        help="a prediction file on the same images with the classes of another dataset (its "
        "name or annotation file), and a class map file; without one classes of equal name or "
        "synset are shared. Only shared classes count. May be given several times",
    )
    parser.add_argument(
        "--dataset", required=True, help="the images and classes: a name or annotation file"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the merged file, new")
    parser.add_argument(
        "--method", default="nms", choices=("nms", "soft-nms", "wbf"), help="default nms"
    )
    parser.add_argument(
        "--iou", type=float, default=0.5, help="more makes two detections the same (default 0.5)"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        default=300,
        help="best detections of an image that are kept (default 300, LVIS's limit; 0: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the merged file and print what went in."""
    from d2_balance.evaluation.merge.ensemble import merge_files

    for expert in args.expert:
        if not 2 <= len(expert) <= 3:
            raise ValueError("--expert takes FILE CLASSES, or FILE CLASSES MAP")
    inputs = [(path, None, None) for path in args.predictions]
    inputs += [(*expert, None)[:3] for expert in args.expert]
    options = {"method": args.method, "iou": args.iou, "max_dets": args.max_dets}
    print(merge_files(inputs, args.dataset, args.output, **options))
    return 0
