"""The one resolver of datasets: a registered name, or an annotation file.

truth = load_annotations("my_val.json")            # or the name of a registered dataset
locate("lvis_v1_val").path                         # where its annotations are
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from .annotations import Annotations, read_annotations


@dataclass(frozen=True)
class Location:
    """Where the annotations of a dataset are.

    Attributes:
        name: what the user called it.
        path: annotation file; "" for a registered dataset without one.
        style: "coco" or "lvis" by the registration; None: by what the file holds.
        image_root: directory of the images, "" where it is not known.
    """

    name: str
    path: str
    style: str | None = None
    image_root: str = ""


def locate(source: str, key: str = "--dataset") -> Location:
    """Look up a dataset by its file or by its registered name.

    Args:
        source: the path of a COCO- or LVIS-style file, or a name in Detectron2's catalog.
        key: what to name in messages.

    Raises:
        ValueError: it is neither, or its file does not exist.
    """
    if os.path.isfile(source):
        return Location(source, source)
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from . import catalog  # noqa: F401  registers the built-in sets

    if source not in DatasetCatalog:
        raise ValueError(
            f"{key}: {source!r} is neither a registered dataset nor an annotation file "
            "(`d2-balance doctor` lists what is found; DATASETS.REGISTER registers your own)"
        )
    metadata = MetadataCatalog.get(source)
    path = metadata.get("json_file") or ""
    if path and not os.path.isfile(path) and source.startswith("mini_lvis"):
        DatasetCatalog.get(source)  # rendered on first use
    if path and "://" not in path and not os.path.isfile(path):
        raise ValueError(
            f"{key}: {source!r} needs {path}, which is missing; $DETECTRON2_DATASETS must point "
            "to the directory of the datasets"
        )
    style = {"lvis": "lvis"}.get(metadata.get("evaluator_type", ""), "coco")
    return Location(source, path, style, metadata.get("image_root") or "")


def load_annotations(source: str, key: str = "--dataset", style: str | None = None) -> Annotations:
    """Read the annotations of a dataset, by its file or by its registered name.

    Args:
        source: see `locate`.
        key: see `locate`.
        style: "coco" or "lvis"; None: by the registration, else by what the file holds.

    Raises:
        ValueError: no such dataset, one without an annotation file, or a file that cannot be used.
    """
    place = locate(source, key)
    if not place.path:
        raise ValueError(
            f"{key}: the dataset {source!r} has no annotation file; give a COCO- or LVIS-style file"
        )
    found = read_annotations(place.path)
    style = style or place.style
    federated = found.federated if style is None else style == "lvis"
    return dataclasses.replace(found, name=source, federated=federated)
