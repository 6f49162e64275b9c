"""Datasets of a recipe: those it names, and those that its stages derive from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from d2_balance.data.annotations import Annotations
from d2_balance.data.catalog.register import resolve_path
from d2_balance.data.resolve import load_annotations


class DataSets:
    """Annotation file and image directory by name.

    Args:
        entries: [name, file, directory], relative to here or to $DETECTRON2_DATASETS.

    Raises:
        ValueError: a file or directory does not exist.
    """

    def __init__(self, entries: Iterable[list[str]]):
        from detectron2.utils.file_io import PathManager

        self._known: dict[str, tuple[str, str]] = {}
        for name, file, directory in entries:
            key = f"dataset {name}"
            self._known[name] = (
                resolve_path(file, PathManager.isfile, f"{key}: the annotation file"),
                resolve_path(directory, PathManager.isdir, f"{key}: the image directory"),
            )

    def add(self, name: str, file: str, directory: str) -> None:
        """A dataset that a stage has made."""
        self._known[name] = (file, directory)

    def __contains__(self, name: object) -> bool:
        from detectron2.data import DatasetCatalog

        return name in self._known or name in DatasetCatalog

    def source(self, name: str) -> str:
        """What `load_annotations` takes: the file of a known set, else the registered name."""
        return self._known[name][0] if name in self._known else name

    def file(self, name: str) -> str | None:
        """Its annotation file; None where there is none yet."""
        from detectron2.data import DatasetCatalog, MetadataCatalog

        if name in self._known:
            return self._known[name][0]
        path = MetadataCatalog.get(name).get("json_file") if name in DatasetCatalog else None
        return path if path and os.path.isfile(path) else None

    def load(self, name: str) -> Annotations:
        """Its annotations."""
        return replace(load_annotations(self.source(name), f"dataset {name}"), name=name)

    def directory(self, name: str) -> str:
        """Its image directory.

        Raises:
            ValueError: a registered set does not say.
        """
        from detectron2.data import MetadataCatalog

        if name in self._known:
            return self._known[name][1]
        self.load(name)  # mini_lvis is rendered when it is first asked for
        root = MetadataCatalog.get(name).get("image_root")
        if not root:
            raise ValueError(f"the dataset {name!r} does not say where its images are")
        return root

    def entries(self) -> list[list[str]]:
        """All of them for DATASETS.REGISTER."""
        return [[name, *places] for name, places in self._known.items()]


def keep_classes(
    data: Mapping[str, Any], keep: list[str] | None, every: list[int] | None, name: str
) -> dict[str, Any]:
    """The annotations of some classes; images without any stay out.

    Args:
        data: content of an annotation file.
        keep: class names.
        every: (n, k): each n-th class from the k-th on, in the order of their ids.
        name: of the dataset, for messages.

    Raises:
        ValueError: a name that it does not have, or no class left.
    """
    from d2_balance.data.columns import category_name

    categories = sorted(data["categories"], key=lambda c: c["id"])
    ids = chosen_classes(categories, keep, every, name)
    objects = [a for a in data["annotations"] if a["category_id"] in ids]
    if not objects:
        raise ValueError(
            f"{name} has no object of {', '.join(category_name(c) for c in categories)[:200]}"
        )
    shown = {a["image_id"] for a in objects}
    images = [
        image | {k: [c for c in image[k] if c in ids] for k in _LABELS if k in image}
        for image in data["images"]
        if image["id"] in shown
    ]
    classes = [c for c in categories if c["id"] in ids]
    return dict(data) | {"images": images, "categories": classes, "annotations": objects}


def chosen_classes(
    categories: Iterable[Mapping[str, Any]],
    keep: list[str] | None,
    every: list[int] | None,
    name: str,
) -> set[int]:
    """Ids of the classes that `keep_classes` keeps.

    Raises:
        ValueError: a name that the dataset does not have, or neither rule is given.
    """
    from d2_balance.data.class_map import resolve_class_map

    categories = sorted(categories, key=lambda c: c["id"])
    if keep:
        found = resolve_class_map({n: n for n in keep}, categories, categories, (name, name))
        return set(found.ids)
    if every and len(every) == 2 and every[0] > 0 <= every[1]:
        return {c["id"] for c in categories[every[1] :: every[0]]}
    raise ValueError(f"{name}: give keep, a list of classes, or every: [n, first]")


_LABELS = ("neg_category_ids", "not_exhaustive_category_ids")


def split(data: Mapping[str, Any], fraction: float, seed: int) -> tuple[dict, dict]:
    """Two parts of a dataset by image: the rest, and the held-out one.

    An image's side depends on its id and the seed alone, so that adding images moves none.

    Raises:
        ValueError: fraction is not in (0, 1), or a part is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; must be a number in (0, 1)")

    def place(image: Mapping[str, Any]) -> str:
        return hashlib.sha256(f"{seed}/{image['id']}".encode()).hexdigest()

    ordered = sorted(data["images"], key=place)
    count = round(fraction * len(ordered))
    if not 0 < count < len(ordered):
        raise ValueError(f"a fraction of {fraction} of {len(ordered)} images leaves a part empty")
    parts = []
    for images in (ordered[count:], ordered[:count]):
        ids = {image["id"] for image in images}
        inside: Callable = lambda a, ids=ids: a["image_id"] in ids  # noqa: E731
        parts.append(
            dict(data)
            | {
                "images": [image for image in data["images"] if image["id"] in ids],
                "annotations": list(filter(inside, data["annotations"])),
            }
        )
    return parts[0], parts[1]


def images_of(source: Annotations, directory: str, classes: Annotations) -> dict[str, Any]:
    """The images of one dataset with the classes of another, and no annotations."""
    from d2_balance.data.records import find_images

    find_images(source, directory)
    keys = ("id", "file_name", "coco_url", "height", "width")
    images = [{k: image[k] for k in keys if k in image} for image in source.data["images"]]
    return {"images": images, "categories": classes.data["categories"], "annotations": []}
