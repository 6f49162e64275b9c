"""Detectron2's standard dicts, made from the columns of an annotation file when they are asked for.

D: images of a dataset, M: objects. Worker processes and ranks share the mapped columns; no dict is
kept.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload
from urllib.parse import unquote

import numpy as np

from d2_balance.utils.names import listed

from .annotations import Annotations, Counts, count_classes, read_annotations
from .checks.annotations import MASK_PROBLEMS, NO_MASK, POLYGONS, RLE, clip_boxes, remember
from .columns import IMAGE_LABEL_KEYS, category_name

BAD_MASK = "bad_mask"
"""Key of an annotation with a sound box: what is wrong with its mask, which it has no more."""

logger = logging.getLogger(__name__)
_COLUMNS = ("category", "crowd", "mask", "bad_mask")  # of objects, besides their record


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of D records as columns.

    Attributes:
        image: (M,) int64 index of the record of each, ascending.
        category: (M,) int64 class index.
        crowd: (M,) bool, not trained on.
        mask: (M,) uint8 `NO_MASK`, `POLYGONS` or `RLE`.
        bad_mask: (M,) bool, objects whose mask cannot be used. Their records have no
            `segmentation` and the reason under `BAD_MASK`.
        size: (D, 2) int64 height and width; None where a record does not say.
        labelled: (D,) bool, records with image-level labels.
        images: D.
    """

    image: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    mask: np.ndarray
    bad_mask: np.ndarray
    size: np.ndarray | None
    labelled: np.ndarray
    images: int

    def choose(self, chosen: np.ndarray, category: np.ndarray | None = None) -> Objects:
        """Some of the objects, (M,) bool; `category` replaces the classes of all."""
        found = self if category is None else dataclasses.replace(self, category=category)
        columns = {name: getattr(found, name)[chosen] for name in ("image", *_COLUMNS)}
        return dataclasses.replace(self, **columns)

    def of_records(self, records: np.ndarray) -> Objects:
        """The objects of some records, (n,) ascending indices."""
        place = np.full(self.images, -1)
        place[records] = np.arange(len(records))
        chosen = place[self.image] >= 0
        return dataclasses.replace(
            self.choose(chosen),
            image=place[self.image[chosen]],
            size=None if self.size is None else self.size[records],
            labelled=self.labelled[records],
            images=len(records),
        )

    def counts(self, num_classes: int) -> Counts:
        """Count what is trained on."""
        kept = ~self.crowd
        return count_classes(self.image[kept], self.category[kept], num_classes, self.images)

    def with_objects(self) -> np.ndarray:
        """(D,) bool, records with an object to train on."""
        return np.bincount(self.image[~self.crowd], minlength=self.images) > 0


class Records(Sequence[dict[str, Any]]):
    """A list of D records that are made when they are asked for.

    Args:
        make: the record of an index in [0, D).
        objects: of all records.

    Attributes:
        sources: the dataset of each record, where they are of several.
    """

    def __init__(self, make: Callable[[int], dict[str, Any]], objects: Objects) -> None:
        self._make, self.objects = make, objects
        self.sources: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.objects.images

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._make(int(index) % len(self))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._make, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


Change = Callable[[int, dict[str, Any]], dict[str, Any]]
"""From the index of a record and the record to a new one."""


def changed(records: Sequence[dict[str, Any]], change: Change) -> Sequence[dict[str, Any]]:
    """Records with fields that `change` adds to each; the objects stay as they are."""
    if isinstance(records, Records):
        return lazily(records, change, records.objects)
    return [change(index, record) for index, record in enumerate(records)]


def lazily(records: Sequence[dict[str, Any]], change: Change, objects: Objects) -> Records:
    """Records that are changed when they are asked for, and have other `objects` then."""
    return Records(partial(_changed, records, change), objects)


def _changed(records: Sequence[dict[str, Any]], change: Change, index: int) -> dict[str, Any]:
    return change(index, records[index])


