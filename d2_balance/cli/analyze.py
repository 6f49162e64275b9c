"""Show which imbalance a dataset has, and print the YAML lines that fit.

Shown are classes and groups, foreground and background of the anchors of a configuration, objects
without a matching anchor, tail ratio and repeat factors, image-level labels and corrupt
annotations; each line of YAML has its reason.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance analyze`."""
    parser.add_argument(
        "dataset",
        help="a registered training set, an annotation file in COCO or LVIS style, or a file "
        "written by ClassCounts.save",
    )
    parser.add_argument(
        "--register",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help="annotation file and image directory of a dataset that is not registered yet",
    )
    parser.add_argument(
        "--config-file",
        default="",
        help="YAML file, or a name of Detectron2's model zoo; its anchors and settings are looked "
        "at, and sets of its DATASETS.REGISTER are known",
    )
    parser.add_argument("--html", metavar="FILE", help="write one page with images there")
    parser.add_argument("--yaml", metavar="FILE", help="write the suggested settings there")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument(
        "--cuts",
        nargs=2,
        type=_count,
        metavar=("RARE", "COMMON"),
        help="images up to which a class is rare or common; the file's groups, or 10 100",
    )
    parser.add_argument(
        "--max-images",
        type=_positive,
        default=200,
        help="images whose anchors are looked at, sampled with seed 0 (default 200)",
    )
    parser.add_argument("--lambda", dest="lambda_", type=_fraction, help="print TR of this lambda")
    parser.add_argument(
        "--tail-ratio", type=_fraction, help="print lambda for this TR, for example 0.08"
    )
    parser.add_argument(
        "--set",
        dest="opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="keys of the configuration and their values",
    )


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the files."""
    print(analyze_and_save(args))
    return 0


def analyze_and_save(args: argparse.Namespace) -> str:
    """Return the report for the console; write page and YAML if they were asked for.

    Raises:
        ValueError: the data or the configuration cannot be used.
        FileExistsError: an output exists and --overwrite is not given.
    """
    from d2_balance.analysis.output import Base, as_page, as_text, suggestion
    from d2_balance.analysis.report import analyze
    from d2_balance.analysis.source import load
    from d2_balance.utils.files import check_new, write_text

    check_new([args.html, args.yaml], args.overwrite)  # before the work
    if args.opts and not args.config_file:
        raise ValueError("--set changes keys of a --config-file, and there is none")
    if args.cuts and args.cuts[0] > args.cuts[1]:
        raise ValueError(f"--cuts {args.cuts[0]} {args.cuts[1]}: RARE must not be above COMMON")
    base, cfg = Base("", args.opts), None
    if args.config_file:
        from d2_balance.data import register_from_config
        from d2_balance.engine import find_config, read_config

        base = Base(find_config(args.config_file), args.opts)
        cfg = read_config(base.file, base.given)
        register_from_config(cfg)
    found = analyze(
        load(args.dataset, args.register),
        cfg,
        lambda_=args.lambda_,
        ratio=args.tail_ratio,
        cuts=tuple(args.cuts) if args.cuts else None,
        max_images=args.max_images,
    )
    text = as_text(found, base)
    if args.html:
        as_page(found, base).write(args.html)
        text += f"\n\npage written to {args.html}"
    if args.yaml:
        write_text(args.yaml, suggestion(found, base, args.yaml))
        text += f"\n\nsettings written to {args.yaml}"
    return text
