"""List every method with its paper, and with --pairs which go together."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance methods`."""
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="print which losses work in which heads and with which other parts",
    )
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="bring the tables in a Markdown file, docs/methods.md, up to date",
    )


def run(args: argparse.Namespace) -> int:
    """Print a table, or write both."""
    from d2_balance.methods import blocks, method_table, pair_table, root_from
    from d2_balance.utils.blocks import with_blocks
    from d2_balance.utils.files import write_text

    if args.write:
        path = Path(args.write)
        text = with_blocks(path.read_text(encoding="utf-8"), blocks(root_from(path)))
        write_text(args.write, text)
    elif args.pairs:
        print("x: a classification loss works in that head, or together with that part.\n")
        print(pair_table())
    else:
        print(method_table(links=False))
        print("\n`d2-balance methods --pairs` says which go together.")
    return 0
