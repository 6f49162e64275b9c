"""Which objects and detections count, and which belong together, under COCO's and LVIS's rules.

Everything that is said of predictions (AP, curves, calibration, error types, confusion, resampling,
re-scoring) is computed from what this module prepares, so that all of it speaks of the same objects
and the same detections. hotcoco matches and accumulates; what it decides otherwise than pycocotools
and lvis 0.5.3 is prepared here, see docs/evaluation.md.

I: images, K: classes, G: objects, D: detections, T: IoU thresholds, A: size ranges.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from hotcoco import mask as mask_api

from d2_balance.data.annotations import Annotations
from d2_balance.data.checks.annotations import NO_MASK
from d2_balance.utils.arrays import positions, unique

from .predictions import Predictions

SIZES = ("all", "small", "medium", "large")
"""Size ranges of COCO and LVIS: areas below 32*32, up to 96*96, and above, in square pixels."""
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Lowest and highest area of each of SIZES."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
_RECALLS_AND_END = np.append(RECALLS, 2.0)
IGNORED, WRONG, RIGHT = -1, 0, 1
"""Status of a detection: it does not count, has no object, or has one."""
_OUTSIDE = -1.0  # an area outside of every size range: the engine ignores such an object


@dataclass(frozen=True)
class APTable:
    """Average precision in [0, 1]; NaN where a class has no ground truth of a size.

    Attributes:
        class_ids: (K,) category ids of the file, ascending.
        values: (T, K, A) float64, sizes in the order of `SIZES`.
        iou_thresholds: (T,) float64, .5 to .95 in steps of .05.
    """

    class_ids: list[int]
    values: np.ndarray
    iou_thresholds: np.ndarray

    def by_class(self, iou: float | None = None, size: str = "all") -> np.ndarray:
        """(K,) AP of each class, at one IoU threshold or as the mean over all of them."""
        values = self.values[:, :, SIZES.index(size)]  # (T, K)
        if iou is not None:
            values = values[np.isclose(self.iou_thresholds, iou)]
        return values.mean(axis=0)


class GroundTruth:
    """Objects of one task, as the rules see them.

    Images stand in the order of their ids, which decides between detections of equal score in
    pycocotools and lvis.

    Args:
        annotations: the file.
        task: "bbox", "segm" or "boundary".
        image_ids: images to evaluate; None: all.

    Attributes:
        with_masks: whether objects are masks: every task but "bbox".
        federated: True for LVIS rules: detections of classes that are neither annotated nor
            verified in their image are dropped, unmatched detections of classes that are not
            annotated exhaustively do not count, objects with `ignore` are neither right nor
            missed, and objects and detections of area 0 are dropped.
        class_ids: (K,) ascending.
        images: (I,) indices in the images of the file.
        image, category: (G,) index in `images` and in the classes.
        box: (G, 4) x, y, width, height.
        area: (G,) as the file says, else of the mask or box.
        crowd: (G,) COCO's crowds; never with LVIS rules.
        counts: (G,) bool, objects that are right or missed: no crowds, none to ignore.
        row: (G,) index in the annotations of the file.
        without_mask: ids of objects that have no segmentation.
        left_out: number of objects that the rules drop by their area.
        unmeasured: keys of image and class that have an object with a bad mask, for masks.
    """

    def __init__(
        self, annotations: Annotations, task: str, image_ids: Collection | None = None
    ) -> None:
        self.annotations, self.task, self.federated = annotations, task, annotations.federated
        self.with_masks = task != "bbox"
        self.class_ids: list[int] = annotations.category_id.tolist()
        ids = annotations.image_id.tolist()
        wanted = None if image_ids is None else set(image_ids)
        chosen = [n for n, i in enumerate(ids) if wanted is None or i in wanted]
        chosen.sort(key=lambda n: (isinstance(ids[n], str), ids[n]))
        self.images = np.array(chosen, dtype=np.int64)
        self.position = np.full(len(ids), -1, dtype=np.int64)
        self.position[self.images] = np.arange(len(chosen))
        kept = annotations.usable & (self.position[annotations.image] >= 0)
        self.without_mask: list = []
        unmeasured = np.zeros(len(annotations.id), dtype=bool)
        if self.with_masks:
            self.without_mask = annotations.id[kept & (annotations.mask == NO_MASK)].tolist()
            kept &= annotations.mask != NO_MASK
            unmeasured = kept & (annotations.mask_problem >= 0)
            kept &= ~unmeasured
        rows = np.flatnonzero(kept)
        area = self._area(rows)
        self.left_out = 0
        if self.federated:
            sound = (area > 0) & (area < np.inf)  # as lvis's get_ann_ids
            empty = unmeasured & (annotations.area == 0)
            unmeasured &= ~empty
            self.left_out = int((~sound).sum() + empty.sum())
            rows, area = rows[sound], area[sound]
        self.row, self.area = rows, area
        self.image = self.position[annotations.image[rows]]
        self.category = annotations.category[rows].astype(np.int64)
        self.box = annotations.box[rows]
        none = np.zeros(len(rows), dtype=bool)
        self.crowd = none if self.federated else annotations.crowd[rows]
        self.counts = ~(annotations.ignore[rows] if self.federated else annotations.crowd[rows])
        labels = self._labels(annotations.negative), self._labels(annotations.not_exhaustive)
        self._verified = unique(labels[0], self.key(self.image, self.category))
        self._partial = labels[1] if self.federated else labels[1][:0]
        self._add_unmeasured(np.flatnonzero(unmeasured))

    def _add_unmeasured(self, rows: np.ndarray) -> None:
        """Let detections of objects count for nothing whose mask is bad: they may well be right.

        With LVIS rules their class is not exhaustive in the image; with COCO rules their box is a
        crowd, and empty detections of the class do not count in the image.
        """
        image = self.position[self.annotations.image[rows]]
        category = self.annotations.category[rows].astype(np.int64)
        self.unmeasured = unique(self.key(image, category))
        if self.federated:
            self._verified = unique(self._verified, self.unmeasured)
            self._partial = unique(self._partial, self.unmeasured)
            return
        box = self.annotations.box[rows]
        self.row = np.append(self.row, rows)
        self.area = np.append(self.area, box[:, 2] * box[:, 3])
        self.image, self.category = np.append(self.image, image), np.append(self.category, category)
        self.box = np.append(self.box, box, axis=0)
        self.crowd = np.append(self.crowd, np.ones(len(rows), dtype=bool))
        self.counts = np.append(self.counts, np.zeros(len(rows), dtype=bool))

    def _area(self, rows: np.ndarray) -> np.ndarray:
        """Areas as the file says, else of the mask or the box."""
        area = self.annotations.area[rows].astype(np.float64)
        for n in np.flatnonzero(~(area >= 0)).tolist():
            if self.with_masks:
                area[n] = float(mask_api.area(self.rle(int(rows[n]))))
            else:
                area[n] = float(np.prod(self.annotations.box[rows[n], 2:]))
        return area

    def _labels(self, labels: Any) -> np.ndarray:
        """Keys of image and class that are listed, ascending."""
        pairs = labels.pairs()
        position = self.position[pairs[:, 0]]
        return unique(self.key(position[position >= 0], pairs[position >= 0, 1]))

    def key(self, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """One integer for each pair of image and class."""
        return image.astype(np.int64) * len(self.class_ids) + category

    @property
    def num_images(self) -> int:
        """I."""
        return len(self.images)

    def instances(self) -> np.ndarray:
        """(K,) objects of each class that count."""
        return np.bincount(self.category[self.counts], minlength=len(self.class_ids))

    def verified(self, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Whether a class is annotated in the image, or verified to be absent."""
        return _is_in(self.key(image, category), self._verified)

    def partial(self, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Whether a class is not annotated exhaustively in the image."""
        return _is_in(self.key(image, category), self._partial)

    def without_rules(self) -> GroundTruth:
        """The objects that count, under no rule: what is left of a case that was decided."""
        plain = copy.copy(self)
        plain.__dict__.pop("rles", None)
        kept = np.flatnonzero(self.counts)
        for name in ("row", "image", "category", "box", "area", "crowd", "counts"):
            setattr(plain, name, getattr(self, name)[kept])
        plain.federated, plain.crowd = False, np.zeros(len(kept), dtype=bool)
        if "rles" in self.__dict__:
            plain.__dict__["rles"] = [self.rles[n] for n in kept.tolist()]
        return plain

    def for_task(self, task: str) -> GroundTruth:
        """The same objects for another task that needs masks; they are decoded once."""
        same = copy.copy(self)
        same.rles = self.rles
        same.task = task
        return same

    def segmentation(self, row: int) -> Any:
        """The mask of an annotation as the file has it."""
        return self.annotations.segmentation(row)

    def rle(self, row: int) -> dict[str, Any]:
        """The mask of an annotation as a compressed RLE."""
        height, width = self.annotations.size[self.annotations.image[row]].tolist()
        if self.annotations.mask_problem[row] >= 0:
            x, y, w, h = self.annotations.box[row].tolist()
            mask: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        else:
            mask = self.segmentation(row)
        if isinstance(mask, dict) and isinstance(mask["counts"], str):
            return mask
        found = mask_api.frPyObjects(mask, height, width)
        return mask_api.merge(found) if isinstance(found, list) else found

    @functools.cached_property
    def rles(self) -> list[dict[str, Any]]:
        """The masks of all objects."""
        return [self.rle(row) for row in self.row.tolist()]


def _is_in(keys: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Whether each key is in an ascending table."""
    if not len(table):
        return np.zeros(len(keys), dtype=bool)
    return table[np.searchsorted(table, keys).clip(max=len(table) - 1)] == keys


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections that can count, in the order of their file.

    Attributes:
        image, category: (D,) index in the images and classes of the ground truth.
        score: (D,) float64.
        box: (D, 4) x, y, width, height; NaN where there is a mask only.
        area: (D,) of the box or the mask, by the task.
        masks: D compressed RLEs, for masks.
        row: (D,) index in the predictions.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    area: np.ndarray
    masks: list[dict[str, Any]] | None
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    def take(self, chosen: np.ndarray) -> Detections:
        """Some of them; `chosen` is an ascending list of indices or a mask."""
        at = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        masks = None if self.masks is None else [self.masks[n] for n in at.tolist()]
        image, category, score, box, area, row = (
            f[at] for f in (self.image, self.category, self.score, self.box, self.area, self.row)
        )
        return Detections(image, category, score, box, area, masks, row)


def select(
    truth: GroundTruth, predictions: Predictions, max_dets: int | None, *, per_class: int = 0
) -> Detections:
    """Return the detections that can count.

    LVIS limits the detections of an image over all classes, and after it drops those of area 0 and
    of classes whose presence is unknown. COCO limits them per image and class.

    Args:
        truth: the ground truth.
        predictions: what the file holds.
        max_dets: detections of an image (LVIS), or of an image and class (COCO); None: all.
        per_class: detections of a class over all images, AP-fixed's limit; 0: all.
    """
    image = truth.position[predictions.image]
    category = positions(np.asarray(truth.class_ids), predictions.category).astype(np.int64)
    rows = np.flatnonzero(image >= 0)
    if max_dets is not None:
        group = image if truth.federated else truth.key(image, category)
        rows = best(group[rows], predictions.score[rows], max_dets, rows)
    if per_class:
        rows = best(category[rows], predictions.score[rows], per_class, rows)
    if truth.federated:
        rows = rows[truth.verified(image[rows], category[rows])]
    masks = None
    if truth.with_masks:
        masks = predictions.masks(rows)
        area = np.asarray(mask_api.area(masks), dtype=np.float64) if masks else np.zeros(0)
    else:
        area = predictions.box[rows, 2] * predictions.box[rows, 3]
    detections = Detections(
        image[rows],
        category[rows],
        predictions.score[rows],
        predictions.box[rows],
        area,
        masks,
        rows,
    )
    if truth.federated:
        return detections.take(area > 0)
    if not len(truth.unmeasured):
        return detections
    unmeasured = _is_in(truth.key(detections.image, detections.category), truth.unmeasured)
    return detections.take((area > 0) | ~unmeasured)


def groups_of(
    truth: GroundTruth, detections: Detections
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield detections, the best first, and objects of each image and class that has both."""
    key = truth.key(detections.image, detections.category)
    rows = np.lexsort((-detections.score, key))
    own = truth.key(truth.image, truth.category)
    objects = np.argsort(own, kind="stable")
    both = np.intersect1d(unique(key), unique(own), assume_unique=True)
    keys = key[rows], own[objects]
    starts = [np.searchsorted(k, both).tolist() for k in keys]
    ends = [np.searchsorted(k, both, side="right").tolist() for k in keys]
    for a, b, c, d in zip(starts[0], ends[0], starts[1], ends[1], strict=True):
        yield rows[a:b], objects[c:d]


def best(
    group: np.ndarray, score: np.ndarray, limit: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """Return the `limit` best of each group, ascending; of equal scores the first stay.

    Args:
        group: (n,) to which each belongs.
        score: (n,).
        limit: how many.
        rows: (n,) what to return of each; None: its position.
    """
    rows = np.arange(len(group)) if rows is None else rows
    if not len(group) or np.unique(group, return_counts=True)[1].max() <= limit:
        return rows
    order = np.lexsort((-score, group))
    sorted_group = group[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_group, sorted_group)
    return np.sort(rows[order[rank < limit]])


class Matcher:
    """Detections matched to objects by hotcoco.

    Args:
        truth: the ground truth.
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
        area = np.where(truth.counts | truth.crowd, truth.area, _OUTSIDE)
        self._truth = _dataset(truth, area, truth.crowd)
        self._evaluator = self._run(self._truth, detections)

    def _run(self, dataset: Any, detections: Detections) -> Any:
        evaluator = hotcoco.COCOeval(
            dataset,
            _results(dataset, self.truth, detections),
            self.truth.task,
            lvis_style=self.truth.federated,
        )
        evaluator.params.iou_thrs = list(self.iou_thresholds)
        evaluator.params.max_dets = [max(len(detections), 1)]  # `select` has cut already
        evaluator.evaluate()
        return evaluator

    @functools.cached_property
    def accumulated(self) -> dict[str, np.ndarray]:
        """`precision` and `scores` (T, 101, K, A), -1 without ground truth."""
        self._evaluator.accumulate()
        found = self._evaluator.eval
        return {key: np.asarray(found[key])[..., 0] for key in ("precision", "scores")}

    def table(self) -> APTable:
        """AP of each class, threshold and size."""
        precision = self.accumulated["precision"]
        # rounded, because pycocotools' precision of a perfect result is 1 - 2e-16
        values = np.where(precision.min(axis=1) < 0, np.nan, precision.mean(axis=1).round(12))
        return APTable(self.truth.class_ids, values, self.iou_thresholds)

    def matches(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Status and object of each detection at one IoU threshold, all sizes.

        Returns:
            (D,) int8 RIGHT, WRONG or IGNORED, and (D,) int64 index of the object, -1 without.
        """
        found = self._evaluator.image_diagnostics(iou_thr=iou)
        status = np.full(len(self.detections), IGNORED, dtype=np.int8)
        known = found["dt_status"]
        at = np.fromiter(known.keys(), np.int64, len(known)) - 1
        status[at] = np.fromiter((s == "tp" for s in known.values()), np.int8, len(known))
        match = np.full(len(self.detections), -1, dtype=np.int64)
        pairs = found["dt_match"]
        at = np.fromiter(pairs.keys(), np.int64, len(pairs)) - 1
        match[at] = np.fromiter(pairs.values(), np.int64, len(pairs)) - 1
        match[status != RIGHT] = -1
        return status, match

    def tide_errors(self, bg_thr: float) -> dict[str, Any]:
        """TIDE's errors at the first IoU threshold, as hotcoco gives them."""
        return self._evaluator.tide_errors(pos_thr=float(self.iou_thresholds[0]), bg_thr=bg_thr)


def _dataset(truth: GroundTruth, area: np.ndarray, crowd: np.ndarray) -> Any:
    """The ground truth as hotcoco takes it: fields that evaluation needs, and nothing else."""
    count = len(truth.class_ids)
    # The engine asks for `frequency` in LVIS style; groups are formed outside of it.
    categories = [{"id": k + 1, "name": str(k), "frequency": "f"} for k in range(count)]
    sizes = truth.annotations.size[truth.images].tolist()
    images = [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(sizes, start=1)]
    if truth.federated:
        _add_labels(images, truth._verified, count, "neg_category_ids")
        _add_labels(images, truth._partial, count, "not_exhaustive_category_ids")
    return hotcoco.COCO.from_arrays(
        images,
        categories,
        truth.image + 1,
        truth.category + 1,
        np.ascontiguousarray(truth.box),
        area=area,
        iscrowd=crowd,
        segmentation=[*truth.rles] if truth.task == "segm" else None,
    )


def _add_labels(images: list[dict[str, Any]], keys: np.ndarray, count: int, field: str) -> None:
    for image in images:
        image[field] = []
    for image, category in zip((keys // count).tolist(), (keys % count).tolist(), strict=True):
        images[image][field].append(category + 1)


def _results(dataset: Any, truth: GroundTruth, detections: Detections) -> Any:
    if not len(detections):
        return dataset.load_res([])
    columns = (detections.image + 1, detections.box, detections.score, detections.category + 1)
    table = np.column_stack(columns).astype(np.float64)
    if truth.task == "bbox":
        return dataset.load_res(table)
    table[:, 1:5] = np.nan_to_num(table[:, 1:5])
    results = dataset.load_res(table, segmentation=detections.masks)
    results.update_anns(ids=np.arange(1, len(detections) + 1), area=detections.area)
    return results


class Ranked:
    """Detections in the order of their scores, with their status at every IoU threshold.

    AP of all sizes is computed from it as often as one likes, without matching again: of some
    detections (re-scoring), or of images with weights (resampling). Matches stay as they are,
    because what is taken away is the tail of an image and class, or everything of an image.

    Args:
        matcher: the matches of every detection that may count.

    Attributes:
        order: (D,) indices in the detections of `matcher`, by class, falling score and image.
        image: (D,) of the ordered detections.
        category: (D,) of the ordered detections.
        status: (T, D) RIGHT, WRONG or IGNORED.
        objects: (K,) objects that count.
    """

    def __init__(self, matcher: Matcher) -> None:
        detections, truth = matcher.detections, matcher.truth
        keys = (detections.row, detections.image, -detections.score, detections.category)
        self.order = np.lexsort(keys)
        self._score = detections.score[self.order]
        self.image, self.category = detections.image[self.order], detections.category[self.order]
        self.objects = truth.instances()
        self.iou_thresholds, self.class_ids = matcher.iou_thresholds, truth.class_ids
        self.status = np.stack(
            [matcher.matches(float(iou))[0][self.order] for iou in matcher.iou_thresholds]
        )

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """Of each IoU threshold."""
        return [Curve(status, self.category) for status in self.status]

    def average_precision(
        self, weights: np.ndarray | None = None, objects: np.ndarray | None = None
    ) -> np.ndarray:
        """AP of each class at each IoU threshold.

        Args:
            weights: (D,) int32, how often each ordered detection counts; None: once.
            objects: (K,) how many objects there are then; None: as many as there are.

        Returns:
            (T, K) in [0, 1], NaN without objects.
        """
        if weights is None:
            weights = np.ones(len(self.order), np.int32)
        total, objects = running(weights), self.objects if objects is None else objects
        return np.stack([c.average_precision(weights, total, objects) for c in self.curves])

    def pooled(self, member: np.ndarray) -> np.ndarray:
        """AP of one list over several classes, at each IoU threshold (AP-pool).

        Equal scores stand in the order of the images, and of the classes in an image.

        Args:
            member: (K,) bool, classes of the pool.

        Returns:
            (T,) in [0, 1], NaN without objects.
        """
        at = np.flatnonzero(member[self.category])
        # a class stands in the order of its scores already
        at = at[np.lexsort((self.category[at], self.image[at], -self._score[at]))]
        objects = self.objects[member].sum(keepdims=True)
        return average_precision(self.status[:, at], np.zeros_like(at), objects)[:, 0]


def average_precision(
    statuses: np.ndarray, category: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """AP of each class at each IoU threshold.

    Args:
        statuses: (T, D) RIGHT, WRONG or IGNORED, in the order of class and falling score.
        category: (D,) ascending.
        objects: (K,) objects that count.

    Returns:
        (T, K) in [0, 1], NaN without objects.
    """
    weights = np.ones(len(category), np.int32)
    total = running(weights)
    curves = (Curve(status, category) for status in statuses)
    return np.stack([curve.average_precision(weights, total, objects) for curve in curves])


class Curve:
    """Right and ignored detections at one IoU threshold: precision over recall of every class.

    n: right detections.

    Args:
        status: (D,) RIGHT, WRONG or IGNORED, in the order of class and falling score.
        category: (D,) ascending.
    """

    def __init__(self, status: np.ndarray, category: np.ndarray) -> None:
        self._right, self._ignored = (np.flatnonzero(status == s) for s in (RIGHT, IGNORED))
        self._end = self._right + 1
        self._category = category[self._right]
        self._begin = np.searchsorted(category, self._category)  # of the class
        self._first = np.searchsorted(self._category, self._category)
        self._ignored_end = np.searchsorted(self._ignored, self._right)
        self._ignored_begin = np.searchsorted(self._ignored, self._begin)
        last = self._category[-1] if len(self._category) else 0
        self._level = 2.0 * (last - self._category)  # parts the classes in one running maximum

    def average_precision(
        self, weights: np.ndarray, total: np.ndarray, objects: np.ndarray
    ) -> np.ndarray:
        """AP as the mean over 101 recalls of the largest precision at that recall or beyond.

        Args:
            weights: (D,) int32, how often each detection counts.
            total: (D + 1,) their running sums.
            objects: (K,) number of objects, as often as they count.

        Returns:
            (K,) in [0, 1], NaN without objects.
        """
        values = np.where(objects > 0, 0.0, np.nan)
        if not len(self._right):
            return values
        hits = running(weights.take(self._right))
        found = hits[1:] - hits.take(self._first)  # (n,)
        counted = total.take(self._end) - total.take(self._begin)
        if len(self._ignored):
            lost = running(weights.take(self._ignored))
            counted -= lost.take(self._ignored_end) - lost.take(self._ignored_begin)
        np.maximum(counted, 1, out=counted)  # the weights before it may all be 0
        precision = found / counted + self._level
        largest = np.maximum.accumulate(precision[::-1])[::-1]
        # the sum over recalls is one over the steps of this curve, and these are few
        steps = np.append(np.flatnonzero(largest[:-1] > largest[1:]), len(largest) - 1)
        category = self._category[steps]
        height = largest[steps] - self._level[steps]
        same = category[:-1] == category[1:]
        height[:-1] -= np.where(same, height[1:], 0.0)
        reached = _recalls_reached(found[steps] / np.maximum(objects[category], 1e-300))
        sums = np.bincount(category, height * reached, len(objects))
        return np.where(objects > 0, sums / len(RECALLS), np.nan)


def running(values: np.ndarray) -> np.ndarray:
    """(n + 1,) running sums of (n,) integers, from 0."""
    sums = np.zeros(len(values) + 1, np.int32)
    np.cumsum(values, out=sums[1:])
    return sums


def _recalls_reached(recall: np.ndarray) -> np.ndarray:
    """How many of RECALLS are at most each recall: a quick `searchsorted(side="right")`."""
    at = (recall * 100).astype(np.int32)  # one off at most
    at += _RECALLS_AND_END.take(at + 1) <= recall
    at -= RECALLS.take(at) > recall
    return at + 1
