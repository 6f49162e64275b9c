"""Predict on images, directories and videos with a trained model: drawn images, and COCO JSON.

The exit status is 0 if every file was predicted, 1 if some could not be read, 2 if the user has to
change something.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .arguments import add_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance predict`."""
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="images, directories of images, or videos")
    parser.add_argument(
        "--output",
        metavar="DIRECTORY",
        required=True,
        help="where predictions.json, images.json and drawn/ go; nothing there is replaced",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO file that gives the images their ids, so that `d2-balance eval` takes the "
        "predictions; if not given, they are counted from 1",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="SCORE",
        help="least score of a detection; if not given, that of the model",
    )
    parser.add_argument(
        "--class-threshold",
        action="append",
        default=[],
        metavar="NAME=SCORE",
        help="least score of a class, may be given again; or a JSON file of scores by class name",
    )
    parser.add_argument(
        "--min-drawn-score",
        type=float,
        metavar="SCORE",
        help="detections below it are not drawn (default 0.3; 0 if a threshold is given)",
    )
    parser.add_argument("--no-drawing", action="store_true", help="write the JSON files only")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        help="images that the model takes at once on an accelerator (default 4)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that read images, and as many that draw and write; on a CPU they detect "
        "too (default 2; on a CPU one for each core, up to 8)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a trained model."""
    parser.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="output directory of a training, or a checkpoint",
    )
    parser.add_argument("--weights", default="", help="checkpoint of the directory to take")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="config of a checkpoint without one"
    )
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; default: as trained")
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="class names of a checkpoint without them: a COCO file, a JSON list, or one on a line",
    )
    add_set(parser)


def run(args: argparse.Namespace) -> int:
    """Predict; see the module for the exit status."""
    from d2_balance.deploy import load
    from d2_balance.deploy.predict import check_output, find_sources, predict_files

    thresholds = _thresholds(args.class_threshold)
    check_output(args.output)
    sources = find_sources(args.images)
    predictor = load(args.model, **model_options(args), score_threshold=args.score_threshold)
    if thresholds:
        predictor.set_score_threshold(thresholds)
    drawn = args.min_drawn_score
    if drawn is None:
        drawn = 0.0 if thresholds or args.score_threshold is not None else 0.3
    report = predict_files(
        predictor,
        sources,
        args.output,
        annotations=args.annotations or "",
        batch_size=args.batch_size,
        num_workers=args.workers,
        draw=not args.no_drawing,
        min_drawn_score=drawn,
        quiet=args.quiet,
    )
    print(f"{report.detections} detections in {report.images} images: {args.output}")
    for path, reason in report.failed:
        print(f"could not be read: {path}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def model_options(args: argparse.Namespace) -> dict:
    """Return the keyword arguments of `load` that the command line gives."""
    return {
        "weights": args.weights,
        "config_file": args.config_file,
        "device": args.device,
        "names": read_names(args.names) if args.names else None,
        "overrides": args.opts,
    }


def read_names(path: str) -> list[str]:
    """Read class names in the order of training.

    Args:
        path: a COCO file, a JSON list of names, or a file with one name on each line.

    Raises:
        ValueError: it holds no names.
    """
    from d2_balance.utils.files import read_json

    if path.endswith(".json"):
        data = read_json(path)
        if isinstance(data, dict):
            categories = data.get("categories") or []
            data = [c.get("name") for c in sorted(categories, key=lambda c: c.get("id", 0))]
        names = data
    else:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"{path} holds no class names; it must be a COCO file, a JSON list of strings, or a "
            "file with one name on each line"
        )
    return names


def _thresholds(entries: Sequence[str]) -> dict[str, float]:
    """Scores by class name from NAME=SCORE or a JSON file."""
    if len(entries) == 1 and entries[0].endswith(".json"):
        from d2_balance.utils.files import read_json

        data = read_json(entries[0])
        if not isinstance(data, dict) or not all(isinstance(v, int | float) for v in data.values()):
            raise ValueError(
                f"{entries[0]}: must be a JSON object of scores by class name, such as "
                f"{json.dumps({'cat': 0.5})}"
            )
        return data
    thresholds = {}
    for entry in entries:
        name, _, score = entry.rpartition("=")
        try:
            thresholds[name] = float(score)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--class-threshold {entry!r}: must be NAME=SCORE, such as cat=0.5")
    return thresholds
