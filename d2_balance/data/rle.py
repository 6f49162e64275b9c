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
    _add_up(numbers)
    return numbers


def _add_up(numbers: np.ndarray) -> None:
    """Runs from the numbers of one mask's text, in place."""
    for chain in (numbers[1::2], numbers[2::2]):
        chain[:] = chain.cumsum()


def _numbers(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a text, (n,) int64, and the place of the last character of each, (n,)."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(data):
        return data, data
    if data.min() < 0 or data.max() > 63:
        raise ValueError("its counts have a character that no compressed RLE has")
    if data[-1] >= 32:
        raise ValueError("its counts are cut off")
    ends = np.flatnonzero(data < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > LONGEST:
        raise ValueError("its counts have a number of more than 40 bits")
    place = np.arange(len(data)) - np.repeat(starts, length)
    found = np.add.reduceat((data & 31) << 5 * place, starts)
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
    """Whether `rle_problem` finds nothing in any of some hundred masks, at a fifth of its time.

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
    for start, end in zip(first.tolist(), last.tolist(), strict=True):
        _add_up(runs[start : end + 1])
    return bool((runs >= 0).all() and (np.add.reduceat(runs, first) == pixels).all())
