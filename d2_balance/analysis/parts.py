"""The parts that a report is made of, for the console and for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        headers: one for each column.
        rows: cells as text or numbers.
        folded: heading under which a page hides it at first, "" shows it.
        page_only: True keeps it off the console.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence]
    folded: str = ""
    page_only: bool = False


@dataclass(frozen=True)
class Plot:
    """An image, drawn when a page asks for it."""

    draw: Callable[[], Figure]
    caption: str


Part = Text | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: list[Part]
