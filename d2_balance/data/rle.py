"""Run lengths of masks in COCO's RLE, read without pycocotools.

pycocotools reads memory past the end, or never returns, where the runs of a mask do not fill its
image, so that masks are checked before it gets them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 8  # characters of one number: 40 bits


def run_lengths(counts: str | Sequence[int]) -> np.ndarray:
    """Pixels of each run, background first, column by column.

    Args:
        counts: the numbers themselves, or COCO's text: five bits a character from "0" on, the
            lowest first, a sixth bit where the number goes on; from the fourth number on the
            difference to the last but one.

    Returns:
        (n,) int64.

    Raises:
        ValueError: saying what is wrong with the counts.
    """
    if not isinstance(counts, str):
        if not all(type(count) is int for count in counts):
            raise ValueError("its counts are not integers")
        return np.array(counts, dtype=np.int64)
    numbers, _ = _numbers(counts.encode("utf-8"))
    _add_up(numbers, np.zeros(1, dtype=np.int64))
    return numbers


def _add_up(numbers: np.ndarray, first: np.ndarray) -> None:
    """Runs from the numbers of masks' texts, in place.

    Args:
        numbers: (n,) of all masks, one after the other.
        first: (m,) place of the first number of each mask.
    """
    count = np.diff(first, append=len(numbers))
    within = np.arange(len(numbers)) - np.repeat(first, count)
    for begin in (1, 2):  # from the second and from the third number on, every other one
        at = np.flatnonzero((within >= begin) & ((within - begin) % 2 == 0))
        sums = numbers[at].cumsum()
        own = np.maximum(count - begin + 1, 0) // 2  # of each mask
        before = np.concatenate([[0], sums])[own.cumsum() - own]
        numbers[at] = sums - np.repeat(before, own)


def _numbers(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a text, (n,) int64, and the place of the last character of each, (n,)."""
    data = np.frombuffer(text, dtype=np.uint8) - np.uint8(48)  # below "0" it wraps around
    if not len(data):
        return data.astype(np.int64), np.zeros(0, dtype=np.int64)
    if data.max() > 63:
        raise ValueError("its counts have a character that no compressed RLE has")
    if data[-1] >= 32:
        raise ValueError("its counts are cut off")
    ends = np.flatnonzero(data < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > LONGEST:
        raise ValueError("its counts have a number of more than 40 bits")
    found = (data[starts] & 31).astype(np.int64)
    for place in range(1, int(length.max())):
        at = np.flatnonzero(length > place)
        found[at] += (data[starts[at] + place] & 31).astype(np.int64) << 5 * place
    return found - np.where(data[ends] & 16, 1 << 5 * length, 0), ends  # the highest bit: a sign


def rle_problem(counts: str | Sequence[int], size: Sequence[int]) -> str:
    """What is wrong with the runs of a mask of (height, width) pixels, "" if nothing."""
    try:
        runs = run_lengths(counts)
    except (ValueError, OverflowError) as error:
        return str(error)
    if (runs < 0).any():
        return "it has a run of less than 0 pixels"
    if runs.sum() != size[0] * size[1]:
        return f"its runs have {runs.sum():,} pixels, not the {size[0] * size[1]:,} of its size"
    return ""


def all_fill(counts: Sequence[str], pixels: Sequence[int]) -> bool:
    """Whether `rle_problem` finds nothing in any of many masks, in a fraction of its time.

    Args:
        counts: texts.
        pixels: height times width of each.
    """
    length = np.array([len(text) for text in counts])
    try:
        runs, ends = _numbers("".join(counts).encode("ascii"))
    except ValueError:
        return False
    last = np.searchsorted(ends, length.cumsum() - 1)  # the last number of each mask
    if not length.all() or (ends[last] != length.cumsum() - 1).any():
        return False
    first = np.concatenate([[0], last[:-1] + 1])
    _add_up(runs, first)
    return bool((runs >= 0).all() and (np.add.reduceat(runs, first) == pixels).all())
