"""Where an analysis finds its data: a registered set, an annotation file, or saved counts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from d2_balance.data.catalog.metadata import id_map
from d2_balance.data.catalog.register import register_json
from d2_balance.data.checks.structure import check_structure
from d2_balance.data.class_counts import ClassCounts
from d2_balance.data.json_files import read_json

from .table import DataTable


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
    counts: ClassCounts | None = None
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
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if files:
        register_json(dataset, *files, key="--register")
    if dataset not in DatasetCatalog:
        if not os.path.isfile(dataset):
            raise ValueError(
                f"{dataset!r} is neither a registered dataset nor a file; --register JSON IMAGES "
                "registers your own, and so does DATASETS.REGISTER of --config-file"
            )
        return _from_file(dataset, dataset)
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("evaluator_type") in ("coco", "lvis") and metadata.get("json_file"):
        if dataset.startswith("mini_lvis"):
            DatasetCatalog.get(dataset)  # rendered on first use
        if not os.path.isfile(metadata.json_file):
            raise ValueError(
                f"{dataset!r} needs {metadata.json_file}, which does not exist; "
                "$DETECTRON2_DATASETS must point to the directory of the datasets"
            )
        return _from_file(dataset, metadata.json_file, metadata.get("image_root", ""))
    return _from_loader(dataset)


def _from_file(name: str, path: str, image_root: str = "") -> Source:
    data = read_json(path)
    if isinstance(data, dict) and "num_images" in data and "images" not in data:
        counts = ClassCounts.load(path)
        return Source(name, None, counts, "The file holds class counts only: no boxes to look at.")
    check_structure(data, path)
    return Source(name, DataTable.from_json(name, path, data), image_root=image_root)


def _from_loader(name: str) -> Source:
    """Detectron2's dicts; only counts where images have no size or objects no box."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    try:
        records = DatasetCatalog.get(name)
    except ValueError:
        raise  # names the file and what is wrong in it
    except Exception as error:  # loaders of others may raise anything
        raise ValueError(f"{name!r} cannot be loaded ({type(error).__name__}: {error})") from error
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is None or not isinstance(records, list):
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
    return Source(name, None, counts, "The set gives no sizes or boxes: only classes are counted.")
