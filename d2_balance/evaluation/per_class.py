"""AP by class: records, and the files that carry them."""

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence

from d2_balance.utils.files import atomic_path

from .matching import APTable


def class_records(
    class_ids: Sequence[int],
    names: Sequence[str],
    groups: Sequence[str | None],
    counts: Sequence[int | None],
    instances: Sequence[int],
    tables: dict[str, APTable],
) -> dict[str, dict]:
    """One record per class.

    Args:
        class_ids: (K,) category ids; added to a name that two classes have.
        names: (K,) class names.
        groups: (K,) "r", "c", "f", or None where unknown.
        counts: (K,) training images that hold the class, or None where unknown.
        instances: (K,) ground truths in the evaluated set.
        tables: AP by task.

    Returns:
        class name to {"group", "train_image_count", "instances", "AP", "AP50"} and, for masks,
        {"AP_segm", "AP50_segm"}. AP is in percent, NaN without ground truth.
    """
    twins = Counter(names)
    names = [
        f"{name} (id {i})" if twins[name] > 1 else name
        for i, name in zip(class_ids, names, strict=True)
    ]
    records = {
        name: {"group": group, "train_image_count": count, "instances": number}
        for name, group, count, number in zip(names, groups, counts, instances, strict=True)
    }
    for task, table in tables.items():
        suffix = "" if task == "bbox" else f"_{task}"
        for key, values in (("AP", table.by_class()), ("AP50", table.by_class(iou=0.5))):
            for name, value in zip(names, values, strict=True):
                records[name][key + suffix] = float(value * 100)
    return records


def write_per_class(records: dict[str, dict], stem: str) -> None:
    """Write `<stem>.json` (NaN as null) and `<stem>.csv` (NaN as an empty field), atomically."""
    clean = {
        name: {k: None if _is_nan(v) else v for k, v in record.items()}
        for name, record in records.items()
    }
    with atomic_path(f"{stem}.json") as path, open(path, "w") as f:
        json.dump(clean, f, indent=1, allow_nan=False)
    write_csv(records, f"{stem}.csv")


def write_csv(records: dict[str, dict], path: str) -> None:
    """Write one line per class to `path`, NaN as an empty field, atomically."""
    columns = ["class", *next(iter(records.values()), {})]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        for name, record in records.items():
            clean = {k: None if _is_nan(v) else v for k, v in record.items()}
            writer.writerow({"class": name, **clean})


def read_per_class(path: str) -> dict[str, dict]:
    """Records of a `per_class_ap_*.json`, null AP as NaN again.

    Raises:
        ValueError: a file that is no JSON object of class records.
    """
    try:
        with open(path) as f:
            records = json.load(f)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise ValueError(f"{path}: expected an object of class name to record")
    return {
        name: {k: math.nan if v is None and k.startswith("AP") else v for k, v in record.items()}
        for name, record in records.items()
    }


def _is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
