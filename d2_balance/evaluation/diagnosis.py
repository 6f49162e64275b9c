"""What an AP hides: curves, calibration, confusion of classes, and the kinds of errors.

Counted by hotcoco, under the same rules as the AP: with LVIS rules detections of classes that are
neither annotated nor verified in their image do not count, nor unmatched ones of classes that are
not marked completely. A detection is right at IoU 0.5.

    ECE = sum_b n_b / n |accuracy_b - confidence_b|        over ten bins b of confidence

Sources: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599 (ECE); Bolya et al.,
TIDE, arXiv:2008.08115 (error types).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hotcoco
import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.groups import GROUPS
from d2_balance.utils.progress import progress

from .average_precision import GroundTruth
from .predictions import Detections
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
    """Confidence against the share of right detections.

    Attributes:
        ece: expected calibration error in [0, 1].
        detections: how many were counted.
        bins: (10,) dicts with lower, upper, confidence, accuracy (means) and count.
    """

    ece: float
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
    """

    task: str
    curves: dict[str, Curve]
    calibration: dict[str, Calibration]
    errors: dict[str, dict[str, float]]
    classes: list[str]
    confusion: np.ndarray
    min_score: float

    def most_confused(self, count: int = 20) -> list[tuple[str, str, int, float]]:
        """Object's class, detected class, how often, and its share of the objects of the class."""
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
        result = {
            "task": self.task,
            "curves": {k: asdict(v) for k, v in self.curves.items()},
            "calibration": {k: asdict(v) for k, v in self.calibration.items()},
            "errors": self.errors,
        }
        fields = ("object", "detected", "count", "share")
        result["most_confused"] = [
            dict(zip(fields, row, strict=True)) for row in self.most_confused(100)
        ]
        return result


def diagnose(
    truth: Annotations,
    detections: Detections,
    found: Evaluation,
    task: str = "bbox",
    thresholds: Sequence[float] = (0.05, 0.3, 0.5),
    min_score: float = 0.3,
) -> Diagnosis:
    """Diagnose predictions that `evaluate_predictions` has evaluated.

    Args:
        truth: the ground truth.
        detections: by image id.
        found: their evaluation, whose groups are taken.
        task: "bbox" or "segm".
        thresholds: scores in [0, 1] to mark on the curves.
        min_score: detections below it do not count as confusions; in [0, 1].

    Raises:
        ValueError: a threshold outside [0, 1], or a task that was not evaluated.
    """
    if task not in found.results:
        raise ValueError(f"task {task!r} was not evaluated; there are {', '.join(found.results)}")
    for value in (*thresholds, min_score):
        if not 0 <= value <= 1:
            raise ValueError(f"score thresholds must be in [0, 1], not {value}")
    ids = sorted(c["id"] for c in truth.data["categories"])
    groups = [record["group"] for record in found.classes.values()]
    engine = _Engine(truth, detections, task, found.max_dets)
    members = {"all": ids}
    for letter, name in GROUPS.items():
        own = [i for i, group in zip(ids, groups, strict=True) if group == letter]
        if own and len(own) < len(ids):
            members[name] = own
    curves, calibration = {}, {}
    for name, own in progress(members.items(), f"diagnosing {task}", unit="classes"):
        evaluator = engine.run(own)
        curve = _curve(evaluator.eval, evaluator.params, thresholds)
        if curve is not None:
            curves[name] = curve
            calibration |= _calibration(evaluator, name)
        if name == "all":
            errors = _errors(evaluator)
    return Diagnosis(
        task,
        curves,
        calibration,
        errors,
        list(found.classes),
        engine.confusion(ids, min_score),
        min_score,
    )


