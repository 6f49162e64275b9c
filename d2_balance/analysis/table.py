"""A dataset as columns: what an analysis counts.

D: images, M: objects, K: classes, L: image-level labels. Boxes are x, y, width, height in pixels of
the file's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode

from d2_balance.data.annotations import image_places
from d2_balance.data.checks.annotations import find_bad_annotations
from d2_balance.data.checks.structure import category_name
from d2_balance.data.class_counts import ClassCounts
from d2_balance.data.groups import GROUPS

_ROUND = 100  # hundredths of a pixel, to which two boxes are the same
DUPLICATE = "duplicate: the same class and box once more in the image"
EMPTY = "image without objects"
EMPTY_VERIFIED = "image without objects, but with classes verified to be absent"
CROWDS_ONLY = "image with crowds only"
UNSEEN = "class without an object"


@dataclass(frozen=True, eq=False)
class DataTable:
    """Images and objects of one dataset; broken annotations are left out and named in `problems`.

    Attributes:
        name: what the user called it.
        class_names: K names.
        file_groups: K letters r, c, f of the file, or None.
        sizes: (D, 2) int64 height and width.
        image: (M,) int64 index of each object's image.
        label: (M,) int64 in [0, K).
        boxes: (M, 4) float64.
        crowd: (M,) bool, not trained on.
        masks: number of objects that have one, crowds left out.
        absent: (L, 2) int64 image and class of every absence that was verified; None where the
            data have no such labels.
        not_exhaustive: the same of classes that are present and not completely marked.
        files: D lists of places below the image directory where an image may lie; empty where the
            data say nothing of it.
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
    masks: int
    absent: np.ndarray | None = None
    not_exhaustive: np.ndarray | None = None
    files: list[list[str]] = field(default_factory=list)
    problems: dict[str, list] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def statistics(self, filter_empty: bool = True) -> ClassCounts:
        """Class counts as a training sees them.

        Args:
            filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS; True leaves out images without an
                object to train on.

        Raises:
            ValueError: no image is left.
        """
        kept = len(self.kept_images(filter_empty))
        if not kept:
            raise ValueError(f"{self.name}: no image has an object to train on")
        pairs = self.image_classes()
        return ClassCounts(
            torch.from_numpy(np.bincount(pairs[:, 1], minlength=self.num_classes)),
            torch.from_numpy(np.bincount(self.label[~self.crowd], minlength=self.num_classes)),
            kept,
            self.class_names,
            self.file_groups,
        )

    def kept_images(self, filter_empty: bool) -> np.ndarray:
        """Indices of the images that a training sees, ascending."""
        if filter_empty:
            return np.unique(self.image[~self.crowd])
        return np.arange(len(self.sizes))

    def image_classes(self, crowds: bool = False) -> np.ndarray:
        """(P, 2) every image with every class that it shows, once."""
        kept = slice(None) if crowds else ~self.crowd
        pairs = np.unique(self.image[kept] * self.num_classes + self.label[kept])
        return np.stack(np.divmod(pairs, self.num_classes), axis=1)

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
        crowd = [bool(a.get("iscrowd") or a.get("ignore")) for _, a in kept]
        groups = tuple(c.get("frequency") for c in categories)
        report = findings.report
        problems = {f"left out: {reason}": ids for reason, ids in report.skipped.items()}
        if report.clipped:
            problems["box sticks out of its image and is clipped"] = list(report.clipped)
        if report.trimmed:
            problems["mask with broken polygons, which are left out"] = list(report.trimmed)
        table = cls(
            name,
            tuple(category_name(c) for c in categories),
            groups if set(groups) <= set(GROUPS) else None,
            np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2),
            np.array([image_index[a["image_id"]] for _, a in kept], dtype=np.int64),
            np.array([class_index[a["category_id"]] for _, a in kept], dtype=np.int64),
            _boxes([findings.boxes.get(n, a["bbox"]) for n, a in kept]),
            np.array(crowd, dtype=bool),
            sum(
                bool(a.get("segmentation")) for (_, a), c in zip(kept, crowd, strict=True) if not c
            ),
            _image_labels(images, "neg_category_ids", class_index),
            _image_labels(images, "not_exhaustive_category_ids", class_index),
            [image_places(image) for image in images],
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
        class_index: Mapping[int, int] | None = None,
        file_groups: Sequence[str] | None = None,
    ) -> DataTable:
        """Columns of Detectron2's standard dicts, for sets without a COCO- or LVIS-style file.

        Args:
            name: for headings.
            records: the dicts; each must have height and width, and its objects boxes.
            class_names: K names.
            class_index: from the ids of image-level labels to classes; None: class = id - 1.
            file_groups: K letters r, c, f, or None.
        """
        objects = [(n, a) for n, record in enumerate(records) for a in record["annotations"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for _, a in objects]
        class_index = class_index or {n + 1: n for n in range(len(class_names))}
        table = cls(
            name,
            tuple(class_names),
            None if file_groups is None else tuple(file_groups),
            np.array([(r["height"], r["width"]) for r in records], dtype=np.int64).reshape(-1, 2),
            np.array([n for n, _ in objects], dtype=np.int64),
            np.array([a["category_id"] for _, a in objects], dtype=np.int64),
            _boxes(boxes),
            np.array([bool(a.get("iscrowd")) for _, a in objects], dtype=bool),
            sum(bool(a.get("segmentation")) and not a.get("iscrowd") for _, a in objects),
            _image_labels(records, "neg_category_ids", class_index),
            _image_labels(records, "not_exhaustive_category_ids", class_index),
        )
        ids = [r.get("image_id", n) for n, r in enumerate(records)]
        table._find_more([f"object {n} of image {ids[i]}" for n, (i, _) in enumerate(objects)], ids)
        return table

    def _find_more(self, annotation_ids: list, image_ids: list) -> None:
        """Duplicates, empty images and classes without an object."""
        columns = [self.image, self.label, *np.rint(self.boxes * _ROUND).astype(np.int64).T]
        order = np.lexsort(columns[::-1])  # stable: of equal rows the first one stays the first
        again = np.ones(max(len(order) - 1, 0), dtype=bool)
        for column in columns:
            again &= np.diff(column[order]) == 0
        self._note(DUPLICATE, annotation_ids, np.sort(order[1:][again]))
        trained = np.bincount(self.image[~self.crowd], minlength=len(self.sizes)) > 0
        marked = np.bincount(self.image, minlength=len(self.sizes)) > 0
        verified = np.zeros(len(self.sizes), dtype=bool)
        if self.absent is not None:
            verified[self.absent[:, 0]] = True
        self._note(EMPTY, image_ids, np.flatnonzero(~marked & ~verified))
        self._note(EMPTY_VERIFIED, image_ids, np.flatnonzero(~marked & verified))
        self._note(CROWDS_ONLY, image_ids, np.flatnonzero(marked & ~trained))
        seen = np.bincount(self.label[~self.crowd], minlength=self.num_classes)
        self._note(UNSEEN, self.class_names, np.flatnonzero(seen == 0))

    def _note(self, text: str, ids: Sequence, places: np.ndarray) -> None:
        if len(places):
            self.problems[text] = [ids[n] for n in places]


def _boxes(boxes: list) -> np.ndarray:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _image_labels(
    images: Sequence[dict], key: str, class_index: Mapping[int, int]
) -> np.ndarray | None:
    """(L, 2) image and class of every label under `key`, each once; None where no image has it."""
    if not any(key in image for image in images):
        return None
    pairs = {(n, class_index[c]) for n, i in enumerate(images) for c in i.get(key) or ()}
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
