"""The one reader of annotations; `resolve` finds the file of a name.

    truth = read_annotations("my_val.json")
    truth.box[truth.trained()]                         # (n, 4) boxes of what is trained on
    truth.class_counts().image_count                   # (K,) images that show each class
    truth.segmentation(5)                              # mask of annotation 5, decoded now

Files are read once per process and once per machine, see `cache`.

Shapes: I images, A annotations, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import mmap
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import numpy as np

from d2_balance.utils.arrays import unique
from d2_balance.utils.files import read_bytes
from d2_balance.utils.files import read_json as read_json  # imported from here by others

from . import cache
from .checks.annotations import (
    BOX_PROBLEMS,
    MASK_PROBLEMS,
    BadAnnotations,
    clip_boxes,
)
from .columns import (
    IMAGE_LABEL_KEYS,
    ImageLabels,
    Texts,
    category_name,
    has_lvis_marks,
    parse_columns,
)
from .groups import GROUPS

_KEPT = 8  # files whose columns a process keeps at hand


@dataclass(frozen=True)
class Counts:
    """How often each class occurs in one file.

    Attributes:
        image_count: (K,) int64, images that show the class.
        instance_count: (K,) int64, objects of the class.
        images: number of images.
        images_with_objects: of them, those with an object.
    """

    image_count: np.ndarray
    instance_count: np.ndarray
    images: int
    images_with_objects: int


def count_classes(
    image: np.ndarray, category: np.ndarray, num_classes: int, num_images: int
) -> Counts:
    """Count the images and the objects of each class.

    Args:
        image: (M,) index of each object's image.
        category: (M,) class index in [0, K) of each object.
        num_classes: K.
        num_images: number of images, those without objects included.
    """
    pairs = unique(image.astype(np.int64) * num_classes + category)
    return Counts(
        np.bincount(pairs % num_classes, minlength=num_classes),
        np.bincount(category, minlength=num_classes),
        num_images,
        len(unique(image)),
    )


def _places(name: bytes, url: bytes) -> list[str]:
    """Places below the image directory of an image with that file_name and coco_url."""
    parts = url.decode("utf-8", "surrogatepass").split("/")
    places = ["/".join(parts[-2:]), parts[-1]] if url else []
    return [name.decode("utf-8", "surrogatepass"), *places] if name else places


@dataclass(frozen=True, eq=False)
class Annotations:
    """One annotation file as columns, checked. Images and annotations keep the order of the file.

    Attributes:
        name: what the user called it.
        path: the JSON file.
        federated: True for LVIS style.
        categories: K entries of the file by ascending id; class k is `categories[k]`.
        category_id: (K,) int64.
        image_id: (I,) int64, or objects where an id is a string.
        size: (I, 2) int64 height and width in pixels.
        file_name, coco_url: I texts, b"" where the file has none.
        negative, not_exhaustive: classes that are verified to be absent; present and not annotated
            exhaustively. `given` tells images that list them from images that have no such field.
        id: (A,) int64, or objects.
        image: (A,) int32 index in the images.
        category: (A,) int32 class index in [0, K).
        box: (A, 4) float64 x, y, width, height in pixels as in the file; NaN where they are not
            four numbers. `training_boxes` cuts them at the border of the image.
        integral: (A,) bool, boxes of four integers.
        area: (A,) float64 pixels, NaN where the file does not say.
        crowd, ignore: (A,) bool, the fields `iscrowd` and `ignore`.
        marked: (A,) bool, whether there is a field `iscrowd`.
        mask: (A,) uint8 `NO_MASK`, `POLYGONS` or `RLE`: what the file has, sound or not.
        box_problem: (A,) int8 index in `BOX_PROBLEMS`, -1 for a sound box. Where it is not -1 the
            annotation is used for nothing.
        mask_problem: (A,) int8 index in `MASK_PROBLEMS`, -1 for none. Where it is not -1 the box
            is used and the mask is not.
        clipped: (A,) bool, sound boxes that stick out of their image.
        trimmed: (A,) bool, masks that lost broken polygons.
        masks: A texts, the JSON of each sound mask.
        unused_parents: categories that were left out (Roboflow's parents).
        has_keypoints: whether annotations have keypoints, which are not read.
    """

    name: str
    path: str
    federated: bool
    categories: list[dict[str, Any]]
    category_id: np.ndarray
    image_id: np.ndarray
    size: np.ndarray
    file_name: Texts
    coco_url: Texts
    negative: ImageLabels
    not_exhaustive: ImageLabels
    id: np.ndarray
    image: np.ndarray
    category: np.ndarray
    box: np.ndarray
    integral: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    marked: np.ndarray
    mask: np.ndarray
    box_problem: np.ndarray
    mask_problem: np.ndarray
    clipped: np.ndarray
    trimmed: np.ndarray
    masks: Texts
    unused_parents: list[str]
    has_keypoints: bool

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.categories)

    @property
    def class_names(self) -> dict[int, str]:
        """Class name by category id, ascending."""
        return {c["id"]: category_name(c) for c in self.categories}

    @property
    def file_groups(self) -> tuple[str, ...] | None:
        """K letters "r", "c", "f" that the file itself gives, or None."""
        groups: tuple[Any, ...] = tuple(c.get("frequency") for c in self.categories)
        return groups if all(group in tuple(GROUPS) for group in groups) else None

    @property
    def usable(self) -> np.ndarray:
        """(A,) bool, annotations with a sound box."""
        return self.box_problem < 0

    def trained(self, masks: bool = False) -> np.ndarray:
        """(A,) bool, objects that are trained on: usable, neither crowd nor ignored.

        Args:
            masks: whether masks are trained too, which leaves out objects with a bad mask.
        """
        kept = self.usable & ~self.crowd & ~self.ignore
        return kept & (self.mask_problem < 0) if masks else kept

    def training_boxes(self) -> np.ndarray:
        """(A, 4) float64 boxes, those that stick out cut at the border of the image."""
        boxes = self.box.copy()
        at = np.flatnonzero(self.clipped)
        boxes[at] = clip_boxes(self.box[at], self.size[self.image[at]])
        return boxes

    def segmentation(self, index: int) -> Any:
        """The mask of an annotation as in the file (polygons or an RLE dict), None without one."""
        text = self.masks[index]
        return msgspec.json.decode(text) if text else None

    def image_places(self, image: int) -> list[str]:
        """Places below the image directory where an image may lie, the likeliest first."""
        return _places(self.file_name[image], self.coco_url[image])

    def all_image_places(self) -> list[list[str]]:
        """`image_places` of every image."""
        return list(map(_places, self.file_name, self.coco_url))

    def class_counts(self, masks: bool = False) -> Counts:
        """Count the objects that are trained on, see `trained`."""
        kept = self.trained(masks)
        return count_classes(
            self.image[kept], self.category[kept], self.num_classes, len(self.image_id)
        )

    def image_count(self) -> Mapping[str, int]:
        """Images that show each class, by class name; crowds and ignored objects do not count."""
        counts = self.class_counts().image_count.tolist()
        return dict(zip(self.class_names.values(), counts, strict=True))

    @property
    def gives_image_count(self) -> bool:
        """Whether every class has an `image_count`, of whatever images."""
        given = [category.get("image_count") for category in self.categories]
        return all(isinstance(n, int) and not isinstance(n, bool) for n in given)

    @functools.cached_property
    def training_image_count(self) -> tuple[int, ...] | None:
        """Training images of each class as `image_count` of the file says; None where it does not.

        Files of LVIS give the counts of the training set. Others (lvis-api's sample of 100 images)
        give their own: where every count may be the file's own, it says nothing of a training.
        """
        if not self.gives_image_count:
            return None
        given = tuple(category["image_count"] for category in self.categories)
        everything = count_classes(
            self.image, self.category, self.num_classes, len(self.image_id)
        ).image_count
        own = self.class_counts().image_count
        counts = np.array(given)
        return None if ((counts == own) | (counts == everything)).all() else given

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """The usable content as the dicts of a COCO file, every field as the columns have it."""
        images = []
        for n, image_id in enumerate(self.image_id.tolist()):
            height, width = self.size[n].tolist()
            image = {"id": image_id, "height": height, "width": width}
            names = ("file_name", self.file_name[n]), ("coco_url", self.coco_url[n])
            image |= {key: text.decode("utf-8", "surrogatepass") for key, text in names if text}
            for key, labels in zip(
                IMAGE_LABEL_KEYS, (self.negative, self.not_exhaustive), strict=True
            ):
                if labels.given[n]:
                    image[key] = self.category_id[labels.of(n)].tolist()
            images.append(image)
        annotations = []
        ids = zip(self.id.tolist(), self.image.tolist(), self.category.tolist(), strict=True)
        for n, (annotation_id, image, category) in enumerate(ids):
            if self.box_problem[n] < 0:
                annotation = {
                    "id": annotation_id,
                    "image_id": images[image]["id"],
                    "category_id": self.categories[category]["id"],
                    "bbox": self.box[n].tolist(),
                    "iscrowd": int(self.crowd[n]),
                    "ignore": int(self.ignore[n]),
                }
                if self.area[n] >= 0:
                    annotation["area"] = float(self.area[n])
                if segmentation := self.segmentation(n):
                    annotation["segmentation"] = segmentation
                annotations.append(annotation)
        return {"images": images, "categories": self.categories, "annotations": annotations}

    @functools.cached_property
    def report(self) -> BadAnnotations:
        """What is left out, fixed, or looks wrong, by annotation id."""
        from .checks.hints import hints

        def ids(chosen: np.ndarray) -> list[Hashable]:
            return self.id[chosen].tolist()

        bad_mask = np.where(self.usable, self.mask_problem, -1)
        return BadAnnotations(
            self.path,
            {
                r: ids(self.box_problem == n)
                for n, r in enumerate(BOX_PROBLEMS)
                if (self.box_problem == n).any()
            },
            ids(self.clipped),
            ids(self.trimmed & self.usable),
            {r: ids(bad_mask == n) for n, r in enumerate(MASK_PROBLEMS) if (bad_mask == n).any()},
            hints(self),
            self._crowds(),
        )  # fmt: skip

    def _crowds(self) -> dict[str, int]:
        """Crowds by class name."""
        counts = np.bincount(self.category[self.usable & self.crowd], minlength=self.num_classes)
        names = self.class_names.values()
        return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}


_read: dict[str, Annotations] = {}  # by content, the last ones


def read_annotations(path: str) -> Annotations:
    """Read a COCO- or LVIS-style file.

    Raises:
        ValueError: it cannot be read or cannot be trained on; names the file, the id and the field.
    """
    state = cache.file_state(path)
    key = cache.known_key(path, state)
    entry = None if key is None or key in _read else cache.load(key)
    if key is None or (entry is None and key not in _read):
        content = read_bytes(path)
        key = cache.content_key(content)
        if key not in _read:
            entry = cache.load(key) or cache.store(key, functools.partial(_parse, content, path))
        cache.keep_place(path, state, key)
    if entry is not None:
        _read[key] = _assemble(path, *entry)
        while len(_read) > _KEPT:
            del _read[next(iter(_read))]
    found = _read[key]
    return found if found.path == path else dataclasses.replace(found, name=path, path=path)


def parse_annotations(content: bytes, path: str) -> Annotations:
    """Read the content of a file in memory; `path` is its name, for messages.

    Raises:
        ValueError: as `read_annotations`.
    """
    masks = io.BytesIO()
    columns, header = _parse(content, path, masks)
    columns["masks"] = np.frombuffer(masks.getvalue(), dtype=np.uint8)
    return _assemble(path, columns, header)


def _parse(content: bytes, path: str, masks: BinaryIO) -> tuple[cache.Columns, dict[str, Any]]:
    """Columns of a content as arrays of numbers, and everything else for the header."""
    columns: cache.Columns = {}
    header: dict[str, Any] = {}
    for name, value in parse_columns(content, path, masks).items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            columns[name] = value
        elif isinstance(value, np.ndarray):
            header[name] = value.tolist()
        elif isinstance(value, Texts | ImageLabels):
            for field in dataclasses.fields(value):
                columns[f"{name}.{field.name}"] = getattr(value, field.name)
        else:
            header[name] = value
    return columns, header


def _assemble(path: str, columns: cache.Columns, header: dict[str, Any]) -> Annotations:
    values: dict[str, Any] = dict(header)
    for name in ("id", "image_id"):
        if name in values:
            values[name] = _objects(values[name])
    values["masks"] = Texts(columns["masks"], columns["mask_offsets"])
    for name, column in columns.items():
        if name not in ("masks", "mask_offsets") and "." not in name:
            values[name] = column
    for name in ("file_name", "coco_url"):
        values[name] = Texts(columns[f"{name}.content"], columns[f"{name}.offsets"])
    for name in ("negative", "not_exhaustive"):
        parts = (columns[f"{name}.{f.name}"] for f in dataclasses.fields(ImageLabels))
        values[name] = ImageLabels(*parts)
    return Annotations(name=path, path=path, **values)


def _objects(values: list[Hashable]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def annotation_style(json_file: str) -> str:
    """Style of a file: "lvis" if it has verified negatives or groups r, c, f; else "coco".

    Looks at the text without parsing it, so that a large file is told apart in a second.
    """
    if "://" not in json_file:
        with open(json_file, "rb") as file:
            if file.read(2) not in (b"\xff\xfe", b"\xfe\xff") and os.fstat(file.fileno()).st_size:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    return "lvis" if has_lvis_marks(text) else "coco"
    return "lvis" if has_lvis_marks(read_bytes(json_file)) else "coco"
