"""Annotations that cannot be trained on: named by reason, counted, and remembered.

Boxes are XYWH in pixels, (x, y) the upper left corner, as in COCO and LVIS files. A box that cannot
be used takes its annotation out; a mask that cannot be used does not take its box along.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from typing import Any

import msgspec
import numpy as np

from ..rle import LONGEST, all_fill, rle_problem, run_lengths

MALFORMED_BOX = "box is missing or not four numbers"
NOT_FINITE = "box is not finite"
NEGATIVE_SIZE = "box of negative size"
NO_AREA = "box of no area"
OUTSIDE = "box outside the image"
BOX_PROBLEMS = (MALFORMED_BOX, NOT_FINITE, NEGATIVE_SIZE, NO_AREA, OUTSIDE)

BAD_POLYGON = "polygon of fewer than 3 points or of an odd number of coordinates"
FLAT_POLYGON = "polygon without area: its points lie on one line"
NOT_A_MASK = "segmentation is neither lists of finite coordinates nor an RLE"
RLE_SIZE = "RLE mask of another size than the image"
RLE_RUNS = "RLE mask whose runs do not fill the image"
NO_PIXEL = "mask without a pixel of the image"
MASK_PROBLEMS = (BAD_POLYGON, FLAT_POLYGON, NOT_A_MASK, RLE_SIZE, RLE_RUNS, NO_PIXEL)

NO_MASK, POLYGONS, RLE = 0, 1, 2
"""What the segmentation of an annotation is."""

# Files round coordinates to two decimals, so x + w may pass the border by that much.
_BORDER_TOLERANCE = 0.011
_SHOWN = 10

logger = logging.getLogger(__name__)
_reports: dict[str, BadAnnotations] = {}


@dataclass
class BadAnnotations:
    """What was left out or fixed in one annotation file, and what looks wrong in it.

    Attributes:
        json_file: path of the file.
        skipped: ids of the annotations that were left out, by reason.
        clipped: ids of annotations whose box stuck out of the image and was cut at its border.
        trimmed: ids of annotations that lost broken polygons and kept sound ones.
        bad_masks: ids of annotations with a sound box whose mask cannot be used, by reason. They
            are left out only where masks are trained or measured.
        hints: sentences about what no single annotation shows, with a remedy.
        crowds: objects with iscrowd 1 by class name, classes without one left out.
    """

    json_file: str
    skipped: dict[str, list[Hashable]] = field(default_factory=dict)
    clipped: list[Hashable] = field(default_factory=list)
    trimmed: list[Hashable] = field(default_factory=list)
    bad_masks: dict[str, list[Hashable]] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    crowds: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of annotations that were left out, by reason."""
        return {reason: len(ids) for reason, ids in self.skipped.items()}

    @property
    def total(self) -> int:
        """Number of annotations that were left out."""
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.skipped or self.clipped or self.trimmed or self.bad_masks or self.hints)

    def describe_crowds(self) -> str:
        """One sentence with the crowds of each class, "" without one."""
        if not self.crowds:
            return ""
        counts = sorted(self.crowds.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in counts[:_SHOWN])
        more = f" and {len(counts) - _SHOWN} more classes" if len(counts) > _SHOWN else ""
        return f"crowds (iscrowd 1), which are not trained on: {shown}{more}"

    def describe(self) -> str:
        """One text with a line per reason: the count and up to 10 ids."""
        lines = [f"{self.json_file}: {self.total} bad annotation(s) skipped"]
        lines += [f"  skipped: {reason}: {_ids(ids)}" for reason, ids in self.skipped.items()]
        lines += [
            f"  box kept, skipped where masks are trained or measured: {reason}: {_ids(ids)}"
            for reason, ids in self.bad_masks.items()
        ]
        if self.clipped:
            lines.append(f"  kept, box clipped at the border of the image: {_ids(self.clipped)}")
        if self.trimmed:
            lines.append(f"  kept without their broken polygons: {_ids(self.trimmed)}")
        lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)


def bad_annotations(dataset_name: str) -> BadAnnotations | None:
    """Report of a dataset, for the summary of a run.

    Returns:
        The report; None if the set was not loaded yet or has a loader of its own.
    """
    return _reports.get(dataset_name)


def remember(dataset_name: str, report: BadAnnotations) -> None:
    """Keep the report of a dataset, and log it unless the same one was logged before."""
    if report and _reports.get(dataset_name) != report:
        logger.warning("Dataset %s: %s", dataset_name, report.describe())
    _reports[dataset_name] = report