class _Engine:
    """The same ground truth and detections for every question.

    Args:
        truth: the ground truth.
        detections: by image id.
        task: "bbox" or "segm".
        max_dets: per image (LVIS) or per image and class (COCO).
    """

    def __init__(self, truth: Annotations, detections: Detections, task: str, max_dets: int):
        self.federated, self.task, self.max_dets = truth.federated, task, max_dets
        ground = GroundTruth(truth.data, truth.path, truth.federated)
        numbers = ground.image_index  # ids may be text
        categories = [
            {"id": c["id"], "name": str(c["id"]), "frequency": c.get("frequency", "f")}
            for c in truth.data["categories"]
        ]
        annotations = [a for c in ground.class_ids for a in ground.annotations.get(c, ())]
        self.truth = hotcoco.COCO(
            {
                "images": list(ground.images.values()),
                "categories": categories,
                "annotations": [
                    ground.engine_annotation(a, n, task) for n, a in enumerate(annotations, 1)
                ],
            }
        )
        # the limit per image and the classes that count are those of the AP
        kept = [
            {**_fields(d, task), "image_id": numbers[image]}
            for image, found in detections.items()
            for d in ground.select(image, found, max_dets)
        ]
        self.found = self.truth.load_res(kept) if kept else None

    def run(self, ids: Sequence[int]) -> Any:
        """An evaluator of some classes that has matched and accumulated."""
        found = self.found or self.truth.load_res([])
        evaluator = hotcoco.COCOeval(self.truth, found, self.task, lvis_style=self.federated)
        evaluator.params.cat_ids = list(ids)
        evaluator.params.max_dets = [self.max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
        return evaluator

    def confusion(self, ids: Sequence[int], min_score: float) -> np.ndarray:
        """(K + 1, K + 1) counts, classes in the order of `ids`."""
        found = self.found or self.truth.load_res([])
        evaluator = hotcoco.COCOeval(self.truth, found, self.task, lvis_style=self.federated)
        result = evaluator.confusion_matrix(iou_thr=IOU, max_det=self.max_dets, min_score=min_score)
        order = [list(result["cat_ids"]).index(i) for i in ids] + [len(ids)]
        return np.asarray(result["matrix"])[np.ix_(order, order)]


def _fields(detection: dict, task: str) -> dict:
    field = "bbox" if task == "bbox" else "segmentation"
    return {k: detection[k] for k in ("category_id", "score", field)}


def _curve(result: dict, params: Any, thresholds: Sequence[float]) -> Curve | None:
    """The mean curve over classes with ground truth; None where no class has any."""
    at = int(np.argmin(np.abs(np.asarray(params.iou_thrs) - IOU)))
    precision = np.asarray(result["precision"])[at, :, :, 0, -1]  # (101, K), -1: no ground truth
    scores = np.asarray(result["scores"])[at, :, :, 0, -1]
    known = precision.max(axis=0) >= 0
    if not known.any():
        return None
    precision, scores = precision[:, known], scores[:, known]
    recall, mean = np.asarray(params.rec_thrs), precision.mean(axis=1)
    marks = {}
    for threshold in thresholds:
        above = ((scores >= threshold) & (precision > 0)).sum(axis=0)  # (K,) points reached
        reached = float(np.where(above > 0, recall[(above - 1).clip(min=0)], 0.0).mean())
        if above.any():
            marks[float(threshold)] = (reached, float(np.interp(reached, recall, mean)))
    return Curve(recall.tolist(), mean.tolist(), marks)


def _calibration(evaluator: Any, name: str) -> dict[str, Calibration]:
    found = evaluator.calibration(n_bins=10, iou_threshold=IOU)
    if not found["num_detections"]:
        return {}
    bins = [
        {
            "lower": b["bin_lower"],
            "upper": b["bin_upper"],
            "confidence": b["avg_confidence"],
            "accuracy": b["avg_accuracy"],
            "count": b["count"],
        }
        for b in found["bins"]
    ]
    return {name: Calibration(found["ece"], found["num_detections"], bins)}


def _errors(evaluator: Any) -> dict[str, dict[str, float]]:
    found = evaluator.tide_errors(pos_thr=IOU, bg_thr=0.1)
    return {
        name: {"count": found["counts"][key], "AP50 lost": 100 * found["delta_ap"][key]}
        for key, name in ERRORS.items()
    }
