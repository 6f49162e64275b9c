"""Where ground truth comes from: a registered dataset, or an annotation file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2_balance.data.annotations import annotation_style, read_json
from d2_balance.data.checks.structure import category_name, check_structure


@dataclass(frozen=True)
class Annotations:
    """Content of one annotation file.

    Attributes:
        name: what the user called it.
        path: the JSON file.
        data: its content, checked (see `check_structure`).
        federated: True for LVIS style.
    """

    name: str
    path: str
    data: dict[str, Any]
    federated: bool

    @classmethod
    def load(cls, source: str, key: str = "--dataset", style: str | None = None) -> "Annotations":
        """Read a registered dataset's file, or a file.

        Args:
            source: a name in Detectron2's catalog, or the path of a COCO- or LVIS-style file.
            key: what to name in messages.
            style: "coco" or "lvis"; None: by the registration, else by what the file holds.

        Raises:
            ValueError: neither; a set without a file; or a file that cannot be evaluated.
        """
        from detectron2.data import DatasetCatalog, MetadataCatalog

        import d2_balance.data  # noqa: F401  registers the built-in sets

        path = source
        if source in DatasetCatalog:
            metadata = MetadataCatalog.get(source)
            if source.startswith("mini_lvis"):
                DatasetCatalog.get(source)  # rendered on first use
            if not metadata.get("json_file"):
                raise ValueError(
                    f"{key}: the dataset {source!r} has no annotation file; give a COCO- or "
                    "LVIS-style file"
                )
            path = metadata.json_file
            style = style or {"lvis": "lvis"}.get(metadata.get("evaluator_type"), "coco")
        if not os.path.isfile(path):
            what = "is no file" if path == source else f"needs {path}, which does not exist"
            raise ValueError(
                f"{key}: {source!r} {what}; give an annotation file or the name of a registered "
                f"dataset{_registered_hint(path == source)}"
            )
        data = read_json(path)
        check_structure(data, path)
        federated = (style or annotation_style(path)) == "lvis"
        return cls(source, path, data, federated)

    @property
    def class_names(self) -> dict[int, str]:
        """Class name by category id, ascending."""
        categories = sorted(self.data["categories"], key=lambda c: c["id"])
        return {c["id"]: category_name(c) for c in categories}

    def image_count(self) -> Mapping[str, int]:
        """Images that show each class, by class name; crowds and ignored objects do not count."""
        pairs = {
            (a["image_id"], a["category_id"])
            for a in self.data["annotations"]
            if not a.get("iscrowd") and not a.get("ignore")
        }
        counts = dict.fromkeys(self.class_names, 0)
        for _, category in pairs:
            counts[category] += 1
        return {name: counts[category] for category, name in self.class_names.items()}


def _registered_hint(wanted: bool) -> str:
    return " (`d2-balance doctor` lists what is found)" if wanted else ""