def box_problems(
    boxes: np.ndarray, malformed: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look at the box of every annotation.

    Args:
        boxes: (A, 4) float64; NaN where malformed.
        malformed: (A,) bool, boxes that are not four numbers.
        sizes: (A, 2) height and width of the image of each.

    Returns:
        (A,) int8 index in `BOX_PROBLEMS`, -1 for a sound box; (A,) bool, sound boxes that stick out
        of their image.
    """
    x, y, w, h = boxes.T
    height, width = sizes.T
    with np.errstate(invalid="ignore", over="ignore"):
        x1, y1 = x + w, y + h
        tests = [
            malformed,
            ~np.isfinite(boxes).all(axis=1),
            (w < 0) | (h < 0),
            (w == 0) | (h == 0),
            (x >= width) | (y >= height) | (x1 <= 0) | (y1 <= 0),
        ]
        sticks_out = np.maximum.reduce([-x, -y, x1 - width, y1 - height]) > _BORDER_TOLERANCE
    problem = np.select(tests, range(len(tests)), default=-1).astype(np.int8)
    return problem, sticks_out & (problem < 0)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Cut boxes (n, 4) at the borders of their images of (height, width) (n, 2)."""
    low = np.maximum(boxes[:, :2], 0.0)
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], sizes[:, ::-1])
    return np.concatenate([low, high - low], axis=1)


class _Rle(msgspec.Struct):
    size: list[int]
    counts: str | list[int]


# a float among the integers of an RLE; the text of its counts may look like one, which is harmless
_FLOAT = re.compile(rb"\d\.|\d[eE][-+]?\d")
_masks = msgspec.json.Decoder(list[list[list[float]] | _Rle | None])


def mask_problems(
    texts: Sequence[bytes], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[int, bytes]]:
    """Look at the masks of a chunk of annotations.

    Args:
        texts: A segmentations as JSON; b"" where there is none.
        sizes: (A, 2) height and width of the image of each.

    Returns:
        (A,) uint8 what each is: `NO_MASK`, `POLYGONS` or `RLE`; (A,) int8 index in
        `MASK_PROBLEMS`, -1 where nothing is wrong; new texts of polygons that lose broken ones, and
        of RLEs whose integers are written as floats or text.
    """
    given = [i for i, text in enumerate(texts) if text]
    what, problem = np.zeros(len(texts), np.uint8), np.full(len(texts), -1, np.int8)
    typed = True  # every coordinate is a finite number
    try:
        values: list[Any] = _masks.decode(b"[" + b",".join(texts[i] for i in given) + b"]")
    except msgspec.DecodeError:
        typed, values = False, [json.loads(texts[i]) for i in given]
    polygons, rles, odd = _by_form(given, values, typed)
    for i, value in (*polygons, *rles, *odd):
        what[i] = RLE if isinstance(value, dict | _Rle) else POLYGONS
    rewritten = {
        i: msgspec.json.encode(value)
        for i, value in (*rles, *odd)
        if isinstance(value, _Rle) and _FLOAT.search(texts[i])
    }
    if rles and not _fill([rle for _, rle in rles], sizes[[i for i, _ in rles]]):
        odd += rles
    for i, value in odd:
        sound, reason = _check_segmentation(value, sizes[i].tolist())
        if reason is not None:
            problem[i] = MASK_PROBLEMS.index(reason)
        elif sound is not value:
            rewritten[i] = _encoded(sound, texts[i])
        if reason is None and what[i] == POLYGONS:
            polygons.append((i, sound))
    places = np.array([i for i, _ in polygons], dtype=np.int64)
    flat, outside = _without_area([value for _, value in polygons], sizes[places])
    problem[places[outside]] = MASK_PROBLEMS.index(NO_PIXEL)
    problem[places[flat]] = MASK_PROBLEMS.index(FLAT_POLYGON)
    return what, problem, {i: text for i, text in rewritten.items() if problem[i] < 0}


_Numbered = list[tuple[int, Any]]


def _by_form(
    numbers: Sequence[int], values: Sequence[Any], typed: bool
) -> tuple[_Numbered, _Numbered, _Numbered]:
    """Segmentations as polygons, RLEs of long text, and those to be checked one at a time."""
    polygons: _Numbered = []
    rles: _Numbered = []
    odd: _Numbered = []
    for i, value in zip(numbers, values, strict=True):
        if not value or value == [[]]:
            continue  # no mask
        if _are_polygons(value, typed):
            polygons.append((i, value))
        # the runs of a mask without a pixel are one number, which is short
        elif isinstance(value, _Rle) and len(value.counts) > LONGEST and type(value.counts) is str:
            rles.append((i, value))
        else:
            odd.append((i, value))
    return polygons, rles, odd


def _are_polygons(value: Any, typed: bool) -> bool:
    """Whether a segmentation is lists of finite numbers, of the lengths of polygons."""
    if not isinstance(value, list):
        return False
    if not typed:
        return all(map(_is_sound, value))
    return all([len(p) >= 6 and not len(p) % 2 for p in value])


