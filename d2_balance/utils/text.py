"""Numbers and tables as text: one form in commands, pages and Markdown files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

NOTHING = "-"
"""Stands for None and NaN."""


def percent(value: float | None, digits: int = 1) -> str:
    """Format a percentage, such as 12.3."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """Format a difference with its sign, such as +0.8."""
    return NOTHING if value is None or math.isnan(value) else f"{value:+.{digits}f}"


def count(value: int | None) -> str:
    """Format an integer with separators, such as 1,203."""
    return NOTHING if value is None else f"{value:,}"


def plural(number: int, noun: str) -> str:
    """Format a number with its noun, such as 1 class or 1,203 classes."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def cell(value: object) -> str:
    """Format any value of a table: floats as percentages, None as "-"."""
    return percent(value) if isinstance(value, float | None) else str(value)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], *, align: bool = False) -> str:
    """Format a Markdown table.

    Args:
        rows: cells, which stand as they are given.
        headers: names of the columns.
        align: True puts columns of numbers to the right.
    """
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=not align)
