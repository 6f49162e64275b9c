"""The one pipeline of an evaluation: AP, and what a report and a comparison are made from."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.groups import LVIS_CUTS

from .groups import TrainCounts, group_metrics, resolve_groups, training_counts
from .matching import GroundTruth, Matcher, select
from .per_class import class_records
from .predictions import Predictions
from .record import TASKS, Evaluation

MAX_DETS = {"lvis": 300, "coco": 100}
"""Detections that count: of an image (LVIS), of an image and class (COCO)."""


@dataclass(frozen=True, eq=False)
class Measured:
    """An evaluation, and by task the matches that it was made from."""

    evaluation: Evaluation
    matchers: dict[str, Matcher]


def evaluate_predictions(
    truth: Annotations,
    predictions: Predictions,
    *,
    train: Annotations | None = None,
    max_dets: int | None = None,
    tasks: Sequence[str] | None = None,
    cuts: tuple[int, int] | None = None,
) -> Evaluation:
    """Evaluate a file of detections as the evaluators of a training do; see `measure`."""
    return measure(
        truth, predictions, train=train, max_dets=max_dets, tasks=tasks, cuts=cuts
    ).evaluation


def measure(
    truth: Annotations,
    predictions: Predictions,
    *,
    train: Annotations | None = None,
    max_dets: int | None = None,
    tasks: Sequence[str] | None = None,
    cuts: tuple[int, int] | None = None,
) -> Measured:
    """Evaluate a file of detections.

    Args:
        truth: the ground truth.
        predictions: what `read_predictions` returns.
        train: the training set, whose images per class give groups and counts; None: what the
            ground truth's file says of it (`frequency`, `image_count`).
        max_dets: detections that count, at least 1; None: `MAX_DETS`.
        tasks: of "bbox", "segm"; None: those that all detections have a box or a mask for.
        cuts: highest image count of a rare and of a common class; replaces the file's groups.

    Raises:
        ValueError: an argument out of range, or a task that the detections have nothing for.
    """
    max_dets = checked_max_dets(max_dets, truth.federated)
    notes: list[str] = []
    if not len(predictions):
        notes.append(
            "the predictions hold no detection, so that every AP is 0; a model that finds nothing "
            "may have a score threshold (SCORE_THRESH_TEST) above all its scores"
        )
    grounds = {t: GroundTruth(truth, t) for t in _able(tasks, predictions)}
    chosen = usable_tasks(grounds, tasks, notes)
    notes[:0] = ground_notes(truth, grounds, chosen)
    if truth.federated and train is None and truth.gives_image_count:
        own = truth.training_image_count is None
        notes.append(
            f"image_count of {truth.name} counts its own images, not those of a training: groups "
            "are those of the file; --train names the training set"
            if own
            else f"training images are image_count of {truth.name}"
        )
    matchers = {
        task: Matcher(grounds[task], select(grounds[task], predictions, max_dets))
        for task in chosen
    }
    if cuts is not None and train is None and truth.training_image_count is None:
        raise ValueError(
            f"the cuts {cuts[0]} and {cuts[1]} are numbers of training images; {truth.name} does "
            "not say them; name the training set with --train"
        )
    given = None if train is None else train.image_count()
    if given is not None and train is not None:
        notes += _unseen(list(truth.class_names.values()), given, truth.name, train.name)
    in_file = truth.federated and train is None and cuts is None
    evaluation = record(
        matchers,
        max_dets=max_dets,
        detections=len(predictions),
        train="" if train is None else train.name,
        counts=given,
        groups_of_file=in_file,
        cuts=cuts,
        notes=notes,
        predictions=predictions.path,
    )
    results = evaluation.results
    found = any(metrics["AP50"] > 0 for metrics in results.values())
    if any(len(m.detections) for m in matchers.values()) and truth.trained().any() and not found:
        evaluation.notes.append(
            f"not one detection fits an object of {truth.name} at IoU 0.5; see whether the "
            "predictions are for another dataset with the same ids, or their boxes are x0, y0, "
            "x1, y1 or relative, not x, y, width, height in pixels"
        )
    return Measured(evaluation, matchers)


def record(
    matchers: Mapping[str, Matcher],
    *,
    max_dets: int,
    detections: int,
    train: str,
    counts: TrainCounts,
    groups_of_file: bool,
    cuts: tuple[int, int] | None,
    notes: Sequence[str],
    groups: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
    predictions: str = "",
) -> Evaluation:
    """Put the figures of matched detections together.

    Args:
        matchers: by task.
        max_dets: detections that count.
        detections: number of detections of the file.
        train: the training set as the user named it.
        counts: training images by class name, see `training_counts`.
        groups_of_file: whether the file's groups count.
        cuts: highest image count of a rare and of a common class; None: LVIS's.
        notes: what is noted already.
        groups: class name to "r", "c" or "f"; comes first.
        names: (K,) class names; None: those of the file.
        predictions: the file of the detections; "" if it does not stay.
    """
    ground = next(iter(matchers.values())).truth
    truth = ground.annotations
    names = list(truth.class_names.values()) if names is None else list(names)
    own = truth.training_image_count if truth.federated else None
    images = training_counts(names, counts, own, truth.name)
    letters = resolve_groups(
        names, groups, truth.file_groups if groups_of_file else None, images, cuts or LVIS_CUTS
    )
    tables = {task: matcher.table() for task, matcher in matchers.items()}
    results, notes = {}, list(notes)
    for task, table in tables.items():
        results[task], reasons = group_metrics(table, letters, truth.name)
        notes += [reason for reason in reasons if reason not in notes]
    instances = ground.instances().tolist()
    return Evaluation(
        dataset=truth.name,
        train=train,
        rules="lvis" if truth.federated else "coco",
        max_dets=max_dets,
        images=ground.num_images,
        detections=detections,
        results=results,
        classes=class_records(ground.class_ids, names, letters, images, instances, tables),
        notes=notes,
        truth=os.path.abspath(truth.path),
        predictions=predictions and os.path.abspath(predictions),
    )


def checked_max_dets(max_dets: int | None, federated: bool) -> int:
    """Return the limit of detections; raise ValueError below 1."""
    limit = MAX_DETS["lvis" if federated else "coco"] if max_dets is None else max_dets
    if limit < 1:
        raise ValueError(f"max_dets must be at least 1, not {limit}")
    return limit


def ground_notes(
    truth: Annotations, grounds: Mapping[str, GroundTruth], tasks: Collection[str]
) -> list[str]:
    """Say what of the ground truth does not count."""
    notes = []
    report = truth.report
    if report.total:
        notes.append(
            f"{report.total} bad annotations of {truth.path} not evaluated: {report.counts}"
        )
    notes += report.hints
    if report.crowds and not truth.federated:
        notes.append(f"{report.describe_crowds()} and neither right nor missed here")
    if "segm" in tasks and report.bad_masks:
        counts = {reason: len(ids) for reason, ids in report.bad_masks.items()}
        total = sum(counts.values())
        notes.append(
            f"{total} objects of {truth.path} with bad masks do not count in mask AP, nor do "
            f"detections of them: {counts}"
        )
    left_out = max((grounds[task].left_out for task in tasks), default=0)
    if left_out:
        notes.append(f"{left_out} objects of area 0 do not count, by the rules of LVIS")
    ground = grounds[next(iter(tasks))]
    seen = np.bincount(ground.category, minlength=len(ground.class_ids))
    hidden = np.flatnonzero((seen > 0) & (ground.instances() == 0)).tolist()
    if hidden:
        field = "ignore" if truth.federated else "iscrowd"
        names = list(truth.class_names.values())
        notes.append(f"no AP for {_some([names[k] for k in hidden])}: every object has {field} 1")
    if truth.federated and not len(truth.negative.category):
        notes.append(
            f"{truth.name} lists no absent classes (neg_category_ids): detections count only where "
            "their class is annotated"
        )
    return notes


def _able(tasks: Sequence[str] | None, predictions: Predictions) -> list[str]:
    """Tasks that every detection has something for."""
    if tasks is not None and not set(tasks) <= set(TASKS):
        raise ValueError(f"tasks {tuple(tasks)}: must be of {tuple(TASKS)}")
    able = []
    has = {"bbox": ~np.isnan(predictions.box[:, 0]), "segm": predictions.has_mask}
    for task, given in has.items():
        if given.all() and (len(given) or task == "bbox"):
            able.append(task)
        elif tasks is not None and task in tasks:
            name = {"bbox": "bbox", "segm": "segmentation"}[task]
            missing = len(given) - int(given.sum())
            raise ValueError(f"{task} needs {name!r} in every detection; {missing} have none")
    return able


def usable_tasks(
    grounds: Mapping[str, GroundTruth], tasks: Sequence[str] | None, notes: list[str]
) -> list[str]:
    """Tasks of `tasks` that the ground truth has something for; `notes` says which it has not.

    Raises:
        ValueError: none is left.
    """
    able = list(grounds)
    if "segm" in able and grounds["segm"].without_mask:
        lacking = grounds["segm"].without_mask
        notes.append(
            f"segm is not evaluated: {len(lacking)} annotations of "
            f"{grounds['segm'].annotations.name} have no segmentation, the first is {lacking[0]}"
        )
        able.remove("segm")
    able = [task for task in able if tasks is None or task in tasks]
    if not able:
        raise ValueError("nothing to evaluate: neither boxes nor masks in every detection")
    return able


def _unseen(names: Sequence[str], counts: Mapping[str, int], dataset: str, train: str) -> list[str]:
    lacking = [name for name in names if name not in counts]
    unseen = [name for name in names if counts.get(name) == 0]
    return [
        f"{len(classes)} of {len(names)} classes of {dataset} are {what}: {_some(classes)}"
        for classes, what in (
            (lacking, f"not listed in {train}"),
            (unseen, f"without object in {train}"),
        )
        if classes
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
