"""Frequency groups of classes and the averages of AP over them."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from d2_balance.data.groups import GROUPS, groups_from_counts

from .matching import SIZES, APTable, Ranked

TrainCounts = Mapping[str, int] | Callable[[], Mapping[str, int] | None] | None

logger = logging.getLogger(__name__)


def check_groups(groups: Mapping[str, str] | None) -> None:
    """Check groups given by class name.

    Raises:
        ValueError: naming the first class whose group is not r, c or f.
    """
    for name, group in (groups or {}).items():
        if group not in GROUPS:
            raise ValueError(f"groups: class {name!r} is in {group!r}; must be r, c or f")


def training_counts(
    names: Sequence[str],
    given: TrainCounts,
    in_file: Sequence[int] | None,
    dataset_name: str,
) -> list[int | None]:
    """Training images that hold each class, None where unknown.

    A mapping comes first, then `image_count` of the file (LVIS files give the training set's), then
    a function. Classes that training never saw count 0.

    Args:
        names: (K,) class names.
        given: counts by class name, a function that returns them (or None), or None.
        in_file: (K,) counts of the training set that the file gives, or None.
        dataset_name: for messages.
    """
    if not isinstance(given, Mapping):
        if in_file is not None:
            return list(in_file)
        given = None if given is None else given()
    if given is None:
        return [None] * len(names)
    unseen = [name for name in names if name not in given]
    if unseen and len(unseen) == len(names):
        logger.warning(f"no class of {dataset_name} is in the training set")
        return [None] * len(names)
    if unseen:
        shown = ", ".join(unseen[:10]) + (", ..." if len(unseen) > 10 else "")
        logger.warning(f"{len(unseen)} classes of {dataset_name} not in the training set: {shown}")
    return [given.get(name, 0) for name in names]


def resolve_groups(
    names: Sequence[str],
    given: Mapping[str, str] | None,
    in_file: Sequence[str] | None,
    counts: Sequence[int | None],
    cuts: tuple[int, int],
) -> list[str | None]:
    """Frequency group of each class: `given` first, then the file's, then by training counts.

    Args:
        names: (K,) class names, the keys of `given`.
        given: group by class name, or None.
        in_file: (K,) groups that the file gives, or None.
        counts: (K,) training images by class, None where unknown.
        cuts: as in `groups_from_counts`.
    """
    if given is not None:
        return [given.get(name) for name in names]
    if in_file is not None:
        return list(in_file)
    return [None if n is None else groups_from_counts([n], cuts)[0] for n in counts]


def group_metrics(
    table: APTable, groups: Sequence[str | None], dataset_name: str
) -> tuple[dict[str, float], list[str]]:
    """Averages over classes in percent, and one sentence for each that is NaN.

    Classes without ground truth do not count in an average. An average over no class is NaN.

    Returns:
        AP, AP50, AP75, APs, APm, APl, APr, APc, APf; and the reasons.
    """
    ap = table.by_class()
    parts = {
        "AP": (ap, "no ground truth"),
        "AP50": (table.by_class(iou=0.5), "no ground truth"),
        "AP75": (table.by_class(iou=0.75), "no ground truth"),
    }
    for size in SIZES[1:]:
        reason = f"no {size} ground truth"
        parts["AP" + size[0]] = (table.by_class(size=size), reason)
    for letter, name in GROUPS.items():
        member = np.array([g == letter for g in groups], dtype=bool)
        # a group without a class is no surprise, and data may have no groups at all
        parts["AP" + letter] = (
            ap[member],
            f"no ground truth of {name} classes" if member.any() else "",
        )

    metrics, reasons = {}, []
    for key, (values, reason) in parts.items():
        values = values[~np.isnan(values)]
        metrics[key] = float(values.mean() * 100) if len(values) else float("nan")
        if not len(values) and reason:
            reasons.append(f"{key} is NaN: {reason} in {dataset_name}")
    return metrics, reasons


def pool_metrics(ranked: Ranked, groups: Sequence[str | None]) -> dict[str, float]:
    """AP, AP50, AP75 of one list over all classes, and APr, APc, APf of one over a group.

    In percent; NaN for a group without objects.
    """
    every = 100 * ranked.pooled(np.ones(len(groups), dtype=bool))
    metrics = {"AP": float(every.mean()), "AP50": float(every[0]), "AP75": float(every[5])}
    for letter in GROUPS:
        member = np.array([g == letter for g in groups], dtype=bool)
        metrics[f"AP{letter}"] = float(100 * ranked.pooled(member).mean())
    return metrics


def classes_without_truth(names: Sequence[str], instances: Sequence[int], dataset_name: str) -> str:
    """Say which of the classes have no ground truth, and hence no AP; "" if all have some."""
    empty = [name for name, count in zip(names, instances, strict=True) if not count]
    if not empty:
        return ""
    shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
    message = f"AP is NaN for {len(empty)} of {len(names)} classes: no ground truth of them"
    return f"{message} in {dataset_name}: {shown}"
