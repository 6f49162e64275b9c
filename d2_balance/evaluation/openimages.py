"""AP50 of the Open Images challenge: boxes of groups, and a hierarchy of classes.

In each image only the classes count that are annotated or verified to be absent there. A detection
belongs to the box of the highest IoU with it, if that is at least 0.5 and the box has no better
detection; one that has no box so, but has half of its area or more inside a box of a group, belongs
to the group. The best detection of a group is right and the others of it vanish; a group without
detection is missed, as any other box.

    AP  =  1 / n  sum over right detections of the largest precision there or at lower scores

which is the area below the precision of Pascal VOC 2010; n counts groups as one each. The result is
the mean over the classes with a box.

A box counts for the classes above its own, too. Annotations have them already (see
datasets/prepare_openimages.py); detections get them from a hierarchy, unless the file of the
detections has them.

Source: the challenge's page, storage.googleapis.com/openimages/web/evaluation.html. It says "IoU
above 0.5"; the evaluation of the TensorFlow models takes 0.5 as well, and so does this.

K: classes, D: detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hotcoco import primitives

from d2_balance.data.annotations import Annotations
from d2_balance.utils.files import read_json

from .matching import RIGHT, WRONG, Detections, GroundTruth, groups_of
from .predictions import Predictions

IOU = 0.5
_VANISHED = -1


def classes_above(path: str, truth: Annotations) -> dict[int, list[int]]:
    """Classes above each class.

    Args:
        path: hierarchy of labels, such as bbox_labels_600_hierarchy.json.
        truth: its categories have their `label`, as prepare_openimages.py writes them.

    Returns:
        Index of a class to those of the classes above it; classes at the top are left out.

    Raises:
        ValueError: a file that is no hierarchy, or holds none of the labels.
    """
    from d2_balance.data.catalog.label_hierarchy import LabelHierarchy  # loads Detectron2

    hierarchy = LabelHierarchy(read_json(path), path)
    place = {c["label"]: k for k, c in enumerate(truth.categories) if "label" in c}
    if not place.keys() & hierarchy.labels:
        raise ValueError(
            f"{path} has none of the labels of {truth.name}; its categories need a 'label' such as "
            "/m/01g317, which datasets/prepare_openimages.py writes"
        )
    above = {}
    for label, k in place.items():
        found = [place[up] for up in hierarchy.ancestors(label) if up in place and up != label]
        if found:
            above[k] = sorted(found)
    return above


def openimages_ap(
    truth: GroundTruth,
    predictions: Predictions,
    above: Mapping[int, Sequence[int]] | None = None,
) -> np.ndarray:
    """AP50 of each class in [0, 1].

    Args:
        truth: the boxes; those that do not count in AP (`iscrowd`, `ignore`) are groups.
        predictions: the detections; all of them count.
        above: what `classes_above` returns, to give detections the classes above; None: they have
            them, or there is no hierarchy.

    Returns:
        (K,) NaN without boxes.
    """
    detections = _detections(truth, predictions, above or {})
    status = np.full(len(detections), WRONG, dtype=np.int8)
    for rows, objects in groups_of(truth, detections):
        group = ~truth.counts[objects]
        _match(detections.box[rows], truth.box[objects[~group]], status, rows)
        _match_groups(detections.box[rows], truth.box[objects[group]], status, rows)
    kept = np.flatnonzero(status != _VANISHED)
    order = kept[
        np.lexsort((detections.image[kept], -detections.score[kept], detections.category[kept]))
    ]
    boxes = np.bincount(truth.category, minlength=len(truth.class_ids))
    values = np.full(len(boxes), np.nan)
    starts = np.searchsorted(detections.category[order], np.arange(len(boxes) + 1))
    for k in np.flatnonzero(boxes).tolist():
        right = status[order[starts[k] : starts[k + 1]]] == RIGHT
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        largest = np.maximum.accumulate(precision[::-1])[::-1]
        values[k] = largest[right].sum() / boxes[k]
    return values


def _detections(
    truth: GroundTruth, predictions: Predictions, above: Mapping[int, Sequence[int]]
) -> Detections:
    """Detections of classes that count in their image, with those of the classes above."""
    image = truth.position[predictions.image]
    own = np.searchsorted(truth.class_ids, predictions.category)
    rows = np.arange(len(own))
    parts = [(rows, own)]
    for k, classes in above.items():
        of_class = rows[own == k]
        parts += [(of_class, np.full(len(of_class), up)) for up in classes]
    rows = np.concatenate([r for r, _ in parts])
    category = np.concatenate([c for _, c in parts])
    usable = (image[rows] >= 0) & (predictions.box[rows, 2:] > 0).all(axis=1)
    if truth.federated:
        usable &= truth.verified(image[rows], category)
    rows, category = rows[usable], category[usable]
    box = predictions.box[rows]
    area = box[:, 2] * box[:, 3]
    return Detections(image[rows], category, predictions.score[rows], box, area, None, rows)


def _match(found: np.ndarray, boxes: np.ndarray, status: np.ndarray, rows: np.ndarray) -> None:
    """Mark the best detection of each box; `found` has the best first."""
    if not len(boxes):
        return
    ious = primitives.bbox_iou(found, boxes, [False] * len(boxes))
    best = ious.argmax(axis=1)
    close = np.flatnonzero(ious.max(axis=1) >= IOU)
    status[rows[close[np.unique(best[close], return_index=True)[1]]]] = RIGHT


def _match_groups(
    found: np.ndarray, boxes: np.ndarray, status: np.ndarray, rows: np.ndarray
) -> None:
    """Mark the best detection inside of each group, and take the others out."""
    left = np.flatnonzero(status[rows] == WRONG)
    if not len(boxes) or not len(left):
        return
    inside = primitives.bbox_iou(found[left], boxes, [True] * len(boxes))  # over own area
    own = np.flatnonzero(inside.max(axis=1) >= IOU)
    status[rows[left[own]]] = _VANISHED
    first = np.unique(inside.argmax(axis=1)[own], return_index=True)[1]
    status[rows[left[own[first]]]] = RIGHT