def objects_of(records: Sequence[Mapping[str, Any]]) -> Objects:
    """The objects of Detectron2's standard dicts; of `Records` without making one."""
    if isinstance(records, Records):
        return records.objects
    annotations = [r.get("annotations", ()) for r in records]
    length = np.fromiter(map(len, annotations), np.int64, len(annotations))
    every = [a for own in annotations for a in own]
    sized = all("height" in r and "width" in r for r in records)
    size = [(r["height"], r["width"]) for r in records] if sized else None
    return Objects(
        np.repeat(np.arange(len(length)), length),
        np.fromiter((a["category_id"] for a in every), np.int64, len(every)),
        np.fromiter((bool(a.get("iscrowd", 0)) for a in every), bool, len(every)),
        np.fromiter((_kind(a.get("segmentation")) for a in every), np.uint8, len(every)),
        np.fromiter((BAD_MASK in a for a in every), bool, len(every)),
        None if size is None else np.array(size, dtype=np.int64).reshape(-1, 2),
        np.fromiter((any(r.get(k) for k in IMAGE_LABEL_KEYS) for r in records), bool, len(length)),
        len(length),
    )


def _kind(segmentation: Any) -> int:
    if segmentation is None:
        return NO_MASK
    return POLYGONS if isinstance(segmentation, list) else RLE


def without_bad_masks(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Records for a training of masks: objects whose mask cannot be used are left out."""
    objects = objects_of(records)
    if not objects.bad_mask.any():
        return records
    if isinstance(records, Records):
        return lazily(records, _drop_bad_masks, objects.choose(~objects.bad_mask))
    return changed(records, _drop_bad_masks)


def _drop_bad_masks(_: int, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"annotations": [a for a in record["annotations"] if BAD_MASK not in a]}


def subset(records: Sequence[dict[str, Any]], chosen: np.ndarray) -> Sequence[dict[str, Any]]:
    """Some of the records, (n,) ascending indices; `Records` stay lazy."""
    if isinstance(records, Records):
        return Records(partial(_chosen, records, chosen), records.objects.of_records(chosen))
    return [records[i] for i in chosen.tolist()]


def _chosen(records: Records, chosen: np.ndarray, index: int) -> dict[str, Any]:
    return records[int(chosen[index])]


def join(parts: Sequence[Sequence[dict[str, Any]]]) -> Sequence[dict[str, Any]]:
    """Records one after the other; lazy where all parts are `Records`."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, Records) for part in parts):
        return [record for part in parts for record in part]
    found = [objects_of(part) for part in parts]
    start = np.concatenate([[0], np.cumsum([o.images for o in found])])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(o, name) for o in found]) for name in (*_COLUMNS, "labelled")
    }
    sizes = [o.size for o in found if o.size is not None]
    objects = Objects(
        image=np.concatenate([o.image + s for o, s in zip(found, start, strict=False)]),
        size=np.concatenate(sizes) if len(sizes) == len(found) else None,
        images=int(start[-1]),
        **columns,
    )
    return Records(partial(_of_parts, parts, start), objects)


def _of_parts(
    parts: Sequence[Sequence[dict[str, Any]]], start: np.ndarray, index: int
) -> dict[str, Any]:
    part = int(np.searchsorted(start, index, side="right")) - 1
    return parts[part][index - int(start[part])]


def load_json(json_file: str, image_root: str, name: str | None = None) -> Records:
    """Load a COCO- or LVIS-style file as Detectron2's standard dicts.

    Works without ``segmentation``, ``coco_url``, ``frequency`` and contiguous ids. Images are
    found by ``file_name``, else by the last two parts of ``coco_url``, else by its last part,
    whichever exists below ``image_root``. Objects with ``ignore: 1`` are treated as crowds.

    Args:
        json_file: the annotation file.
        image_root: the directory of the images.
        name: a registered name. If given, the metadata of that name get thing_classes,
            thing_dataset_id_to_contiguous_id, class_image_count and, where the file has them,
            class_group (K letters of "rcf") and class_synset (K texts or None).

    Returns:
        One dict per image, by ascending image id: file_name, height, width, image_id,
        annotations (bbox XYWH_ABS in pixels, category_id in [0, K), segmentation and iscrowd where
        the file has them), and neg_category_ids / not_exhaustive_category_ids (raw ids) where the
        file has them. An object with a bad mask has none.

    Raises:
        ValueError: for a file that cannot be trained on, or missing images. Single bad
            annotations are left out and reported, see `bad_annotations`.
    """
    annotations = read_annotations(json_file)
    records = file_records(annotations, image_root)
    if name is not None:
        from detectron2.data import MetadataCatalog

        remember(name, annotations.report)
        MetadataCatalog.get(name).set(**_metadata(annotations))
    logger.info("Loaded %d images from %s", len(records), json_file)
    return records


