"""Progress of long work: a bar in a terminal, a line now and then in a pipe, nothing when quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

PERIOD = 10.0  # seconds between two lines
QUIET = "D2_BALANCE_QUIET"
"""Environment variable that turns progress off, in processes that a command starts too."""

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    unit: str = "images",
    quiet: bool = False,
) -> Iterator[T]:
    """Yield the items and report on stderr how many there were.

    Args:
        iterable: what is worked on.
        description: what is done, such as "predicting".
        total: number of items; None takes the length of `iterable` if it has one.
        unit: what an item is, in the plural.
        quiet: True reports nothing; so does $D2_BALANCE_QUIET.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if quiet or os.environ.get(QUIET):
        yield from iterable
    elif sys.stderr.isatty():
        from tqdm import tqdm  # a terminal alone needs it

        yield from tqdm(iterable, description, total, unit=f" {unit}", delay=2)
    else:
        start = reported = time.monotonic()
        for done, item in enumerate(iterable):
            now = time.monotonic()
            if now - reported >= PERIOD:
                print(_line(description, done, total, unit, now - start), file=sys.stderr)
                reported = now
            yield item


def _line(description: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / seconds
    if not total:
        return f"{description}: {done} {unit}, {rate:.2g} per second"
    left = f", {_time((total - done) / rate)} left" if rate else ""
    return f"{description}: {done} of {total} {unit} ({done / total:.0%}){left}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
