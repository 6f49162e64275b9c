"""The figures of one evaluation, and the JSON file that carries them."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from d2_balance.utils.files import atomic_path, read_json

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
TASKS = {"bbox": "box", "segm": "mask"}
"""Tasks, and what tables call them."""


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
        results: task ("bbox", "segm") to AP, AP50, AP75, APs, APm, APl, APr, APc, APf.
        classes: class name to record, see `class_records`.
        notes: why figures are NaN, and what was left out.
        truth, predictions: the files it was made from, for intervals of a comparison; "" where a
            reader cannot have them.
    """

    dataset: str
    train: str
    rules: str
    max_dets: int
    images: int
    detections: int
    results: dict[str, dict[str, float]]
    classes: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    truth: str = ""
    predictions: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same fields as a JSON object, NaN as null."""
        return _without_nan(vars(self))

    def write(self, path: str) -> None:
        """Write the figures to `path`, atomically."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.as_json(), file, indent=1, allow_nan=False)

    @classmethod
    def read(cls, path: str) -> "Evaluation":
        """Read what `write` wrote.

        Raises:
            ValueError: a file that is missing or holds something else, naming the field.
        """
        data = read_json(path)
        names = [f.name for f in fields(cls) if f.name not in ("truth", "predictions")]
        lacking = [n for n in names if not isinstance(data, dict) or n not in data]
        if lacking:
            raise ValueError(
                f"{path}: no evaluation: it lacks {', '.join(lacking)}; `d2-balance eval --json` "
                "and training runs (inference/evaluation_*.json) write such files"
            )
        files = {key: data[key] for key in ("truth", "predictions") if key in data}
        found = cls(**{name: data[name] for name in names}, **files)
        for metrics in found.results.values():
            metrics.update({k: math.nan if v is None else v for k, v in metrics.items()})
        for record in found.classes.values():
            record.update(
                {k: math.nan for k, v in record.items() if v is None and k.startswith("AP")}
            )
        return found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
