"""A data set as columns: what an analysis counts.

D: images, M: objects, K: classes. Boxes are x, y, width, height in pixels of the file's pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.annotation_checks import find_bad_annotations
from ..data.groups import GROUPS
from ..data.statistics import ClassStatistics
from ..data.validation import category_name

_ROUND = 2  # decimals by which two boxes are the same


@dataclass(frozen=True, eq=False)
class DataTable:
    """Images and objects of one data set; broken annotations are left out and named in `problems`.

    Attributes:
        name: what the user called it.
        class_names: K names.
        file_groups: K letters r, c, f of the file, or None.
        sizes: (D, 2) int64 height and width.
        image: (M,) int64 index of each object's image.
        label: (M,) int64 in [0, K).
        boxes: (M, 4) float64.
        crowd: (M,) bool, not trained on.
        absent: (D,) int64 classes verified to be absent; None where the file has no such labels.
        not_exhaustive: (D,) int64 classes present but not completely marked; None likewise.
        problems: what is wrong, to the ids (of images or annotations) it was found in.
    """

    name: str
    class_names: tuple[str, ...]
    file_groups: tuple[str, ...] | None
    sizes: np.ndarray
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    absent: np.ndarray | None = None
    not_exhaustive: np.ndarray | None = None
    problems: dict[str, list] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def statistics(self, filter_empty: bool = True) -> ClassStatistics:
        """Class counts as a training sees them.

        Args:
            filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS; True leaves out images without an
                object to train on.

        Raises:
            ValueError: no image is left.
        """
        label, image = self.label[~self.crowd], self.image[~self.crowd]
        pairs = np.unique(image * max(self.num_classes, 1) + label)
        kept = len(np.unique(image)) if filter_empty else len(self.sizes)
        if not kept:
            raise ValueError(f"{self.name}: no image has an object to train on")
        return ClassStatistics(
            torch.from_numpy(np.bincount(pairs % self.num_classes, minlength=self.num_classes)),
            torch.from_numpy(np.bincount(label, minlength=self.num_classes)),
            kept,
            self.class_names,
            self.file_groups,
        )

    @classmethod
    def from_json(cls, name: str, path: str, data: dict[str, Any]) -> DataTable:
        """Columns of a COCO- or LVIS-style file that `check_structure` has passed.

        Args:
            name: for headings.
            path: of the file, for messages.
            data: its content.
        """
        images, annotations = data["images"], data["annotations"]
        categories = sorted(data["categories"], key=lambda c: c["id"])
        sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in images}
        findings = find_bad_annotations(annotations, sizes, path)
        kept = [(n, a) for n, a in enumerate(annotations) if n not in findings.skip]
        image_index = {i["id"]: n for n, i in enumerate(images)}
        class_index = {c["id"]: n for n, c in enumerate(categories)}
        boxes = [findings.boxes.get(n, a["bbox"]) for n, a in kept]
        groups = tuple(c.get("frequency") for c in categories)
        problems = {f"left out: {reason}": ids for reason, ids in findings.report.skipped.items()}
        if findings.report.clipped:
            problems["box sticks out of its picture and is clipped"] = findings.report.clipped
        table = cls(
            name,
            tuple(category_name(c) for c in categories),
            groups if set(groups) <= set(GROUPS) else None,
            np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2),
            np.array([image_index[a["image_id"]] for _, a in kept], dtype=np.int64),
            np.array([class_index[a["category_id"]] for _, a in kept], dtype=np.int64),
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array([bool(a.get("iscrowd") or a.get("ignore")) for _, a in kept], dtype=bool),
            _label_counts(images, "neg_category_ids"),
            _label_counts(images, "not_exhaustive_category_ids"),
            problems,
        )
        table._find_more([a["id"] for _, a in kept], [i["id"] for i in images])
        return table

    @classmethod
    def from_dicts(
        cls,
        name: str,
        records: Sequence[dict[str, Any]],
        class_names: Sequence[str],
        file_groups: Sequence[str] | None = None,
    ) -> DataTable:
        """Columns of Detectron2's standard dicts, for sets without a COCO- or LVIS-style file.

        Raises:
            ValueError: a record without height and width.
        """
        from detectron2.structures import BoxMode

        for record in records:
            if "height" not in record or "width" not in record:
                raise ValueError(
                    f"{name}: {record.get('file_name', 'a picture')} has no height and width"
                )
        objects = [(n, a) for n, record in enumerate(records) for a in record["annotations"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for _, a in objects]
        table = cls(
            name,
            tuple(class_names),
            None if file_groups is None else tuple(file_groups),
            np.array([(r["height"], r["width"]) for r in records], dtype=np.int64).reshape(-1, 2),
            np.array([n for n, _ in objects], dtype=np.int64),
            np.array([a["category_id"] for _, a in objects], dtype=np.int64),
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array([bool(a.get("iscrowd")) for _, a in objects], dtype=bool),
            _label_counts(records, "neg_category_ids"),
            _label_counts(records, "not_exhaustive_category_ids"),
        )
        ids = [r.get("image_id", n) for n, r in enumerate(records)]
        table._find_more(list(range(len(objects))), ids)
        return table

    def _find_more(self, annotation_ids: list, image_ids: list) -> None:
        """Duplicates, empty pictures and classes without an object."""
        columns = [self.image, self.label, *self.boxes.round(_ROUND).T]
        rows = np.stack(columns, axis=1) if len(self.image) else np.zeros((0, 6))
        _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            again = np.setdiff1d(np.arange(len(rows)), first)
            text = "duplicate: the same class and box once more in the picture"
            self.problems[text] = [annotation_ids[n] for n in again]
        empty = np.setdiff1d(np.arange(len(self.sizes)), self.image[~self.crowd])
        if self.absent is not None:
            labelled = [n for n in empty if self.absent[n]]
            empty = [n for n in empty if not self.absent[n]]
            if labelled:
                text = "picture without objects but with classes verified to be absent"
                self.problems[text] = [image_ids[n] for n in labelled]
        if len(empty):
            self.problems["picture without objects"] = [image_ids[n] for n in empty]
        seen = Counter(self.label[~self.crowd].tolist())
        unseen = [n for k, n in enumerate(self.class_names) if not seen[k]]
        if unseen:
            self.problems["class without an object"] = unseen


def _label_counts(images: Sequence[dict], key: str) -> np.ndarray | None:
    if not any(key in image for image in images):
        return None
    return np.array([len(image.get(key) or ()) for image in images], dtype=np.int64)