def _encoded(sound: Any, text: bytes) -> bytes:
    """The JSON of what is left of a segmentation; polygons keep their own numbers."""
    if isinstance(sound, dict):
        return msgspec.json.encode(sound)
    return msgspec.json.encode([p for p in json.loads(text) if _is_sound(p)])


def _is_sound(polygon: Any) -> bool:
    """Whether a list has the length of a polygon and can be summed, with a finite sum."""
    try:
        return len(polygon) >= 6 and len(polygon) % 2 == 0 and isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False


def _fill(rles: Sequence[_Rle], sizes: np.ndarray) -> bool:
    """Whether masks whose counts are text are of the size of their images and fill it."""
    if any(rle.size != size for rle, size in zip(rles, sizes.tolist(), strict=True)):
        return False
    return all_fill([rle.counts for rle in rles], sizes.prod(axis=1))  # type: ignore[misc]


def _without_area(
    masks: Sequence[list[list[float]]], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look at masks of polygons of 6 coordinates or more.

    Returns:
        (n,) bool, masks all of whose polygons have no area; (n,) bool, masks all of whose polygons
        lie outside their image of (height, width) (n, 2).
    """
    polygons = list(chain.from_iterable(masks))
    if not polygons:
        return np.zeros(len(masks), bool), np.zeros(len(masks), bool)
    length = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
    points = np.fromiter(chain.from_iterable(polygons), np.float64).reshape(-1, 2)
    start = length.cumsum() - length
    count = np.fromiter(map(len, masks), np.int64, len(masks))
    border = np.repeat(sizes[:, ::-1], count, axis=0)
    low, high = np.minimum.reduceat(points, start), np.maximum.reduceat(points, start)
    outside = ((high <= 0) | (low >= border)).any(axis=1)
    points = points - np.repeat(points[start], length, axis=0)  # keeps digits of small polygons
    # every point lies on the line through the first point and the one that is farthest from it
    distance = np.abs(points).max(axis=1)
    farthest = np.maximum.reduceat(distance, start)
    at = np.flatnonzero(distance == np.repeat(farthest, length))
    at = at[np.searchsorted(at, start)]
    line = np.repeat(points[at], length, axis=0)
    off = np.abs(points[:, 0] * line[:, 1] - points[:, 1] * line[:, 0])
    flat = np.maximum.reduceat(off, start) <= 1e-9 * farthest**2
    first = count.cumsum() - count
    return np.logical_and.reduceat(flat, first), np.logical_and.reduceat(outside, first)


def _check_segmentation(segmentation: Any, size: list[int]) -> tuple[Any, str | None]:
    """The part of a segmentation that can be used, or the reason why there is none."""
    if isinstance(segmentation, dict | _Rle):
        return _check_rle(segmentation, size)
    if not isinstance(segmentation, list):
        return None, NOT_A_MASK
    for polygon in segmentation:
        try:
            # one sum is finite only if every coordinate is; a string or a list raises
            if not isfinite(sum(polygon)):
                return None, NOT_A_MASK
        except (TypeError, OverflowError):
            return None, NOT_A_MASK
    sound = [p for p in segmentation if _is_sound(p)]
    if len(sound) == len(segmentation):
        return segmentation, None
    return (sound, None) if sound else (None, BAD_POLYGON)


def _check_rle(rle: dict[str, Any] | _Rle, size: list[int]) -> tuple[Any, str | None]:
    """An RLE with integers, the same object if it has them already, or the reason for none."""
    given = rle if isinstance(rle, dict) else {"size": rle.size, "counts": rle.counts}
    if not isinstance(given.get("counts"), str | list) or "size" not in given:
        return None, NOT_A_MASK
    sound = {key: _integers(given[key]) for key in ("size", "counts")}
    if sound["size"] != size:
        return None, RLE_SIZE
    if rle_problem(sound["counts"], size):
        return None, RLE_RUNS
    if not run_lengths(sound["counts"])[1::2].any():
        return None, NO_PIXEL
    lists = [value for value in given.values() if isinstance(value, list)]
    same = isinstance(rle, _Rle) or all(type(v) is int for value in lists for v in value)
    return (rle if same else sound), None


def _integers(values: Any) -> Any:
    """A list whose integers may be written as floats or text; anything else stays."""
    if not isinstance(values, list):
        return values
    try:
        found = [v if type(v) is int else float(v) for v in values]
    except (TypeError, ValueError):
        return values
    return [int(v) if isfinite(v) and v == int(v) else v for v in found]


def _ids(ids: Sequence[Hashable]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{len(ids)} (annotation id {shown}{more})"
