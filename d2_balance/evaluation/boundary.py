"""Boundary AP: masks are compared by their rims as well as by their areas.

    d       =  max(1, round(.02 sqrt(H^2 + W^2)))                of the image
    rim(m)  =  m without its erosion by a (2d+1) x (2d+1) square; outside of the image is empty
    IoU     =  min(IoU of the masks, IoU of their rims)

Areas of small, medium and large objects are those of the masks. A crowd of COCO's rules is compared
by the mask alone. Matching is the same as in AP: the best detection first, each takes the free
object of the highest IoU at or above the threshold, and one that does not count only if no other
is left.

Sources: Cheng et al., Boundary IoU, arXiv:2103.16562; the evaluation of the LVIS challenge of 2021
is boundary AP of the best 10,000 detections of each class.

A: size ranges, T: IoU thresholds, G: objects and D: detections of an image and class.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hotcoco import mask as mask_api
from hotcoco import primitives

from .matching import (
    AREAS,
    IGNORED,
    IOU_THRESHOLDS,
    RIGHT,
    WRONG,
    APTable,
    Detections,
    GroundTruth,
    Matcher,
    average_precision,
    groups_of,
)

DILATION = 0.02  # of the image's diagonal
_ALMOST_ONE = 1 - 1e-10  # as pycocotools: a threshold of 1 is reached in spite of rounding


def match(truth: GroundTruth, detections: Detections) -> Matcher:
    """Match detections by the task of the ground truth."""
    if truth.task == "boundary":
        return BoundaryMatcher(truth, detections)
    return Matcher(truth, detections)


def rim_width(height: int, width: int, ratio: float = DILATION) -> int:
    """d, in pixels, for the size of an image."""
    return max(1, round(ratio * math.sqrt(height**2 + width**2)))


def rim(mask: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the rim of a mask.

    Args:
        mask: compressed RLE.
        width: d in pixels, at least 1.
    """
    x, y, w, h = map(int, mask_api.to_bbox(mask).tolist())
    if min(w, h) <= 2 * width:
        return mask  # nothing is left of it
    pixels = mask_api.decode(mask)
    inside = pixels[y : y + h, x : x + w].astype(np.int32)
    for axis in (0, 1):
        # sums over windows of 2d+1: pixels whose window is full stay
        padding = [(width + 1, width) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.cumsum(np.pad(inside, padding), axis)
        size = inside.shape[axis]
        first, last = (np.take(sums, np.arange(size) + n, axis) for n in (0, 2 * width + 1))
        inside = (last - first == 2 * width + 1).astype(np.int32)
    pixels[y : y + h, x : x + w] -= inside.astype(pixels.dtype)
    return mask_api.encode(np.asfortranarray(pixels))


class BoundaryMatcher(Matcher):
    """Detections matched to objects by boundary IoU; without curves and types of errors.

    Args:
        truth: the ground truth of the task "boundary".
        detections: what `select` returns.
        iou_thresholds: (T,) IoU a detection must have with its object.
    """

    def __init__(
        self,
        truth: GroundTruth,
        detections: Detections,
        iou_thresholds: np.ndarray = IOU_THRESHOLDS,
    ) -> None:
        self.truth, self.detections, self.iou_thresholds = truth, detections, iou_thresholds
        shape = len(AREAS), len(iou_thresholds), len(detections)
        self._object = np.full(shape[1:], -1, dtype=np.int64)  # of all sizes
        # unmatched: wrong if of the size and of a class that is annotated exhaustively
        low, high = np.array(AREAS).T[:, :, None, None]
        outside = (detections.area < low) | (detections.area > high)  # (A, 1, D)
        outside |= truth.partial(detections.image, detections.category)
        self._status = np.where(np.broadcast_to(outside, shape), IGNORED, WRONG).astype(np.int8)
        ignored = ~truth.counts | (truth.area < low) | (truth.area > high)  # (A, 1, G)
        for rows, objects in groups_of(truth, detections):
            self._match(rows, objects, ignored[:, :, objects])

    def _ious(self, rows: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """(D, G) boundary IoU; what cannot match keeps the IoU of its masks."""
        truth, masks = self.truth, self.detections.masks
        assert masks is not None
        found = [masks[n] for n in rows.tolist()]
        true = [truth.rles[n] for n in objects.tolist()]
        crowd = truth.crowd[objects]
        ious = primitives.mask_iou(found, true, crowd)
        able = (ious >= self.iou_thresholds.min()) & ~crowd
        d, g = np.flatnonzero(able.any(axis=1)), np.flatnonzero(able.any(axis=0))
        if len(d):
            width = rim_width(*map(int, found[0]["size"]))
            own, others = [rim(found[n], width) for n in d], [rim(true[n], width) for n in g]
            at = np.ix_(d, g)
            close = primitives.mask_iou(own, others, [False] * len(g))
            ious[at] = np.where(crowd[g], ious[at], np.minimum(ious[at], close))
        return ious

    def _match(self, rows: np.ndarray, objects: np.ndarray, ignored: np.ndarray) -> None:
        """Match the detections of an image and class; `ignored` is (A, 1, G)."""
        thresholds = np.minimum(self.iou_thresholds, _ALMOST_ONE)
        ious = self._ious(rows, objects)
        crowd = self.truth.crowd[objects]
        free = np.ones((len(AREAS), len(thresholds), len(objects)), dtype=bool)
        levels = np.indices(free.shape[:2])
        for row in np.flatnonzero(ious.max(axis=1) >= thresholds.min()).tolist():
            fits = free & (ious[row] >= thresholds[:, None])
            # an object that counts comes first, then the IoU; of equal ones the last
            rank = np.where(fits, ious[row] + 2.0 * ~ignored, -1.0)[..., ::-1]
            best = rank.shape[2] - 1 - rank.argmax(axis=2)  # (A, T)
            hit = rank.max(axis=2) >= 0
            wasted = np.broadcast_to(ignored, free.shape)[(*levels, best)]
            status = self._status[:, :, rows[row]]
            status[hit] = np.where(wasted, IGNORED, RIGHT)[hit]
            self._object[hit[0], rows[row]] = objects[best[0]][hit[0]]
            taken = hit & ~crowd[best]
            free[levels[0][taken], levels[1][taken], best[taken]] = False

    def table(self) -> APTable:
        detections, truth = self.detections, self.truth
        order = np.lexsort(
            (detections.row, detections.image, -detections.score, detections.category)
        )
        values = []
        for (low, high), statuses in zip(AREAS, self._status, strict=True):
            counted = truth.category[truth.counts & (truth.area >= low) & (truth.area <= high)]
            objects = np.bincount(counted, minlength=len(truth.class_ids))
            values.append(
                average_precision(statuses[:, order], detections.category[order], objects)
            )
        return APTable(truth.class_ids, np.stack(values, axis=2), self.iou_thresholds)

    def matches(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        at = int(np.argmin(np.abs(self.iou_thresholds - iou)))
        status = self._status[0, at]
        return status, np.where(status == RIGHT, self._object[at], -1)
