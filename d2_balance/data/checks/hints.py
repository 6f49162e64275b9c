"""What no single annotation shows: fractions of the image, one area for all, crowds, doubled files.

Each is something that an annotation tool is known to write. A file may be right all the same, so
that these are sentences for the user, and nothing is left out for them.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..columns import category_name
from .annotations import NO_MASK

if TYPE_CHECKING:
    from ..annotations import Annotations

LEFT_OUT = "is left out"
_SHOWN = 5
_FRACTION = 1.001  # a box that ends here or before may be given in fractions of its image
_ROUNDED = 1.0  # pixel by which boxes may leave an image
_FAR = 0.05  # of the side of an image
_SMALL = 8  # pixels; an image of this size may have boxes of one pixel
_FEW = 4  # objects of which one area for all means nothing


def hints(source: Annotations) -> list[str]:
    """Sentences about a file, each with what it is and what to do."""
    found = (
        _parents(source),
        _fractions(source),
        _corners(source) or _rotated(source),
        _areas(source),
        _crowds(source),
        _doubled(source),
    )
    return [sentence for sentence in found if sentence] + (
        ["'keypoints' are not read: boxes and masks of these objects train."]
        if source.has_keypoints
        else []
    )


def _parents(source: Annotations) -> str:
    """Roboflow's parent category, which is no class."""
    if source.unused_parents:
        return (
            f"The category {', '.join(source.unused_parents)} {LEFT_OUT}: it has no object and "
            "bears the name of a class, as the parent in Roboflow's exports does. Delete it."
        )
    named = {c.get("supercategory") for c in source.categories}
    used = set(source.category.tolist())
    empty = [
        f"{c['id']} {category_name(c)!r}"
        for k, c in enumerate(source.categories)
        if k not in used
        and category_name(c) in named
        and c.get("supercategory") != category_name(c)
    ]
    if not empty or len(empty) == len(source.categories):
        return ""
    return (
        f"The category {_some(empty)} has no object and is the supercategory of others, as the "
        "parent in Roboflow's exports: it is no class. Delete it from all files, and lower "
        "NUM_CLASSES by one."
    )


def _fractions(source: Annotations) -> str:
    box = source.box[source.usable]
    if not len(box) or source.size.min() <= _SMALL:
        return ""
    corners = box.max() <= _FRACTION and (box != box.round()).any()  # x1, y1 in place of a size
    if (box[:, :2] + box[:, 2:]).max() > _FRACTION and not corners:
        return ""
    return (
        f"All {len(box):,} boxes lie within 0 and 1: they are fractions of the image and must be "
        "pixels. Multiply x and width by the width of the image, y and height by its height."
    )


def _corners(source: Annotations) -> str:
    """Boxes that leave their images as x, y, width, height and fit in as something else."""
    at = np.flatnonzero(np.isfinite(source.box).all(axis=1))
    box, (height, width) = source.box[at], source.size[source.image[at]].T
    x, y, w, h = box.T

    def outside(x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray) -> np.ndarray:
        low, high = (
            np.minimum(x0, y0) < -_ROUNDED,
            (x1 > width + _ROUNDED) | (y1 > height + _ROUNDED),
        )
        return low | high | (x1 <= x0) | (y1 <= y0)

    leaves = outside(x, y, x + w, y + h)
    if len(at) < _FEW or 4 * leaves.sum() < len(at):
        return ""
    if not outside(x, y, w, h).any():
        return (
            f"{leaves.sum():,} of {len(at):,} boxes leave their image, and all of them fit in as "
            "x0, y0, x1, y1: bbox must be x, y, width, height. Subtract the first corner from the "
            "second."
        )
    if not outside(x - w / 2, y - h / 2, x + w / 2, y + h / 2).any():
        return (
            f"{leaves.sum():,} of {len(at):,} boxes leave their image, and all of them fit in with "
            "x, y as their centre: they must be the upper left corner. Subtract half the width and "
            "height."
        )
    return ""


def _rotated(source: Annotations) -> str:
    """Boxes of rotated rectangles whose corners were computed in percent of the image."""
    at = np.flatnonzero(source.clipped & (source.mask == NO_MASK))
    size = source.size[source.image[at]]
    low, high = source.box[at, :2], source.box[at, :2] + source.box[at, 2:] - size[:, ::-1]
    far = (np.maximum(-low, high) > _FAR * size[:, ::-1]).any(axis=1) & (size[:, 0] != size[:, 1])
    if not far.any():
        return ""
    ids = list(map(str, source.id[at[far]].tolist()))
    return (
        f"{len(ids):,} boxes without a mask leave their image by more than {_FAR:.0%} of it "
        f"(annotation id {_some(ids)}) and are clipped. Label Studio computes the corners of "
        "rotated rectangles in percent of the image, wrong where that is not square: look at "
        "them."
    )


def _areas(source: Annotations) -> str:
    area, box = source.area[source.usable], source.box[source.usable]
    if len(area) < _FEW or np.isnan(area).any() or (area != area[0]).any():
        return ""
    if len(np.unique((box[:, 2] * box[:, 3]).round(2))) == 1:
        return ""
    return (
        f"'area' is {area[0]:g} for all {len(area):,} objects, whose boxes differ: APs, APm and "
        "APl go by it. Write the area of each in pixels, or leave the field out."
    )


def _crowds(source: Annotations) -> str:
    usable = source.usable
    objects = np.bincount(source.category[usable], minlength=source.num_classes)
    crowds = np.bincount(source.category[usable & source.crowd], minlength=source.num_classes)
    most = np.flatnonzero((crowds > 0) & (2 * crowds >= objects))
    if not len(most):
        return ""
    names = list(source.class_names.values())
    shown = [f"{names[k]} {crowds[k]:,} of {objects[k]:,}" for k in most.tolist()]
    if crowds.sum() == objects.sum():
        shown = [f"{crowds.sum():,} of {objects.sum():,}"]
    return (
        f"Objects with iscrowd 1, which neither train nor count in an evaluation: {_some(shown)}. "
        "CVAT and datumaro mark every mask as a crowd, darwin-py objects of several paths, "
        "supervision masks with holes or of several parts: set iscrowd to 0 for single objects."
    )


def _doubled(source: Annotations) -> str:
    by_name: dict[str, list[int]] = {}
    for image, (name, url) in enumerate(zip(source.file_name, source.coco_url, strict=True)):
        if name or url:
            by_name.setdefault(_plain(name or url), []).append(image)
    ids = source.image_id.tolist()
    twice = [
        f"{name} (ids {', '.join(str(ids[i]) for i in images)})"
        for name, images in by_name.items()
        if len(images) > 1
    ]
    if not twice:
        return ""
    return (
        f"{len(twice):,} image file(s) stand under several ids: {_some(twice)}. Each id trains and "
        "is evaluated as an image of its own, which lacks the objects of the others (Label Studio "
        "writes one per annotator): give all of them one id."
    )


def _plain(name: bytes) -> str:
    """A path without what writes one file in several ways."""
    text = unicodedata.normalize("NFC", name.decode("utf-8", "replace")).replace("\\", "/")
    return posixpath.normpath(text) if "/" in text else text


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
