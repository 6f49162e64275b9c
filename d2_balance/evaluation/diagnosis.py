"""What an AP hides: curves, calibration, confusion of classes, and the types of errors.

All of it is made from the matches of the AP (see `matching`), at IoU 0.5: of the same objects, and
of the detections that are right or wrong in it. Detections that do not count (on crowds, on ignored
objects, unmatched ones of classes that are not annotated exhaustively) appear nowhere.

    ECE = sum_b n_b / n |accuracy_b - confidence_b|        over ten bins b of confidence
    MCE = max_b |accuracy_b - confidence_b|

A bin holds the scores above its lower end and up to its upper end, as in the paper; a score of 0 is
in the first.

Sources: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599 (ECE, MCE); Bolya et
al., TIDE, arXiv:2008.08115 (error types).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from hotcoco import primitives

from d2_balance.data.groups import GROUPS

from .matching import IGNORED, RECALLS, RIGHT, WRONG, GroundTruth, Matcher
from .record import Evaluation

IOU = 0.5
ERRORS = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
"""TIDE's names, and what is wrong: right place but another class; right class but IoU 0.1 to 0.5;
both; a second detection of an object; IoU below 0.1 with every object; an object without any."""


@dataclass
class Curve:
    """Precision over recall at IoU 0.5, the mean over the classes of a group.

    Attributes:
        recall: (101,) 0 to 1.
        precision: (101,) interpolated, 0 beyond the largest recall of a class.
        marks: score threshold to the point of this curve at the mean recall of the detections
            above it; no entry where it cuts off everything.
    """

    recall: list[float]
    precision: list[float]
    marks: dict[float, tuple[float, float]]


@dataclass
class Calibration:
    """Confidence against the fraction of right detections.

    Attributes:
        ece: expected calibration error in [0, 1].
        mce: largest calibration error of a bin.
        detections: how many were counted.
        bins: (10,) dicts with lower, upper, confidence, accuracy (means) and count.
    """

    ece: float
    mce: float
    detections: int
    bins: list[dict[str, float]]


@dataclass
class Diagnosis:
    """Figures of one prediction file, see the module.

    Attributes:
        task: "bbox" or "segm".
        curves: "all" and the groups that have ground truth, to a Curve.
        calibration: the same, for groups that have detections.
        errors: error name to {"count": int, "AP50 lost": float}, AP in percent.
        classes: names of the rows and columns of `confusion`, without background.
        confusion: (K + 1, K + 1) counts; row: the object's class, column: the detection's; the last
            row are detections without object, the last column objects without detection.
        min_score: detections below it are not in `confusion`.
        objects: "right", "taken by an error" (by a detection of another class, or badly placed) and
            "missed"; together the objects of the AP.
        best_thresholds: class name to the score of the largest F1, with precision, recall and F1
            there; classes without a right detection have none.
        notes: what could not be said, and why.
    """

    task: str
    curves: dict[str, Curve]
    calibration: dict[str, Calibration]
    errors: dict[str, dict[str, float]]
    classes: list[str]
    confusion: np.ndarray
    min_score: float
    objects: dict[str, int] = field(default_factory=dict)
    best_thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def most_confused(self, count: int = 20) -> list[tuple[str, str, int, float]]:
        """Object's class, detected class, how often, and as a fraction of the class."""
        matrix = self.confusion[:-1, :-1].astype(np.int64)
        objects = self.confusion[:-1].sum(axis=1)
        wrong = matrix - np.diag(np.diag(matrix))
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = np.stack(np.unravel_index(order, wrong.shape), axis=1)
        return [
            (self.classes[i], self.classes[j], int(wrong[i, j]), wrong[i, j] / objects[i])
            for i, j in pairs
            if wrong[i, j]
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything but the matrix, which becomes the list of its largest mistakes."""
        result: dict[str, Any] = {
            "task": self.task,
            "curves": {k: asdict(v) for k, v in self.curves.items()},
            "calibration": {k: asdict(v) for k, v in self.calibration.items()},
            "errors": self.errors,
            "objects": self.objects,
            "best_thresholds": self.best_thresholds,
            "notes": self.notes,
        }
        fields = ("object", "detected", "count", "share")
        result["most_confused"] = [
            dict(zip(fields, row, strict=True)) for row in self.most_confused(100)
        ]
        return result


def diagnose(
    matcher: Matcher,
    evaluation: Evaluation,
    thresholds: Sequence[float] = (0.05, 0.3, 0.5),
    min_score: float = 0.3,
) -> Diagnosis:
    """Diagnose predictions that `measure` has evaluated.

    Args:
        matcher: the matches of one task.
        evaluation: its figures, whose groups are taken.
        thresholds: scores in [0, 1] to mark on the curves.
        min_score: detections below it do not count as confusions; in [0, 1].

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    for value in (*thresholds, min_score):
        if not 0 <= value <= 1:
            raise ValueError(f"score thresholds must be in [0, 1], not {value}")
    truth, detections = matcher.truth, matcher.detections
    names = list(evaluation.classes)
    groups = [r["group"] for r in evaluation.classes.values()]
    members = {"all": np.ones(len(names), dtype=bool)}
    for letter, name in GROUPS.items():
        own = np.array([group == letter for group in groups], dtype=bool)
        if own.any() and not own.all():
            members[name] = own
    status, match = matcher.matches(IOU)
    notes = []
    wrong = np.flatnonzero((detections.score < 0) | (detections.score > 1))
    if len(wrong):
        notes.append(
            f"no calibration: the score of detection {detections.row[wrong[0]]} is "
            f"{detections.score[wrong[0]]:g}, and scores must be in [0, 1] for it; score "
            "thresholds say little here"
        )
    curves, calibration = {}, {}
    for name, own in members.items():
        if curve := _curve(matcher, own, thresholds):
            curves[name] = curve
        counted = (status != IGNORED) & own[detections.category]
        if counted.any() and not len(wrong):
            calibration[name] = _calibrate(detections.score[counted], status[counted] == RIGHT)
    errors, objects = _errors(truth, matcher, status)
    return Diagnosis(
        truth.task,
        curves,
        calibration,
        errors,
        names,
        _confusion(matcher, status, match, min_score),
        min_score,
        objects,
        _best_thresholds(matcher, status, names),
        notes,
    )


def _curve(matcher: Matcher, own: np.ndarray, thresholds: Sequence[float]) -> Curve | None:
    """The mean curve over classes with ground truth; None where no class has any."""
    at = int(np.argmin(np.abs(matcher.iou_thresholds - IOU)))
    precision = matcher.accumulated["precision"][at][:, own, 0]  # (101, K), -1: no ground truth
    scores = matcher.accumulated["scores"][at][:, own, 0]
    known = precision.max(axis=0) >= 0
    if not known.any():
        return None
    precision, scores = precision[:, known], scores[:, known]
    mean = precision.mean(axis=1)
    marks = {}
    for threshold in thresholds:
        above = ((scores >= threshold) & (precision > 0)).sum(axis=0)  # (K,) points reached
        reached = float(np.where(above > 0, RECALLS[(above - 1).clip(min=0)], 0.0).mean())
        if above.any():
            marks[float(threshold)] = (reached, float(np.interp(reached, RECALLS, mean)))
    return Curve(RECALLS.tolist(), mean.tolist(), marks)


def _calibrate(score: np.ndarray, right: np.ndarray, bins: int = 10) -> Calibration:
    edges = np.linspace(0, 1, bins + 1)
    place = (np.searchsorted(edges, score, side="left") - 1).clip(min=0)
    count = np.bincount(place, minlength=bins)
    divisor = count.clip(min=1)
    confidence = np.bincount(place, score, bins) / divisor
    accuracy = np.bincount(place, right, bins) / divisor
    gap = np.abs(accuracy - confidence)
    columns = (edges[:-1], edges[1:], confidence, accuracy, count)
    keys = ("lower", "upper", "confidence", "accuracy", "count")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return Calibration(
        float((gap * count).sum() / len(score)),
        float(gap.max()),
        len(score),
        [dict(zip(keys, row, strict=True)) for row in rows],
    )


def _errors(
    truth: GroundTruth, matcher: Matcher, status: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """TIDE's errors of the detections that count, and what became of the objects.

    What does not count is taken out before, so that no rule is left for the engine to apply.
    """
    detections = matcher.detections.take(status != IGNORED)
    plain = truth.without_rules()
    found = Matcher(plain, detections, np.array([IOU])).tide_errors(bg_thr=0.1)
    errors = {
        name: {"count": found["counts"][key], "AP50 lost": 100 * found["delta_ap"][key]}
        for key, name in ERRORS.items()
    }
    total, right = len(plain.row), int((status == RIGHT).sum())
    missed = found["counts"]["Miss"]
    return errors, {"right": right, "taken by an error": total - right - missed, "missed": missed}


def _confusion(
    matcher: Matcher, status: np.ndarray, match: np.ndarray, min_score: float
) -> np.ndarray:
    """(K + 1, K + 1) counts.

    What is right in the AP is right here; detections that are left take objects that are left, of
    any class, the best score first.
    """
    truth, detections = matcher.truth, matcher.detections
    classes = len(truth.class_ids)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    strong = detections.score >= min_score
    right = strong & (status == RIGHT)
    taken = np.zeros(len(truth.row), dtype=bool)
    taken[match[right]] = True
    np.add.at(matrix, (truth.category[match[right]], detections.category[right]), 1)
    free = np.flatnonzero(strong & (status == WRONG))
    free = free[np.lexsort((-detections.score[free], detections.image[free]))]
    objects = np.flatnonzero(truth.counts & ~taken)
    objects = objects[np.argsort(truth.image[objects], kind="stable")]
    first = np.searchsorted(truth.image[objects], np.arange(truth.num_images + 1))
    begin = np.searchsorted(detections.image[free], np.arange(truth.num_images + 1))
    used = np.zeros(len(free), dtype=bool)
    for image in np.flatnonzero((np.diff(first) > 0) & (np.diff(begin) > 0)).tolist():
        own = objects[first[image] : first[image + 1]]
        places = np.arange(begin[image], begin[image + 1])
        iou = _overlaps(matcher, free[places], own)
        for place, row in zip(places.tolist(), iou, strict=True):
            best = int(row.argmax())
            if row[best] >= IOU:
                iou[:, best] = -1
                used[place] = taken[own[best]] = True
                matrix[truth.category[own[best]], detections.category[free[place]]] += 1
    missed = truth.category[truth.counts & ~taken]
    matrix[:classes, -1] += np.bincount(missed, minlength=classes)
    alone = detections.category[free[~used]]
    matrix[-1, :classes] += np.bincount(alone, minlength=classes)
    return matrix


def _overlaps(matcher: Matcher, chosen: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """IoU of some detections and objects of one image."""
    truth, detections = matcher.truth, matcher.detections
    crowd = [False] * len(objects)
    if detections.masks is not None:
        masks = [detections.masks[n] for n in chosen.tolist()]
        return primitives.mask_iou(masks, [truth.rles[n] for n in objects.tolist()], crowd)
    return primitives.bbox_iou(detections.box[chosen], truth.box[objects], crowd)


def _best_thresholds(
    matcher: Matcher, status: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The score of the largest F1 of each class; of equal ones the highest."""
    detections, objects = matcher.detections, matcher.truth.instances()
    counted = np.flatnonzero(status != IGNORED)
    order = counted[np.lexsort((-detections.score[counted], detections.category[counted]))]
    starts = np.searchsorted(detections.category[order], np.arange(len(names) + 1))
    found = {}
    for k, name in enumerate(names):
        own = order[starts[k] : starts[k + 1]]
        right = np.cumsum(status[own] == RIGHT)
        if not objects[k] or not len(own) or not right[-1]:
            continue
        score = detections.score[own]
        last = np.append(score[1:] < score[:-1], True)  # of equal scores a threshold takes all
        precision = (right / np.arange(1, len(own) + 1))[last]
        recall = (right / objects[k])[last]
        f1 = 2 * precision * recall / (precision + recall).clip(min=1e-12)
        at = int(f1.argmax())
        values = score[last][at], precision[at], recall[at], f1[at]
        keys = ("score", "precision", "recall", "F1")
        found[name] = dict(zip(keys, map(float, values), strict=True))
    return found
