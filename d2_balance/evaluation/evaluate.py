"""The one pipeline of an evaluation: AP, and what a report and a comparison are made from."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.groups import LVIS_CUTS

from .boundary import match
from .groups import (
    TrainCounts,
    group_metrics,
    pool_metrics,
    resolve_groups,
    training_counts,
)
from .matching import Detections, GroundTruth, Matcher, Ranked, select
from .openimages import classes_above, openimages_ap
from .predictions import Predictions
from .record import Evaluation, class_records

MAX_DETS = {"lvis": 300, "coco": 100}
"""Detections that count: of an image (LVIS), of an image and class (COCO)."""
PER_CLASS = 10_000
"""Detections of a class that count in AP-fixed and AP-pool (Dave et al., arXiv:2102.01066)."""
MEASURES = ("fixed", "pool", "boundary", "openimages")
"""What may be measured beside the AP of the rules."""


@dataclass(frozen=True, eq=False)
class Measured:
    """An evaluation, and by task ("bbox", "segm", "boundary") the matches of its AP."""

    evaluation: Evaluation
    matchers: dict[str, Matcher]


def evaluate_predictions(
    truth: Annotations, predictions: Predictions, **options: Any
) -> Evaluation:
    """Evaluate a file of detections as the evaluators of a training do; `options` as `measure`."""
    return measure(truth, predictions, **options).evaluation


def measure(
    truth: Annotations,
    predictions: Predictions,
    *,
    train: Annotations | None = None,
    max_dets: int | None = None,
    tasks: Sequence[str] | None = None,
    cuts: tuple[int, int] | None = None,
    ap: Sequence[str] = (),
    per_class: int = PER_CLASS,
    image_ids: Collection[int | str] | None = None,
    hierarchy: str = "",
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
        ap: of MEASURES, what to measure beside the AP of the rules.
        per_class: detections of a class that count in "fixed" and "pool", at least 1.
        image_ids: images to evaluate (minival, for example); None: all.
        hierarchy: file of labels above others, for "openimages"; "": none.

    Raises:
        ValueError: an argument out of range, a task that the detections have nothing for, or an id
            that is none of the images.
    """
    max_dets = checked_max_dets(max_dets, truth.federated)
    check_measures(ap, per_class)
    _check_ids(image_ids, truth)
    notes: list[str] = []
    if not len(predictions):
        notes.append(
            "the predictions hold no detection, so that every AP is 0; a model that finds nothing "
            "may have a score threshold (SCORE_THRESH_TEST) above all its scores"
        )
    grounds = {t: GroundTruth(truth, t, image_ids) for t in _able(tasks, predictions)}
    chosen = usable_tasks(grounds, tasks, notes)
    if "boundary" in ap:
        chosen.append(_boundary(grounds, predictions))
    if "openimages" in ap and "bbox" not in chosen:
        raise ValueError("AP50 of Open Images is of boxes; every detection needs a bbox")
    above = classes_above(hierarchy, truth) if hierarchy else None
    notes[:0] = ground_notes(truth, grounds, chosen)
    if truth.federated and train is None and truth.gives_image_count:
        own = truth.training_image_count is None
        notes.append(
            f"image_count of {truth.name} counts its own images, not those of a training: groups "
            "are those of the file; --train names the training set"
            if own
            else f"training images are image_count of {truth.name}"
        )
    if cuts is not None and train is None and truth.training_image_count is None:
        raise ValueError(
            f"the cuts {cuts[0]} and {cuts[1]} are numbers of training images; {truth.name} does "
            "not say them; name the training set with --train"
        )
    given = None if train is None else train.image_count()
    if given is not None and train is not None:
        notes += _unseen(list(truth.class_names.values()), given, truth.name, train.name)
    in_file = truth.federated and train is None and cuts is None
    measured = figures(
        {task: grounds[task] for task in chosen},
        predictions,
        max_dets=max_dets,
        ap=ap,
        per_class=per_class,
        train="" if train is None else train.name,
        counts=given,
        groups_of_file=in_file,
        cuts=cuts,
        notes=notes,
        source=predictions.path,
    )
    evaluation, matchers = measured.evaluation, measured.matchers
    if "openimages" in ap:
        _add_openimages(evaluation, openimages_ap(grounds["bbox"], predictions, above))
    found = any(metrics["AP50"] > 0 for metrics in evaluation.results.values())
    if any(len(m.detections) for m in matchers.values()) and truth.trained().any() and not found:
        evaluation.notes.append(
            f"not one detection fits an object of {truth.name} at IoU 0.5; see whether the "
            "predictions are for another dataset with the same ids, or their boxes are x0, y0, "
            "x1, y1 or relative, not x, y, width, height in pixels"
        )
    return measured


def _boundary(grounds: dict[str, GroundTruth], predictions: Predictions) -> str:
    """Add the objects of boundary AP to those of masks; return the name of the task."""
    if "segm" not in grounds or grounds["segm"].without_mask:
        where = "annotations" if "segm" in grounds else f"detections of {predictions.path}"
        raise ValueError(f"boundary AP needs masks; there are {where} without a segmentation")
    grounds["boundary"] = grounds["segm"].for_task("boundary")
    return "boundary"


def _add_openimages(evaluation: Evaluation, values: np.ndarray) -> None:
    """Add (K,) AP50 of Open Images."""
    known = values[~np.isnan(values)]
    mean = 100 * float(known.mean()) if len(known) else math.nan
    evaluation.results["bbox_openimages"] = {"AP50": mean}
    for record, value in zip(evaluation.classes.values(), values.tolist(), strict=True):
        record["AP50_openimages"] = 100 * value


