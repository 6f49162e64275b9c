"""The figures of one evaluation, of all classes and of each, and the files that carry them."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from d2_balance.utils.files import atomic_path, read_json

from .matching import APTable

Records = dict[str, dict[str, Any]]
"""Class name to its record, see `class_records`."""

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
TASKS = {"bbox": "box", "segm": "mask", "boundary": "boundary"}
"""Tasks, and what tables call them."""


def title(task: str) -> str:
    """What tables call a task or a variant of it, such as "box, fixed"."""
    base, _, variant = task.partition("_")
    return TASKS[base] + (f", {variant}" if variant else "")


@dataclass
class Evaluation:
    """Figures of one prediction file; AP in percent, NaN where nothing can be measured.

    Attributes:
        dataset: the dataset, as the user named it.
        train: the training set that classes are grouped by, "" where the file says it itself.
        rules: "lvis" (federated) or "coco".
        max_dets: detections that count, per image (lvis) or per image and class (coco).
        images: images of the dataset.
        detections: detections in the prediction file.
        results: task to AP, AP50, AP75, APs, APm, APl, APr, APc, APf; `<task>_fixed` and
            `<task>_pool` have those of AP-fixed and AP-pool, the latter without sizes, and
            "bbox_openimages" has AP50.
        classes: class name to record, see `class_records`.
        notes: why figures are NaN, and what was left out.
        truth, predictions: the files it was made from, for intervals of a comparison; "" where a
            reader cannot have them.
        per_class: detections of a class that count in AP-fixed and AP-pool; 0 if neither is given.
    """

    dataset: str
    train: str
    rules: str
    max_dets: int
    images: int
    detections: int
    results: dict[str, dict[str, float]]
    classes: Records
    notes: list[str] = field(default_factory=list)
    truth: str = ""
    predictions: str = ""
    per_class: int = 0

    def as_json(self) -> dict[str, Any]:
        """The same fields as a JSON object, NaN as null."""
        return {name: _without_nan(value) for name, value in vars(self).items()}

    def write(self, path: str) -> None:
        """Write the figures to `path`, atomically."""
        _write_json(self.as_json(), path)

    @classmethod
    def read(cls, path: str) -> Evaluation:
        """Read what `write` wrote.

        Raises:
            ValueError: a file that is missing or holds something else, naming the field.
        """
        data = read_json(path)
        later = ("truth", "predictions", "per_class")  # older files lack them
        names = [f.name for f in fields(cls) if f.name not in later]
        lacking = [n for n in names if not isinstance(data, dict) or n not in data]
        if lacking:
            raise ValueError(
                f"{path}: no evaluation: it lacks {', '.join(lacking)}; `d2-balance eval --json` "
                "and training runs (inference/evaluation_*.json) write such files"
            )
        found = cls(**{name: data[name] for name in (*names, *later) if name in data})
        found.results = {task: _with_nan(metrics) for task, metrics in found.results.items()}
        found.classes = {name: _with_nan(record) for name, record in found.classes.items()}
        return found


def class_records(
    class_ids: Sequence[int],
    names: Sequence[str],
    groups: Sequence[str | None],
    counts: Sequence[int | None],
    instances: Sequence[int],
    tables: Mapping[str, APTable],
) -> Records:
    """One record per class.

    Args:
        class_ids: (K,) category ids; added to a name that two classes have.
        names: (K,) class names.
        groups: (K,) "r", "c", "f", or None where unknown.
        counts: (K,) training images that hold the class, or None where unknown.
        instances: (K,) ground truths in the evaluated set.
        tables: AP by task.

    Returns:
        class name to {"group", "train_image_count", "instances", "AP", "AP50"} and, for other
        tasks than boxes, {"AP_segm", "AP50_segm"}. AP is in percent, NaN without ground truth.
    """
    twins = Counter(names)
    names = [
        f"{name} (id {i})" if twins[name] > 1 else name
        for i, name in zip(class_ids, names, strict=True)
    ]
    records: Records = {
        name: {"group": group, "train_image_count": count, "instances": number}
        for name, group, count, number in zip(names, groups, counts, instances, strict=True)
    }
    for task, table in tables.items():
        suffix = "" if task == "bbox" else f"_{task}"
        for key, values in (("AP", table.by_class()), ("AP50", table.by_class(iou=0.5))):
            for name, value in zip(names, values, strict=True):
                records[name][key + suffix] = float(value * 100)
    return records


def write_per_class(records: Records, stem: str) -> None:
    """Write `<stem>.json` (NaN as null) and `<stem>.csv` (NaN as an empty field), atomically."""
    _write_json(_without_nan(records), f"{stem}.json")
    write_csv(records, f"{stem}.csv")


def write_csv(records: Records, path: str) -> None:
    """Write one line per class to `path`, NaN as an empty field, atomically."""
    columns = ["class", *next(iter(records.values()), {})]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows({"class": n, **record} for n, record in _without_nan(records).items())


def read_per_class(path: str) -> Records:
    """Records of a `per_class_ap_*.json`, null AP as NaN again.

    Raises:
        ValueError: a file that is no JSON object of class records.
    """
    records = read_json(path)
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise ValueError(f"{path}: must be an object of class name to record")
    return {name: _with_nan(record) for name, record in records.items()}


def is_missing(value: float | None) -> bool:
    """Whether a figure could not be measured."""
    return value is None or math.isnan(value)


def _write_json(content: Mapping[str, Any], path: str) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)


def _with_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None and k.startswith("AP") else v for k, v in figures.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
