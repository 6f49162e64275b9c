"""Raise the scores of rare classes before the cap on detections of an image.

`fit` chooses factors by frequency group, or NorCal's gamma, on held-out training images; `apply`
writes the predictions of other images with them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from d2_balance.evaluation.sources import Annotations

METRICS = ("AP", "APr", "APc", "APf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance rescore`."""
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
    fit.add_argument("--metric", default="AP", choices=METRICS, help="what to raise (default AP)")
    apply.add_argument("--factors", required=True, metavar="FILE", help="what `fit` wrote")


def run(args: argparse.Namespace) -> int:
    """Fits or applies; 2 where the user has to change something."""
    try:
        if args.action == "apply":
            apply_factors(
                args.predictions, args.factors, args.dataset, args.output, max_dets=args.max_dets
            )
        else:
            tests, train = list(args.test), []
            if args.run_directory:
                found = _sets_of_run(args.run_directory)
                tests += found[0]
                train = found[1]
            fit_factors(
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
    except (ValueError, FileExistsError) as error:
        print(f"d2-balance rescore: error: {error}", file=sys.stderr)
        return 2
    return 0


def fit_factors(
    predictions: str,
    dataset: str,
    output: str,
    *,
    tests: Sequence[str],
    trained_on: Sequence[str] = (),
    train: str | None = None,
    method: str = "groups",
    task: str = "",
    metric: str = "AP",
    max_dets: int = 300,
) -> None:
    """Fit on held-out images, print what changes, write the factors; see `add_arguments`.

    Raises:
        ValueError: no test set is named, the images are among those of one, or the classes have
            no frequency groups.
        FileExistsError: the output is there.
    """
    from d2_balance.evaluation.columns import read_columns
    from d2_balance.evaluation.merge.rescore import Measure, changes, check_held_out, fit
    from d2_balance.evaluation.sources import Annotations

    _check_output(output, max_dets)
    if not tests:
        raise ValueError(
            "name what is evaluated on with --test or --run; factors are never fitted on it"
        )
    truth = Annotations.load(dataset)
    check_held_out(truth, [Annotations.load(test, "--test") for test in tests])
    for name in trained_on:
        _report_trained(truth, Annotations.load(name, "--run"))
    groups, counts = _groups(truth, Annotations.load(train, "--train") if train else truth)
    columns = read_columns(predictions, truth.data["images"], truth.data["categories"], truth.path)
    if not task:
        masks = len(columns) and columns.has_mask.all()
        task = "segm" if masks and _all_masks(truth) else "bbox"
    lacking = ~columns.has_mask if task == "segm" else columns.box[:, 0] != columns.box[:, 0]
    if lacking.any():
        what = "a mask" if task == "segm" else "a bbox"
        raise ValueError(
            f"{predictions}: {task} needs {what} in every detection, {lacking.sum()} "
            "have none; --task chooses the other"
        )
    measure = Measure(truth, columns, groups, task, max_dets)
    plain = measure(columns.score)
    rule, tried = fit(measure, groups, counts, method, metric)
    scores = rule.scores(columns, truth.class_names)
    after = measure(scores)
    rule.write(
        output,
        task=task,
        metric=metric,
        max_dets=max_dets,
        before={k: plain[k] for k in METRICS},
        after={k: after[k] for k in METRICS},
        tried=[[text, {k: metrics[k] for k in METRICS}] for text, metrics in tried],
    )
    chosen = (
        f"gamma {rule.gamma:g}"
        if method == "norcal"
        else ", ".join(f"{k} {v:.3g}" for k, v in rule.factors.items())
    )
    print(f"{len(tried)} settings tried on {dataset}, {task}; best {metric}: {chosen}")
    print(_metrics(plain, after))
    rows = changes(columns, scores, truth.class_names, groups, max_dets)
    print(_changes(rows, max_dets))
    if not _cuts(columns, max_dets):
        print(
            f"- no image has more than {max_dets} detections: the cap cuts nothing, and factors "
            "change nothing. Predict with a larger TEST.DETECTIONS_PER_IMAGE and a smaller score "
            "threshold"
        )


def apply_factors(
    predictions: str, factors: str, dataset: str, output: str, *, max_dets: int = 300
) -> None:
    """Write predictions with new scores, the best `max_dets` of each image (0: all).

    Raises:
        ValueError: files that do not fit each other.
        FileExistsError: the output is there.
    """
    from d2_balance.evaluation.columns import DetectionTexts, capped, read_columns
    from d2_balance.evaluation.merge.rescore import Rescoring, changes
    from d2_balance.evaluation.sources import Annotations
    from d2_balance.utils.files import atomic_path

    _check_output(output, max_dets, 0)
    rule = Rescoring.read(factors)
    truth = Annotations.load(dataset)
    columns = read_columns(predictions, truth.data["images"], truth.data["categories"], truth.path)
    scores = rule.scores(columns, truth.class_names)
    rows = capped(columns, scores, max_dets).tolist()
    if rows:
        with (
            DetectionTexts(columns) as texts,
            atomic_path(output) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            for number, row in enumerate(rows):
                same = scores[row] == columns.score[row]
                text = texts.text(row) if same else texts.changed(row, score=float(scores[row]))
                file.write(("[\n" if not number else ",\n") + text)
            file.write("\n]\n")
    else:
        with atomic_path(output) as temporary, open(temporary, "w") as file:
            file.write("[]\n")
    changed = int((scores != columns.score).sum())
    print(f"{output}: {len(rows):,} detections; {changed:,} of {len(columns):,} scores changed")
    print(_changes(changes(columns, scores, truth.class_names, rule.groups, max_dets), max_dets))


def _check_output(output: str, max_dets: int, least: int = 1) -> None:
    if os.path.exists(output):
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new file")
    if max_dets < least:
        raise ValueError(f"max_dets is {max_dets}; it must be at least {least}")


def _groups(truth: Annotations, train: Annotations) -> tuple[dict[str, str], dict[str, int]]:
    """Frequency group and training images by class name."""
    from d2_balance.data.checks.structure import category_name
    from d2_balance.evaluation.groups import resolve_groups, training_counts

    names = list(truth.class_names.values())
    by_name = {category_name(c): c for c in train.data["categories"]}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{train.name} lacks {len(missing)} classes, such as {missing[0]!r}")
    entries = [by_name[name] for name in names]
    counts = training_counts(names, train.image_count, entries, train.name)
    letters = resolve_groups(names, None, entries, counts, (10, 100))
    pairs = zip(names, letters, counts, strict=True)
    found = [(name, letter, count or 0) for name, letter, count in pairs]
    return {n: letter for n, letter, _ in found}, {n: count for n, _, count in found}


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


def _report_trained(truth: Annotations, train: Annotations) -> None:
    ids = {image["id"] for image in train.data["images"]}
    seen = sum(image["id"] in ids for image in truth.data["images"])
    if seen:
        print(
            f"- {seen} of {len(truth.data['images'])} images have ids of {train.name}, which the "
            "model was trained on: its scores are higher there than on new images"
        )


def _all_masks(truth: Annotations) -> bool:
    return all(a.get("segmentation") for a in truth.data["annotations"])


def _cuts(columns, max_dets: int) -> bool:
    import numpy as np

    return bool(len(columns)) and int(np.bincount(columns.image).max()) > max_dets


def _metrics(before: dict, after: dict) -> str:
    rows = [
        [name, *(f"{found[k]:.2f}" for k in METRICS)]
        for name, found in (("before", before), ("after", after))
    ]
    return tabulate(rows, ["", *METRICS], tablefmt="github", disable_numparse=True)


def _changes(rows: list[list], max_dets: int) -> str:
    cap = f"of {max_dets} an image" if max_dets else "(no cap)"
    head = ["group", "classes", "detections", f"kept {cap}, before", "after"]
    return tabulate(rows, head, tablefmt="github")
