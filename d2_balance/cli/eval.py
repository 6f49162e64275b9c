"""Evaluate a file of predictions: AP, AP by size, by frequency group of the classes and by class,
with LVIS rules for LVIS-style files and COCO rules for others."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from d2_balance.evaluation.predictions import Detections
    from d2_balance.evaluation.record import Evaluation
    from d2_balance.evaluation.sources import Annotations

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
TASKS = {"bbox": "box", "segm": "mask"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance eval`."""
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
    parser.add_argument("--style", choices=("coco", "lvis"), help="rules, if not the file's own")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), help="boxes, masks, or both")
    parser.add_argument(
        "--cuts",
        nargs=2,
        type=int,
        metavar=("A", "B"),
        help="up to A training images a class is rare, up to B common (LVIS: 10 100)",
    )
    parser.add_argument("--classes", type=int, default=40, help="classes to print (default 40)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def run(args: argparse.Namespace) -> int:
    """Prints the tables and writes the files; 2 where the user has to change something."""
    from d2_balance.evaluation.evaluate import evaluate_predictions
    from d2_balance.evaluation.predictions import read_predictions
    from d2_balance.evaluation.sources import Annotations
    from d2_balance.utils.files import check_new

    try:
        page = args.report and os.path.join(args.report, "report.html")
        check_new([args.json, args.csv, page], args.overwrite)  # before the work
        train = Annotations.load(args.train, "--train") if args.train else None
        truth = Annotations.load(args.dataset, "--dataset", args.style)
        detections = read_predictions(args.predictions, truth.data, truth.path)
        found = evaluate_predictions(
            truth,
            detections,
            train=train,
            max_dets=args.max_dets,
            tasks=args.tasks,
            cuts=args.cuts and tuple(args.cuts),
        )
    except (ValueError, FileExistsError) as error:
        print(f"d2-balance eval: error: {error}", file=sys.stderr)
        return 2
    print(report(found, args.classes))
    write(found, args.json, args.csv)
    if args.report:
        write_diagnosis(args, truth, detections, found)
    return 0


def write_diagnosis(
    args: argparse.Namespace, truth: Annotations, detections: Detections, found: Evaluation
) -> None:
    """Write the page, its figures and the plots into the directory --report."""
    from d2_balance.evaluation.diagnosis import diagnose
    from d2_balance.evaluation.diagnosis_plots import write_report

    parts = [diagnose(truth, detections, found, task) for task in found.results]
    name = os.path.basename(args.predictions)
    page, *_ = write_report(args.report, found, parts, name)
    print(f"\n{page}")


def write(found: Evaluation, json_file: str | None, csv_file: str | None) -> None:
    """Write the figures as JSON, and the classes as CSV, each atomically."""
    from d2_balance.evaluation.per_class import write_csv

    if json_file:
        found.write(json_file)
    if csv_file:
        write_csv(found.classes, csv_file)


def report(found: Evaluation, max_classes: int = 40) -> str:
    """The tables as text: metrics, frequency groups, and classes by training images."""
    from d2_balance.data.groups import GROUPS

    limit = "an image" if found.rules == "lvis" else "an image and class"
    head = (
        f"{found.detections:,} detections on {found.images:,} images of {found.dataset}, "
        f"{found.rules.upper()} rules, {found.max_dets} detections {limit}"
    )
    rows = [[TASKS[t], *(_percent(m[k]) for k in METRICS)] for t, m in found.results.items()]
    parts = [head, _table(rows, ["", *METRICS])]
    rows = []
    for letter, name in GROUPS.items():
        members = [r for r in found.classes.values() if r["group"] == letter]
        counts = [r["train_image_count"] for r in members if r["train_image_count"] is not None]
        span = f"{min(counts):,} to {max(counts):,}" if counts else "-"
        values = [_percent(m[f"AP{letter}"]) for m in found.results.values()]
        rows.append([name, len(members), span, *values])
    columns = [f"{TASKS[task]} AP" for task in found.results]
    parts.append(_table(rows, ["group", "classes", "training images", *columns]))
    parts.append(_class_table(found, max_classes))
    return "\n\n".join([part for part in parts if part] + [f"- {n}" for n in found.notes])


def _class_table(found: Evaluation, limit: int) -> str:
    columns = [f"{key}{'' if t == 'bbox' else '_' + t}" for t in found.results for key in _KEYS]
    order = sorted(
        found.classes.items(),
        key=lambda item: (item[1]["train_image_count"] or 0, -item[1]["instances"]),
    )
    rows = [
        [name, r["group"] or "-", _count(r["train_image_count"]), r["instances"]]
        + [_percent(r[c]) for c in columns]
        for name, r in order[:limit]
    ]
    headers = ["class", "group", "training images", "ground truths", *columns]
    text = _table(rows, headers)
    if len(order) > limit:
        text += f"\n\n{limit} of {len(order)} classes, rarest first; --json and --csv give all"
    return text if limit else ""


_KEYS = ("AP", "AP50")


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _table(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