def file_records(annotations: Annotations, image_root: str) -> Records:
    """Records of a file, see `load_json`.

    Raises:
        ValueError: images are missing.
    """
    make = _FileRecord(annotations, image_root)
    chosen = make.chosen
    bad_mask = annotations.mask_problem[chosen] >= 0
    listed = np.diff(annotations.negative.offsets) + np.diff(annotations.not_exhaustive.offsets)
    objects = Objects(
        make.position[annotations.image[chosen]],
        annotations.category[chosen].astype(np.int64),
        annotations.crowd[chosen] | annotations.ignore[chosen],
        np.where(bad_mask, NO_MASK, annotations.mask[chosen]),
        bad_mask,
        annotations.size[make.order],
        listed[make.order] > 0,
        len(make.order),
    )
    return Records(make, objects)


class _FileRecord:
    """Makes the record of an image.

    Attributes:
        order: (D,) image of each record, by ascending id.
        position: (D,) record of each image.
        chosen: (M,) usable annotations, record by record.
    """

    def __init__(self, annotations: Annotations, image_root: str) -> None:
        self._annotations, self._root = annotations, image_root
        self._files = find_images(annotations, image_root)
        ids = annotations.image_id.tolist()
        order = sorted(range(len(ids)), key=lambda n: (isinstance(ids[n], str), ids[n]))
        self.order = np.array(order, dtype=np.int64)
        self.position = np.empty_like(self.order)
        self.position[self.order] = np.arange(len(order))
        usable = np.flatnonzero(annotations.usable)
        record = self.position[annotations.image[usable]]
        by_record = np.argsort(record, kind="stable")
        self.chosen = usable[by_record]
        self._starts = np.searchsorted(record[by_record], np.arange(len(order) + 1))

    def __reduce__(self) -> tuple:
        return _made_again, (self._annotations.path, self._root)

    def __call__(self, index: int) -> dict[str, Any]:
        source = self._annotations
        image = int(self.order[index])
        height, width = source.size[image].tolist()
        record = {"file_name": self._files[image], "height": height, "width": width}
        record["image_id"] = source.image_id[image : image + 1].tolist()[0]
        for key, labels in zip(
            IMAGE_LABEL_KEYS, (source.negative, source.not_exhaustive), strict=True
        ):
            if labels.given[image]:
                record[key] = source.category_id[labels.of(image)].tolist()
        chosen = self.chosen[self._starts[index] : self._starts[index + 1]]
        record["annotations"] = [self._annotation(i) for i in chosen.tolist()]
        return record

    def _annotation(self, index: int) -> dict[str, Any]:
        from detectron2.structures import BoxMode

        source = self._annotations
        box = source.box[index].tolist()
        if source.clipped[index]:
            size = source.size[source.image[index]][None]
            box = clip_boxes(source.box[index][None], size)[0].tolist()
        elif source.integral[index]:
            box = [int(v) for v in box]  # Detectron2 moves integers otherwise than floats
        result = {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": int(source.category[index]),
        }
        if source.marked[index] or source.ignore[index]:
            result["iscrowd"] = int(source.crowd[index] or source.ignore[index])
        segmentation = source.segmentation(index)
        if segmentation:
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                import pycocotools.mask as mask_util

                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            result["segmentation"] = segmentation
        elif source.mask_problem[index] >= 0:
            result[BAD_MASK] = MASK_PROBLEMS[source.mask_problem[index]]
        return result


def _made_again(path: str, image_root: str) -> _FileRecord:
    return _FileRecord(read_annotations(path), image_root)


