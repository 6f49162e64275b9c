"""Annotations that cannot be trained on: found, left out, counted by reason, and remembered.

Boxes are XYWH in pixels, (x, y) the upper left corner, as in COCO and LVIS files.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from ..rle import rle_problem

MALFORMED_BOX = "box is missing or not four numbers"
NOT_FINITE = "box is not finite"
NEGATIVE_SIZE = "box of negative size"
NO_AREA = "box of no area"
OUTSIDE = "box outside the image"
BAD_POLYGON = "polygon of fewer than 3 points or of an odd number of coordinates"
NOT_A_MASK = "segmentation is neither lists of finite coordinates nor an RLE"
RLE_SIZE = "RLE mask of another size than the image"
RLE_RUNS = "RLE mask whose runs do not fill the image"

# Files round coordinates to two decimals, so x + w may pass the border by that much.
_BORDER_TOLERANCE = 0.011
_SHOWN = 10

logger = logging.getLogger(__name__)
_reports: dict[str, "BadAnnotations"] = {}


@dataclass
class BadAnnotations:
    """What was left out or fixed in one annotation file.

    Attributes:
        json_file: path of the file.
        skipped: ids of the annotations that were left out, by reason.
        clipped: ids of annotations whose box stuck out of the image and was cut at its border.
        trimmed: ids of annotations that lost broken polygons and kept sound ones.
    """

    json_file: str
    skipped: dict[str, list[Hashable]] = field(default_factory=dict)
    clipped: list[Hashable] = field(default_factory=list)
    trimmed: list[Hashable] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Number of annotations that were left out, by reason."""
        return {reason: len(ids) for reason, ids in self.skipped.items()}

    @property
    def total(self) -> int:
        """Number of annotations that were left out."""
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.skipped or self.clipped or self.trimmed)

    def describe(self) -> str:
        """One text with a line per reason: the count and up to 10 ids."""
        lines = [f"{self.json_file}: {self.total} bad annotation(s) skipped"]
        lines += [f"  skipped: {reason}: {_ids(ids)}" for reason, ids in self.skipped.items()]
        if self.clipped:
            lines.append(f"  kept, box clipped at the border of the image: {_ids(self.clipped)}")
        if self.trimmed:
            lines.append(f"  kept without their broken polygons: {_ids(self.trimmed)}")
        return "\n".join(lines)


@dataclass
class Findings:
    """Result of `find_bad_annotations`; keys are positions in the list of annotations.

    Attributes:
        skip: positions to leave out.
        boxes: boxes that replace those of the file, clipped to the image.
        segmentations: polygons that replace those of the file.
        report: the same by annotation id.
    """

    skip: set[int]
    boxes: dict[int, list[float]]
    segmentations: dict[int, list[list[float]]]
    report: BadAnnotations


def find_bad_annotations(
    annotations: list[dict[str, Any]], sizes: dict[Hashable, tuple[int, int]], json_file: str
) -> Findings:
    """Look at the box and the segmentation of every annotation.

    Args:
        annotations: records of the file; their ``id`` and ``image_id`` must have been checked.
        sizes: (height, width) in pixels by image id.
        json_file: path of the file, for the report.

    Returns:
        What to leave out and what to replace. The annotations themselves stay as they are.
    """
    reasons, boxes = _check_boxes(annotations, sizes)
    segmentations = {}
    for position, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if segmentation and position not in reasons:
            sound, reason = _check_segmentation(segmentation, sizes[annotation["image_id"]])
            if reason is not None:
                reasons[position] = reason
            elif sound is not segmentation:
                segmentations[position] = sound
    report = BadAnnotations(json_file)
    for position, reason in sorted(reasons.items()):
        report.skipped.setdefault(reason, []).append(annotations[position]["id"])
    boxes = {position: box for position, box in boxes.items() if position not in reasons}
    report.clipped = [annotations[position]["id"] for position in boxes]
    report.trimmed = [annotations[position]["id"] for position in segmentations]
    return Findings(set(reasons), boxes, segmentations, report)


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


def _check_boxes(
    annotations: list[dict], sizes: dict[Hashable, tuple[int, int]]
) -> tuple[dict[int, str], dict[int, list[float]]]:
    """Reasons to skip, and clipped boxes, both by position."""
    if not annotations:
        return {}, {}
    boxes, malformed = _box_array(annotations)  # (A, 4), (A,)
    height, width = np.array([sizes[a["image_id"]] for a in annotations], dtype=np.float64).T
    x, y, w, h = boxes.T
    with np.errstate(invalid="ignore", over="ignore"):
        x1, y1 = x + w, y + h
        tests = {
            MALFORMED_BOX: malformed,
            NOT_FINITE: ~np.isfinite(boxes).all(axis=1),
            NEGATIVE_SIZE: (w < 0) | (h < 0),
            NO_AREA: (w == 0) | (h == 0),
            OUTSIDE: (x >= width) | (y >= height) | (x1 <= 0) | (y1 <= 0),
        }
        sticks_out = np.maximum.reduce([-x, -y, x1 - width, y1 - height]) > _BORDER_TOLERANCE
    first_reason = np.select(list(tests.values()), range(len(tests)), default=-1)
    names = list(tests)
    reasons = {int(i): names[first_reason[i]] for i in np.flatnonzero(first_reason >= 0)}
    clipped = {}
    for i in np.flatnonzero(sticks_out & (first_reason < 0)):
        left, top = max(float(x[i]), 0.0), max(float(y[i]), 0.0)
        right, bottom = min(float(x1[i]), float(width[i])), min(float(y1[i]), float(height[i]))
        clipped[int(i)] = [left, top, right - left, bottom - top]
    return reasons, clipped


def _box_array(annotations: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (A, 4) in float64, and which of them (A,) are no four numbers (their rows are NaN)."""
    count = len(annotations)
    try:
        boxes = np.array([annotation["bbox"] for annotation in annotations])
        if boxes.shape == (count, 4) and boxes.dtype.kind in "iuf":
            return boxes.astype(np.float64), np.zeros(count, dtype=bool)
    except (KeyError, ValueError):  # a missing box, or boxes of several lengths
        pass
    boxes, malformed = np.full((count, 4), np.nan), np.ones(count, dtype=bool)
    for position, annotation in enumerate(annotations):
        box = annotation.get("bbox")
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            malformed[position] = False
            try:
                boxes[position] = box
            except OverflowError:  # an integer of more than 308 digits; stays NaN
                pass
    return boxes, malformed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """The part of a segmentation that can be used, or the reason why there is none."""
    if isinstance(segmentation, dict):
        if not isinstance(segmentation.get("counts"), str | list) or "size" not in segmentation:
            return None, NOT_A_MASK
        if segmentation["size"] != list(size):
            return None, RLE_SIZE
        if rle_problem(segmentation["counts"], size):
            return None, RLE_RUNS
        return segmentation, None
    if not isinstance(segmentation, list):
        return None, NOT_A_MASK
    broken = False
    for polygon in segmentation:
        try:
            # one sum is finite only if every coordinate is; a text or a list raises
            if not isfinite(sum(polygon)):
                return None, NOT_A_MASK
            broken |= len(polygon) < 6 or len(polygon) % 2 == 1
        except (TypeError, OverflowError):
            return None, NOT_A_MASK
    if not broken:
        return segmentation, None
    sound = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    return (sound, None) if sound else (None, BAD_POLYGON)


def _ids(ids: list[Hashable]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{len(ids)} (annotation id {shown}{more})"
