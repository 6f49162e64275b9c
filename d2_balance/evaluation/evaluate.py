"""Evaluates a prediction file without a model: what `d2-balance eval` does."""

import logging
from collections.abc import Mapping, Sequence

from d2_balance.data.annotations import Annotations
from d2_balance.data.groups import LVIS_CUTS

from .average_precision import GroundTruth, average_precision
from .evaluators import COCOGroupEvaluator, LVISGroupEvaluator
from .groups import group_metrics, resolve_groups, training_counts
from .per_class import class_records
from .predictions import Detections
from .record import Evaluation

logger = logging.getLogger(__name__)


def evaluate_predictions(
    truth: Annotations,
    detections: Detections,
    *,
    train: Annotations | None = None,
    max_dets: int | None = None,
    tasks: Sequence[str] | None = None,
    cuts: tuple[int, int] | None = None,
) -> Evaluation:
    """Evaluate detections as the evaluators of a training do.

    Args:
        truth: the ground truth.
        detections: by image id, as `read_predictions` returns them.
        train: the training set, whose images per class give groups and counts; None: what the
            ground truth's file says of it (`frequency`, `image_count`).
        max_dets: detections that count, at least 1; None: 300 per image (LVIS), 100 per image and
            class (COCO).
        tasks: of "bbox", "segm"; None: those that all detections have a box or a mask for.
        cuts: highest image count of a rare and of a common class; replaces the file's groups.

    Raises:
        ValueError: an argument out of range, or a task that the detections have nothing for.
    """
    evaluator = LVISGroupEvaluator if truth.federated else COCOGroupEvaluator
    max_dets = evaluator.default_max_dets if max_dets is None else max_dets
    if max_dets < 1:
        raise ValueError(f"max_dets must be at least 1, not {max_dets}")
    notes: list[str] = []
    if not any(detections.values()):
        notes.append(
            "the predictions hold no detection, so that every AP is 0; a model that finds nothing "
            "may have a score threshold (SCORE_THRESH_TEST) above all its scores"
        )
    ground = ground_truth(truth, notes)
    tasks = _tasks(tasks, detections, ground, notes)
    kept = {
        image: ground.select(image, found, max_dets)
        for image, found in detections.items()
        if image in ground.image_index
    }
    tables = {task: average_precision(ground, kept, task, max_dets) for task in tasks}
    names = list(truth.class_names.values())
    by_id = {c["id"]: c for c in truth.data["categories"]}
    in_file = [by_id[i] for i in ground.class_ids] if truth.federated else []
    given = None if train is None else train.image_count()
    if given is not None:
        notes += _unseen(names, given, truth.name, train.name)
    counts = training_counts(names, given, in_file, truth.name)
    letters = in_file if train is None and cuts is None else []
    groups = resolve_groups(names, None, letters, counts, cuts or LVIS_CUTS)
    results = {}
    for task, table in tables.items():
        results[task], reasons = group_metrics(table, groups, truth.name)
        notes += [reason for reason in reasons if reason not in notes]
    if any(kept.values()) and not any(metrics["AP50"] > 0 for metrics in results.values()):
        notes.append(
            f"not one detection fits an object of {truth.name} at IoU 0.5; see whether the "
            "predictions are for another dataset with the same ids, or their boxes are x0, y0, "
            "x1, y1 or relative, not x, y, width, height in pixels"
        )
    instances = [ground.instance_count(c) for c in ground.class_ids]
    return Evaluation(
        dataset=truth.name,
        train="" if train is None else train.name,
        rules="lvis" if truth.federated else "coco",
        max_dets=max_dets,
        images=len(ground.images),
        detections=sum(map(len, detections.values())),
        results=results,
        classes=class_records(ground.class_ids, names, groups, counts, instances, tables),
        notes=notes,
    )


def ground_truth(truth: Annotations, notes: list[str]) -> GroundTruth:
    """The annotations for the engine without the bad ones, which `notes` gets a line about."""
    report = truth.report
    if report.total:
        notes.append(
            f"{report.total} bad annotations of {truth.path} not evaluated: {report.counts}"
        )
    if truth.federated and not len(truth.negative.category):
        notes.append(
            f"{truth.name} lists no absent classes (neg_category_ids): detections count only where "
            "their class is annotated"
        )
    return GroundTruth(truth.data, truth.path, truth.federated)


def _tasks(
    tasks: Sequence[str] | None, detections: Detections, ground: GroundTruth, notes: list[str]
) -> list[str]:
    fields = {"bbox": "bbox", "segm": "segmentation"}
    if tasks is not None and not set(tasks) <= set(fields):
        raise ValueError(f"tasks {tuple(tasks)}: allowed are {tuple(fields)}")
    able = []
    for task, name in fields.items():
        found = [d.get(name) is not None for dets in detections.values() for d in dets]
        if all(found) and (found or task == "bbox"):
            able.append(task)
        elif tasks is not None and task in tasks:
            missing = len(found) - sum(found)
            raise ValueError(f"{task} needs {name!r} in every detection; {missing} have none")
    if "segm" in able and ground.without_mask:
        notes.append(
            f"segm is not evaluated: {len(ground.without_mask)} annotations have no segmentation, "
            f"the first is {ground.without_mask[0]}"
        )
        able.remove("segm")
    able = [task for task in able if tasks is None or task in tasks]
    if not able:
        raise ValueError("nothing to evaluate: neither boxes nor masks in every detection")
    return able


def _unseen(names: Sequence[str], counts: Mapping[str, int], dataset: str, train: str) -> list[str]:
    lacking = [name for name in names if name not in counts]
    unseen = [name for name in names if counts.get(name) == 0]
    notes = []
    for found, what in (
        (lacking, f"not listed in {train}"),
        (unseen, f"without object in {train}"),
    ):
        if found:
            shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            notes.append(f"{len(found)} of {len(names)} classes of {dataset} are {what}: {shown}")
    return notes