def figures(
    grounds: Mapping[str, GroundTruth],
    predictions: Predictions,
    *,
    max_dets: int,
    ap: Sequence[str],
    per_class: int,
    train: str,
    counts: TrainCounts,
    groups_of_file: bool,
    cuts: tuple[int, int] | None,
    notes: Sequence[str],
    groups: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
    source: str = "",
) -> Measured:
    """Match detections and put the figures together.

    Args:
        grounds: the objects of each task.
        predictions: the detections.
        max_dets: detections that count.
        ap: of MEASURES; "boundary" is one of the tasks.
        per_class: detections of a class that count in "fixed" and "pool".
        train: the training set as the user named it.
        counts: training images by class name, see `training_counts`.
        groups_of_file: whether the file's groups count.
        cuts: highest image count of a rare and of a common class; None: LVIS's.
        notes: what is noted already.
        groups: class name to "r", "c" or "f"; comes first.
        names: (K,) class names; None: those of the file.
        source: the file of the detections; "" if it does not stay.
    """
    matchers, fixed = matched(grounds, predictions, max_dets), {}
    if {"fixed", "pool"} & set(ap):
        fixed = matched(grounds, predictions, None, per_class)
    ground = next(iter(matchers.values())).truth
    truth = ground.annotations
    names = list(truth.class_names.values()) if names is None else list(names)
    own = truth.training_image_count if truth.federated else None
    images = training_counts(names, counts, own, truth.name)
    letters = resolve_groups(
        names, groups, truth.file_groups if groups_of_file else None, images, cuts or LVIS_CUTS
    )
    tables = {task: matcher.table() for task, matcher in matchers.items()}
    if "fixed" in ap:
        tables |= {f"{task}_fixed": matcher.table() for task, matcher in fixed.items()}
    results, notes = {}, list(notes)
    if fixed:
        notes += _too_few(ground, predictions, per_class)
    for task, table in tables.items():
        results[task], reasons = group_metrics(table, letters, truth.name)
        notes += [reason for reason in reasons if reason not in notes]
    if "pool" in ap:
        results |= {f"{task}_pool": pool_metrics(Ranked(m), letters) for task, m in fixed.items()}
    instances = ground.instances().tolist()
    evaluation = Evaluation(
        dataset=truth.name,
        train=train,
        rules="lvis" if truth.federated else "coco",
        max_dets=max_dets,
        images=ground.num_images,
        detections=len(predictions),
        results=results,
        classes=class_records(ground.class_ids, names, letters, images, instances, tables),
        notes=notes,
        truth=os.path.abspath(truth.path),
        predictions=source and os.path.abspath(source),
        per_class=per_class if fixed else 0,
    )
    return Measured(evaluation, matchers)


def matched(
    grounds: Mapping[str, GroundTruth],
    predictions: Predictions,
    max_dets: int | None,
    per_class: int = 0,
) -> dict[str, Matcher]:
    """Match the detections of each task; arguments as those of `select`."""
    detections: dict[bool, Detections] = {}  # those with masks serve two tasks
    matchers = {}
    for task, ground in grounds.items():
        if ground.with_masks not in detections:
            detections[ground.with_masks] = select(
                ground, predictions, max_dets, per_class=per_class
            )
        matchers[task] = match(ground, detections[ground.with_masks])
    return matchers


def checked_max_dets(max_dets: int | None, federated: bool) -> int:
    """Return the limit of detections; raise ValueError below 1."""
    limit = MAX_DETS["lvis" if federated else "coco"] if max_dets is None else max_dets
    if limit < 1:
        raise ValueError(f"max_dets must be at least 1, not {limit}")
    return limit


def check_measures(ap: Sequence[str], per_class: int) -> None:
    """Raise ValueError for a measure that is unknown, or a limit below 1."""
    unknown = [name for name in ap if name not in MEASURES]
    if unknown:
        raise ValueError(f"ap {unknown[0]!r} is unknown; must be of {', '.join(MEASURES)}")
    if per_class < 1:
        raise ValueError(f"the detections per class must be at least 1, not {per_class}")


def _check_ids(image_ids: Collection[int | str] | None, truth: Annotations) -> None:
    known = set(truth.image_id.tolist())
    lacking = [i for i in image_ids or () if i not in known]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(image_ids or ())} image ids are no images of {truth.name}: "
            f"{_some(list(map(str, lacking)))}"
        )


def _too_few(truth: GroundTruth, predictions: Predictions, per_class: int) -> list[str]:
    """Say that the model gave fewer detections of a class than AP-fixed asks for."""
    counts = np.bincount(
        np.searchsorted(truth.class_ids, predictions.category), minlength=len(truth.class_ids)
    )
    shown = truth.instances() > 0
    few = int((counts[shown] < per_class).sum())
    if not few:
        return []
    return [
        f"AP-fixed and AP-pool are too low if the predictions were cut before: {few} of "
        f"{int(shown.sum())} classes with ground truth have fewer than {per_class:,} detections; "
        "predict with TEST.DETECTIONS_PER_CLASS"
    ]


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
    if {"segm", "boundary"} & set(tasks) and report.bad_masks:
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
    if tasks is not None and not set(tasks) <= {"bbox", "segm"}:
        raise ValueError(f"tasks {tuple(tasks)}: must be of ('bbox', 'segm')")
    able = []
    has = {"bbox": ~np.isnan(predictions.box[:, 0]), "segm": predictions.has_mask}
    for task, given in has.items():
        if given.all() and (len(given) or task in (tasks or ("bbox",))):
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
