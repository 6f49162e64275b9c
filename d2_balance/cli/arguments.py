"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(low: int) -> Callable[[str], int]:
    """Return the type of an argument that is an integer of at least `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {low}")
        return value

    return integer


def fraction(text: str) -> float:
    """Type of an argument that is a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, which becomes `opts`."""
    parser.add_argument(
        "--set",
        dest="opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="keys of the configuration and their values",
    )
