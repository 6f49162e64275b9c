"""Evaluate a file of predictions: AP, AP by size, by frequency group and by class.

LVIS-style files are evaluated with LVIS rules, others with COCO rules.
"""

from __future__ import annotations

import argparse
import os

from .arguments import add_overwrite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance eval`."""
    parser.add_argument(
        "predictions", help="JSON list of detections, in the result format of COCO and LVIS"
    )
    parser.add_argument(
        "--dataset", required=True, help="the ground truth: a registered name or annotation file"
    )
    parser.add_argument(
        "--train",
        help="training set whose images per class give the frequency groups: a registered name or "
        "annotation file; without it, what the ground truth's file says",
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure to this file")
    parser.add_argument("--csv", metavar="FILE", help="write the table of classes to this file")
    parser.add_argument(
        "--report",
        metavar="DIRECTORY",
        help="write a page with precision-recall curves, calibration, error types and confusion",
    )
    parser.add_argument("--max-dets", type=int, help="detections that count (LVIS 300, COCO 100)")
    parser.add_argument(
        "--ap",
        nargs="+",
        default=(),
        choices=("fixed", "pool", "boundary", "openimages"),
        help="measure as well: AP of the best detections of each class over all images (fixed), "
        "of one list over all classes (pool), of masks and their rims (boundary); AP50 with boxes "
        "of groups (openimages)",
    )
    parser.add_argument(
        "--per-class",
        type=int,
        default=10_000,
        help="detections of a class that count in fixed and pool (default 10,000)",
    )
    parser.add_argument(
        "--hierarchy",
        default="",
        metavar="FILE",
        help="hierarchy of labels of Open Images: detections count for the classes above as well",
    )
    parser.add_argument(
        "--ids",
        metavar="FILE",
        help="evaluate these images only, minival for example: a JSON list of ids, or one a line",
    )
    parser.add_argument("--style", choices=("coco", "lvis"), help="rules, if not the file's own")
    parser.add_argument(
        "--tasks", nargs="+", choices=("bbox", "segm"), help="boxes, masks, or both"
    )
    parser.add_argument(
        "--cuts",
        nargs=2,
        type=int,
        metavar=("A", "B"),
        help="up to A training images a class is rare, up to B common (LVIS: 10 100)",
    )
    parser.add_argument("--classes", type=int, default=40, help="classes to print (default 40)")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the files."""
    from d2_balance.data.preparing import read_ids
    from d2_balance.data.resolve import load_annotations
    from d2_balance.evaluation.evaluate import measure
    from d2_balance.evaluation.predictions import read_predictions
    from d2_balance.evaluation.record import write_csv
    from d2_balance.evaluation.report import text_report, write_report
    from d2_balance.utils.files import check_new

    if args.hierarchy and "openimages" not in args.ap:
        raise ValueError("--hierarchy is for --ap openimages")
    page = args.report and os.path.join(args.report, "report.html")
    check_new([args.json, args.csv, page], args.overwrite)  # before the work
    train = load_annotations(args.train, "--train") if args.train else None
    truth = load_annotations(args.dataset, "--dataset", args.style)
    measured = measure(
        truth,
        read_predictions(args.predictions, truth),
        train=train,
        max_dets=args.max_dets,
        tasks=args.tasks,
        cuts=args.cuts and tuple(args.cuts),
        ap=args.ap,
        per_class=args.per_class,
        image_ids=read_ids(args.ids) if args.ids else None,
        hierarchy=args.hierarchy,
    )
    evaluation = measured.evaluation
    print(text_report(evaluation, args.classes))
    if args.json:
        evaluation.write(args.json)
    if args.csv:
        write_csv(evaluation.classes, args.csv)
    if args.report:
        from d2_balance.evaluation.diagnosis import diagnose

        parts = [
            diagnose(matcher, evaluation)
            for task, matcher in measured.matchers.items()
            if task != "boundary"
        ]
        name = os.path.basename(args.predictions)
        print("\n" + write_report(args.report, evaluation, parts, name)[0])
    return 0
