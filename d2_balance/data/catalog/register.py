"""Registers annotation files under a name, and finds files."""

import functools
import os
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..annotations import annotation_style
from ..records import load_json


def register_json(name: str, json_file: str, image_root: str, key: str = "register_json") -> None:
    """Register one COCO- or LVIS-style file.

    Sets json_file, image_root and evaluator_type ("lvis" or "coco") in the metadata. The file is
    parsed when the dataset is first asked for; the rest of the metadata (thing_classes and others,
    see `load_json`) is there from then on, and `loaded_metadata` gives it in any case.

    Args:
        name: the name for DATASETS.TRAIN or DATASETS.TEST.
        json_file: relative to the working directory or to $DETECTRON2_DATASETS, or absolute.
        image_root: directory of the images, found in the same way.
        key: what to name in error messages.

    Raises:
        ValueError: if file or directory does not exist, or if the name belongs to another set.
    """
    json_file = resolve_path(json_file, PathManager.isfile, f"{key}: the annotation file")
    image_root = resolve_path(image_root, PathManager.isdir, f"{key}: the image directory")
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if _registered_as(name) == (json_file, image_root, name):
            return
        raise ValueError(
            f"{key}: the name {name!r} is taken by another dataset "
            f"({metadata.get('json_file', 'one without an annotation file')}); choose another name"
        )
    try:
        style = annotation_style(json_file)
        metadata.set(json_file=json_file, image_root=image_root, evaluator_type=style)
    except AssertionError as error:
        raise ValueError(
            f"{key}: the metadata of {name!r} belong to another dataset; choose another name"
        ) from error
    DatasetCatalog.register(name, functools.partial(load_json, json_file, image_root, name))


def load_dataset(name: str) -> Any:
    """A registered dataset as its loader gives it.

    Raises:
        ValueError: the loader failed; names the dataset and its file.
    """
    try:
        return DatasetCatalog.get(name)
    except ValueError:
        raise  # of our own loader: names the file and what is wrong in it
    except Exception as error:  # loaders of others may raise anything
        json_file = MetadataCatalog.get(name).get("json_file", "its annotation file")
        raise ValueError(
            f"the dataset {name!r} cannot be loaded from {json_file} "
            f"({type(error).__name__}: {error}); $DETECTRON2_DATASETS must point to the directory "
            "that holds Detectron2's datasets, see datasets/README.md."
        ) from error


def registered_file(name: str) -> str | None:
    """The local annotation file of a set that `register_json` registered, else None."""
    found = _registered_as(name)
    return found[0] if found and "://" not in found[0] else None


def resolve_path(path: str, exists: Callable[[str], bool], what: str) -> str:
    """The path as given or below $DETECTRON2_DATASETS, absolute where it is a local one.

    Args:
        path: of a file or directory.
        exists: whether a path is there.
        what: what it is, for the message.

    Raises:
        ValueError: it is at neither place.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    places = [os.path.expanduser(path), os.path.join(root, path)]
    for place in places:
        if exists(place):
            return place if "://" in place else os.path.abspath(place)
    raise ValueError(
        f"{what} {path!r} does not exist, neither there nor below $DETECTRON2_DATASETS ({root})"
    )


def _registered_as(name: str) -> tuple[str, str, str] | None:
    """The arguments with which `register_json` registered a name; None if another did."""
    loader = DatasetCatalog[name]
    ours = isinstance(loader, functools.partial) and loader.func is load_json
    return loader.args if ours else None
