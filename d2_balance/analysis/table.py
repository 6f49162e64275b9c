"""A dataset as columns: what an analysis counts.

D: images, M: objects, K: classes, L: image-level labels. Boxes are x, y, width, height in pixels of
the file's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from d2_balance.data.annotations import Annotations, count_classes
from d2_balance.data.checks.annotations import NO_MASK
from d2_balance.data.groups import LVIS_CUTS, groups_from_counts
from d2_balance.utils.arrays import unique

if TYPE_CHECKING:
    from d2_balance.data.class_counts import ClassCounts

_ROUND = 100  # hundredths of a pixel, to which two boxes are the same
DUPLICATE = "duplicate: the same class and box once more in the image"
EMPTY = "image without objects"
EMPTY_VERIFIED = "image without objects, but with classes verified to be absent"
CROWDS_ONLY = "image with crowds only"
UNSEEN = "class without an object"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Class counts as a training sees them; `ClassCounts` without torch.

    Attributes:
        image_count: (K,) int64 images that show each class.
        instance_count: (K,) int64 objects of each class.
        num_images: number of images.
        class_names: K names.
        file_groups: K letters r, c, f of the file, or None.
    """

    image_count: np.ndarray
    instance_count: np.ndarray
    num_images: int
    class_names: tuple[str, ...]
    file_groups: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def frequency(self) -> np.ndarray:
        """(K,) float64 fraction of the images that show each class."""
        return self.image_count / self.num_images

    def as_class_counts(self) -> ClassCounts:
        """The same with tensors, as models take it."""
        import torch

        from d2_balance.data.class_counts import ClassCounts

        images, objects = map(torch.from_numpy, (self.image_count, self.instance_count))
        return ClassCounts(images, objects, self.num_images, self.class_names, self.file_groups)

    def group(self, cuts: tuple[int, int] | None = None) -> list[str]:
        """Return K letters r, c, f: by cut points, else the file's, else by those of LVIS."""
        if cuts is None and self.file_groups is not None:
            return list(self.file_groups)
        return groups_from_counts(self.image_count.tolist(), cuts or LVIS_CUTS)


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
        hints: sentences about what looks wrong in the file as a whole.
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
    hints: list[str] = field(default_factory=list)
    _pairs: dict[bool, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def statistics(self, filter_empty: bool = True) -> Statistics:
        """Class counts as a training sees them.

        Args:
            filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS; True leaves out images without an
                object to train on.

        Raises:
            ValueError: no image is left.
        """
        kept = len(self.kept_images(filter_empty))
        if not kept:
            crowds = int(self.crowd.sum())
            why = (
                f": {crowds} of {len(self.crowd)} have iscrowd 1 (or ignore 1), as CVAT and "
                "datumaro write masks; set iscrowd to 0"
            )
            raise ValueError(
                f"{self.name}: no image has an object to train on{why if crowds else ''}"
            )
        shown = ~self.crowd
        counts = count_classes(
            self.image[shown], self.label[shown], self.num_classes, len(self.sizes)
        )
        return Statistics(
            counts.image_count, counts.instance_count, kept, self.class_names, self.file_groups
        )

    def kept_images(self, filter_empty: bool) -> np.ndarray:
        """Indices of the images that a training sees, ascending."""
        if filter_empty:
            return unique(self.image[~self.crowd])
        return np.arange(len(self.sizes))

    def image_classes(self, crowds: bool = False) -> np.ndarray:
        """(P, 2) every image with every class that it shows, once."""
        if crowds not in self._pairs:
            kept = slice(None) if crowds else ~self.crowd
            pairs = unique(self.image[kept] * self.num_classes + self.label[kept])
            self._pairs[crowds] = np.stack(np.divmod(pairs, self.num_classes), axis=1)
        return self._pairs[crowds]

    @classmethod
    def from_annotations(cls, name: str, source: Annotations) -> DataTable:
        """Columns of a COCO- or LVIS-style file.

        Args:
            name: for headings.
            source: the file.
        """
        usable = source.usable
        crowd = source.crowd | source.ignore
        report = source.report
        problems = {f"left out: {reason}": ids for reason, ids in report.skipped.items()}
        for reason, ids in report.bad_masks.items():
            problems[f"left out where masks are trained: {reason}"] = ids
        if report.clipped:
            problems["box sticks out of its image and is clipped"] = list(report.clipped)
        if report.trimmed:
            problems["mask with broken polygons, which are left out"] = list(report.trimmed)
        has_mask = (source.mask != NO_MASK) & (source.mask_problem < 0)
        table = cls(
            name,
            tuple(source.class_names.values()),
            source.file_groups,
            source.size,
            source.image[usable].astype(np.int64),
            source.category[usable].astype(np.int64),
            source.training_boxes()[usable],
            crowd[usable],
            int((has_mask & usable & ~crowd).sum()),
            source.negative.pairs() if source.negative.given.any() else None,
            source.not_exhaustive.pairs() if source.not_exhaustive.given.any() else None,
            source.all_image_places(),
            problems,
            list(report.hints),
        )
        table._find_more(source.id[usable].tolist(), source.image_id.tolist())
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
        from detectron2.structures import BoxMode

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
        alike = _alike(columns)
        columns = [column[alike] for column in columns]
        order = np.lexsort(columns[::-1])  # stable: of equal rows the first one stays the first
        again = np.ones(max(len(order) - 1, 0), dtype=bool)
        for column in columns:
            again &= np.diff(column[order]) == 0
        self._note(DUPLICATE, annotation_ids, np.sort(alike[order[1:][again]]))
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


def _alike(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Rows whose hash another row has too: all that are equal, and hardly any that are not."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    in_order = np.sort(mixed)
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    return np.flatnonzero(np.isin(mixed, twice, kind="sort"))


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
