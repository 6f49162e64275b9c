"""Where an analysis finds its data: a registered set, an annotation file, or saved counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2_balance.data.annotations import read_annotations
from d2_balance.data.counts_file import read_counts
from d2_balance.data.resolve import locate

from .table import DataTable, Statistics


@dataclass(frozen=True, eq=False)
class Source:
    """One dataset.

    Attributes:
        name: what the user called it.
        table: its images and objects, or None where only counts are known.
        counts: class counts where there is no table.
        note: why there is no table, or "".
        image_root: directory of the images; "" where it is not known.
    """

    name: str
    table: DataTable | None
    counts: Statistics | None = None
    note: str = ""
    image_root: str = ""


def load(dataset: str, files: list[str] | None = None) -> Source:
    """A dataset by its name or by its file.

    Args:
        dataset: a registered name; a COCO- or LVIS-style file; or a file of ClassCounts.save.
        files: annotation file and image directory to register under the name `dataset`.

    Raises:
        ValueError: it is none of them, or the file cannot be used; names the file and what is
            wrong in it.
    """
    if files:
        from d2_balance.data.catalog.register import register_json

        register_json(dataset, files[0], files[1], key="--register")
    place = locate(dataset, "dataset")
    if not place.path:
        return _from_loader(dataset)
    if place.path == dataset:
        counts = _class_counts(dataset)
        if counts is not None:
            note = "The file holds class counts only, and no boxes."
            return Source(dataset, None, counts, note)
    found = read_annotations(place.path)
    return Source(dataset, DataTable.from_annotations(dataset, found), image_root=place.image_root)


def _class_counts(path: str) -> Statistics | None:
    """Return the counts of a file of `ClassCounts.save`, None for another file."""
    with open(path, "rb") as file:
        saved = re.match(rb'\s*{\s*"num_images"', file.read(100))
    if not saved:
        return None
    counts = read_counts(path)
    return Statistics(np.array(counts[0]), np.array(counts[1]), *counts[2:])


def _from_loader(name: str) -> Source:
    """Detectron2's dicts; only counts where images have no size or objects no box."""
    from detectron2.data import MetadataCatalog

    from d2_balance.data.catalog.metadata import id_map
    from d2_balance.data.catalog.register import load_dataset
    from d2_balance.data.class_counts import ClassCounts

    records = load_dataset(name)
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is None or not isinstance(records, Sequence):
        raise ValueError(
            f"{name!r} has no class names or no list of dicts; an analysis needs a detection set"
        )
    whole = all("height" in r and "width" in r for r in records) and all(
        "bbox" in a and "bbox_mode" in a for r in records for a in r["annotations"]
    )
    groups = metadata.get("class_group")
    if whole:
        return Source(name, DataTable.from_dicts(name, records, classes, id_map(name), groups))
    counts = ClassCounts.from_dataset_dicts(records, len(classes), classes, groups)
    note = "The set gives no sizes or boxes: only classes are counted."
    statistics = Statistics(
        counts.image_count.numpy(),
        counts.instance_count.numpy(),
        counts.num_images,
        counts.class_names,
        counts.file_groups,
    )
    return Source(name, None, statistics, note)
