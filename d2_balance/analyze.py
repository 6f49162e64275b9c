"""Print how the classes of a data set fall off, the tail ratio TR(lambda) of the equalization loss,
and the lambda for a wanted tail ratio; 2 to 10 % is the useful range (arXiv:2003.05176)."""

from __future__ import annotations

import argparse
import os
import sys

from tabulate import tabulate

USUAL_RATIOS = (0.02, 0.05, 0.10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance analyze`."""
    parser.add_argument(
        "dataset", help="a registered training set, or a file written by ClassStatistics.save"
    )
    parser.add_argument(
        "--register",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help="annotation file and picture folder of a data set that is not registered yet",
    )
    parser.add_argument("--lambda", dest="lambda_", type=_share, help="print TR of this lambda")
    parser.add_argument(
        "--tail-ratio", type=_share, help="print lambda for this TR, for example 0.08"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def run(args: argparse.Namespace) -> int:
    """Prints the tables; 2 where the data set cannot be read."""
    try:
        statistics = load_statistics(args.dataset, args.register)
    except ValueError as error:
        print(f"d2-balance analyze: error: {error}", file=sys.stderr)
        return 2
    print(report(statistics, args.lambda_, args.tail_ratio))
    return 0


def load_statistics(dataset: str, files: list[str] | None = None):
    """Class counts of a registered set, of files registered under that name, or of a saved file.

    Raises:
        ValueError: the name is unknown or the data cannot be read.
    """
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from . import add_balance_config
    from .data import ClassStatistics, register_json

    if files:
        register_json(dataset, *files, key="--register")
    elif dataset not in DatasetCatalog:
        if os.path.isfile(dataset):
            return ClassStatistics.load(dataset)
        raise ValueError(
            f"{dataset!r} is neither a registered data set nor a file; --register JSON IMAGES "
            "registers your own."
        )
    DatasetCatalog.get(dataset)  # the number of classes is known once it is loaded
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.DATASETS.TRAIN = (dataset,)
    classes = len(MetadataCatalog.get(dataset).thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    return ClassStatistics.from_config(cfg)


def report(statistics, lambda_: float | None = None, ratio: float | None = None) -> str:
    """The tables as text.

    Args:
        statistics: ClassStatistics of the training set.
        lambda_: threshold whose TR is wanted, or None.
        ratio: TR whose lambda is wanted, or None.
    """
    from .data.groups import GROUPS
    from .losses.eql import lambda_for_tail_ratio, tail_ratio, tail_weight

    count, frequency, groups = statistics.image_count, statistics.frequency, statistics.group()
    rows = []
    for letter, name in GROUPS.items():
        own = [int(c) for c, group in zip(count, groups, strict=True) if group == letter]
        span = f"{min(own)} to {max(own)}" if own else "-"
        rows.append([name, len(own), span])
    text = [
        f"{statistics.num_images:,} pictures, {int(statistics.instance_count.sum()):,} objects, "
        f"{statistics.num_classes} classes",
        "",
        tabulate(rows, headers=["group", "classes", "pictures per class"], tablefmt="github"),
        "",
    ]
    thresholds = [] if lambda_ is None else [lambda_]
    wanted = USUAL_RATIOS if ratio is None and lambda_ is None else [] if ratio is None else [ratio]
    thresholds += [lambda_for_tail_ratio(frequency, count, r) for r in wanted]
    rows = []
    for value in thresholds:
        tail = tail_weight(frequency, value, "step")
        rows.append(
            [f"{value:.6g}", int(tail.sum()), f"{100 * float(tail_ratio(tail, count)):.1f} %"]
        )
    headers = ["MODEL.BALANCE.EQL.LAMBDA_", "tail classes", "TR"]
    return "\n".join(
        [*text, tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)]
    )
