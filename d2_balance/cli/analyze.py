"""Show which imbalance a dataset has, and print the YAML lines that fit.

Shown are classes and groups, foreground and background of the anchors of a configuration, objects
without a matching anchor, tail ratio and repeat factors, image-level labels and corrupt
annotations; each line of YAML has its reason.
"""

from __future__ import annotations

import argparse

from .arguments import add_overwrite, add_set, at_least, fraction


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
        help="YAML file, or a name of Detectron2's model zoo, whose anchors and settings are "
        "checked, and whose DATASETS.REGISTER is registered",
    )
    parser.add_argument("--html", metavar="FILE", help="write one page with images there")
    parser.add_argument("--yaml", metavar="FILE", help="write the suggested settings there")
    add_overwrite(parser)
    parser.add_argument(
        "--cuts",
        nargs=2,
        type=at_least(0),
        metavar=("RARE", "COMMON"),
        help="images up to which a class is rare or common; the file's groups, or 10 100",
    )
    parser.add_argument(
        "--max-images",
        type=at_least(1),
        default=200,
        help="images whose anchors are counted, sampled with seed 0 (default 200)",
    )
    parser.add_argument("--lambda", dest="lambda_", type=fraction, help="print TR of this lambda")
    parser.add_argument(
        "--tail-ratio", type=fraction, help="print lambda for this TR, for example 0.08"
    )
    add_set(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables; write page and YAML if they were asked for."""
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
    analysis = analyze(
        load(args.dataset, args.register),
        cfg,
        lambda_=args.lambda_,
        ratio=args.tail_ratio,
        cuts=tuple(args.cuts) if args.cuts else None,
        max_images=args.max_images,
    )
    print(as_text(analysis, base))
    if args.html:
        as_page(analysis, base).write(args.html)
        print(f"\npage written to {args.html}")
    if args.yaml:
        write_text(args.yaml, suggestion(analysis, base, args.yaml))
        print(f"\nsettings written to {args.yaml}")
    return 0