def _metadata(annotations: Annotations) -> dict[str, Any]:
    categories = annotations.categories
    counts = [category.get("image_count") for category in categories]
    if not all(isinstance(count, int) for count in counts):
        counts = annotations.class_counts().image_count.tolist()
    ids = annotations.category_id.tolist()
    metadata = {
        "thing_classes": list(map(category_name, categories)),
        "thing_dataset_id_to_contiguous_id": {raw: index for index, raw in enumerate(ids)},
        "class_image_count": [
            {"id": raw, "image_count": count} for raw, count in zip(ids, counts, strict=True)
        ],
    }
    if any(category.get("synset") for category in categories):
        metadata["class_synset"] = [category.get("synset") for category in categories]
    if annotations.file_groups is not None:
        metadata["class_group"] = list(annotations.file_groups)
    return metadata


def find_images(annotations: Annotations, image_root: str) -> list[str]:
    """Path of every image of a file.

    Raises:
        ValueError: with the number of missing images and the first names.
    """
    places = [annotations.image_places(n) for n in range(len(annotations.image_id))]
    for image, own in enumerate(places):
        if not own:
            raise ValueError(
                f"{annotations.path}: image {annotations.image_id[image]} has neither 'file_name' "
                "nor 'coco_url'; one of them must be given"
            )
    found = ImageFinder(image_root).find_all(places)
    missing = [own[0] for own, path in zip(places, found, strict=True) if path is None]
    if missing:
        raise ValueError(
            f"{annotations.path}: {len(missing)} of {len(annotations.image_id)} images are missing "
            f"below {image_root}: {listed(missing)}; the image directory must hold every file_name "
            "(or the last one or two parts of coco_url)"
        )
    return [path for path in found if path is not None]


class ImageFinder:
    """Looks images up below a directory; each directory is listed once.

    A name that is written in another way than the file system has it is found all the same where
    it is the only one: backslashes of Windows, %20, another form of Unicode, another case, the last
    directories of the root in front of it.

    Args:
        root: the image directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._listed: dict[str, tuple[frozenset[str], dict[str, str | None]]] = {}

    def find_all(self, places: Sequence[Sequence[str]]) -> list[str | None]:
        """Path of every image, see `find`.

        Directories that are not there (of a server's uploads) are left out of the names, if no two
        images have one name without them.
        """
        found = [self.find(own) for own in places]
        lost = [n for n, path in enumerate(found) if path is None and places[n]]
        if lost:
            names: dict[str, set[str]] = {}
            for own in filter(None, places):
                names.setdefault(_base(own[0]), set()).add(own[0])
            bases = [_base(places[n][0]) for n in lost]
            flat = [self._names(self._root)[1].get(base) for base in bases]
            if all(flat) and all(len(names[base]) == 1 for base in bases):
                for n, name in zip(lost, flat, strict=True):
                    found[n] = os.path.join(self._root, str(name))
        return found

    def find(self, places: Sequence[str]) -> str | None:
        """Path of an image that lies at one of some places below the directory, or None."""
        for place in places:
            directory, base = os.path.split(os.path.join(self._root, place))
            if base in self._names(directory)[0]:
                return os.path.join(directory, base)
        for place in places:
            plain = unquote(place).replace("\\", "/")
            for below in (plain, self._below_root(plain)):
                directory, base = os.path.split(os.path.join(self._root, below))
                name = self._names(directory)[1].get(_plain(base))
                if name is not None:
                    return os.path.join(directory, name)
        return None

    def _below_root(self, place: str) -> str:
        """A place that begins with the last directories of the root, without them."""
        parts = os.path.normpath(place).split("/")
        root = os.path.abspath(self._root).split(os.sep)
        longest = min(len(parts) - 1, len(root))
        overlap = next((n for n in range(longest, 0, -1) if root[-n:] == parts[:n]), 0)
        return "/".join(parts[overlap:])

    def _names(self, directory: str) -> tuple[frozenset[str], dict[str, str | None]]:
        """Names in a directory, and names by their plain form; None for one of several."""
        if directory not in self._listed:
            from detectron2.utils.file_io import PathManager

            found = frozenset(PathManager.ls(directory) if PathManager.isdir(directory) else ())
            names: dict[str, str | None] = {}
            for name in found:
                plain = _plain(name)
                names[plain] = None if plain in names else name
            self._listed[directory] = found, names
        return self._listed[directory]


def _base(place: str) -> str:
    """The last part of a path or URL, however it is written."""
    return _plain(unquote(place).replace("\\", "/").split("/")[-1])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
