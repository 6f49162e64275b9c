"""Training sets of other classes: their shared classes train, the rest of the classes is unknown.

An image of Open Images says nothing about most LVIS classes, has boxes and no masks, and says of
some classes that they are absent. An external set is registered with the classes of a target set:
its annotations are mapped by a class map, and its image-level labels list what is known.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..annotations import read_annotations
from ..class_map import ClassMap, load_class_map
from ..columns import IMAGE_LABEL_KEYS
from ..ignore_regions import FIELD
from ..records import Records, lazily, load_json
from .metadata import id_map, loaded_metadata, target_categories
from .register import resolve_path

KEY = "DATASETS.EXTERNAL"
_TEXTS = ("NAME", "JSON", "IMAGES", "TARGET")
_FORM = (
    "{NAME: name, JSON: file, IMAGES: directory, TARGET: training set whose classes it has}, with "
    "CLASS_MAP: file and EXHAUSTIVE: True or False where needed"
)
NEGATIVE, NOT_EXHAUSTIVE = IMAGE_LABEL_KEYS

logger = logging.getLogger(__name__)


def external_entries(cfg: CfgNode) -> list[tuple[str, dict[str, Any]]]:
    """The entries of DATASETS.EXTERNAL with paths of files that are there.

    Each comes with its place for messages.

    Raises:
        ValueError: naming the entry, if it has another form, or a file or directory does not exist.
    """
    found = []
    for key, entry in entries_as_given(cfg):
        places = _find(entry["JSON"], entry["IMAGES"], entry.get("CLASS_MAP", ""), key)
        found.append((key, entry | dict(zip(("JSON", "IMAGES", "CLASS_MAP"), places, strict=True))))
    return found


def entries_as_given(cfg: CfgNode) -> list[tuple[str, dict[str, Any]]]:
    """`external_entries` before files are checked; the same errors about their form."""
    entries = cfg.DATASETS.EXTERNAL
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{KEY} must be a list of {_FORM}, not {entries!r}")
    found = []
    for number, entry in enumerate(entries):
        key = f"{KEY}[{number}]"
        allowed = {*_TEXTS, "CLASS_MAP", "EXHAUSTIVE"}
        if not isinstance(entry, dict) or not {*_TEXTS} <= set(entry) <= allowed:
            raise ValueError(f"{key} is {entry!r}; must be {_FORM}")
        texts = [entry[field] for field in _TEXTS] + [entry.get("CLASS_MAP", "")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(
            entry.get("EXHAUSTIVE", False), bool
        ):
            raise ValueError(f"{key} is {entry!r}; must be {_FORM}")
        found.append((key, entry))
    return found


def register_external_from_config(cfg: CfgNode) -> list[str]:
    """Registers every entry of DATASETS.EXTERNAL; equal entries may be registered again.

    Returns:
        The names, in the order of the list.

    Raises:
        ValueError: naming the entry, if it has another form, if a file or directory is missing, if
            the target is unknown, or if the name belongs to another dataset.
    """
    names = []
    for key, entry in external_entries(cfg):
        texts = [entry[field] for field in _TEXTS] + [entry.get("CLASS_MAP", "")]
        register_external(*texts, exhaustive=entry.get("EXHAUSTIVE", False), key=key)
        names.append(entry["NAME"])
    return names


def register_external(
    name: str,
    json_file: str,
    image_root: str,
    target: str,
    class_map: str = "",
    *,
    exhaustive: bool = False,
    key: str = "register_external",
) -> None:
    """Registers a COCO- or LVIS-style file under the classes of a target set.

    Args:
        name: for DATASETS.TRAIN.
        json_file: as `register_json`.
        image_root: as `register_json`.
        target: registered training set whose classes and ids the records get.
        class_map: file, see `class_map.py`; "" goes by name and synset.
        exhaustive: whether all objects of the shared classes are annotated in every image, as in
            COCO: a shared class without annotation is verified to be absent then. False: only
            `neg_category_ids` of the file say so, as for Open Images.
        key: what to name in error messages.

    Raises:
        ValueError: see `register_external_from_config`.
    """
    json_file, image_root, class_map = _find(json_file, image_root, class_map, key)
    if target not in DatasetCatalog or target == name:
        raise ValueError(
            f"{key}: TARGET {target!r} must be a registered dataset with other images: the "
            "training set whose classes the model learns"
        )
    arguments = (json_file, image_root, name, target, class_map, exhaustive)
    if name in DatasetCatalog:
        if is_external(name) and DatasetCatalog[name].args == arguments:
            return
        raise ValueError(f"{key}: the name {name!r} is taken by another dataset; choose another")
    DatasetCatalog.register(name, functools.partial(load_external, *arguments))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root)


def _find(json_file: str, image_root: str, class_map: str, key: str) -> tuple[str, str, str]:
    """The three places as `resolve_path` finds them; "" stays."""
    json_file = resolve_path(json_file, PathManager.isfile, f"{key}: the annotation file")
    image_root = resolve_path(image_root, PathManager.isdir, f"{key}: the image directory")
    if class_map:
        class_map = resolve_path(class_map, PathManager.isfile, f"{key}: the class map")
    return json_file, image_root, class_map


def is_external(name: str) -> bool:
    """Whether `register_external` registered a dataset."""
    loader = DatasetCatalog[name] if name in DatasetCatalog else None  # noqa: SIM401  get() loads
    return isinstance(loader, functools.partial) and loader.func is load_external


def load_external(
    json_file: str,
    image_root: str,
    name: str,
    target: str,
    class_map: str = "",
    exhaustive: bool = False,
) -> Records:
    """Detectron2's standard dicts with the classes of the target; arguments as `register_external`.

    Both keys of image-level labels are there in every record, as ids of the target's file: absent
    are target classes of which every source class is; not marked completely are those of which one
    source class is, or that have a crowd (a group of Open Images). Crowds become `ignore_boxes`.

    Raises:
        ValueError: the file cannot be trained on, its class map has names that do not exist, or the
            two sets share no class.
    """
    source = read_annotations(json_file)
    metadata = loaded_metadata(target)
    classes = load_class_map(
        class_map, source.categories, target_categories(target), (name, target)
    )
    if not classes.ids:
        raise ValueError(
            f"{json_file}: {name!r} shares no class with {target!r}; name classes that are the "
            f"same in CLASS_MAP of {KEY}"
        )
    logger.info(classes.report())
    records = load_json(json_file, image_root)
    mapper = _RecordMapper(classes, source.category_id.tolist(), id_map(target), exhaustive)
    MetadataCatalog.get(name).set(
        thing_classes=list(metadata.thing_classes),
        **{
            key: metadata.get(key)
            for key in ("thing_dataset_id_to_contiguous_id", "class_group", "class_synset")
            if metadata.get(key) is not None
        },
    )
    label = mapper.labels[records.objects.category]
    return lazily(records, mapper, records.objects.choose(label >= 0, label))


class _RecordMapper:
    """Maps one record: annotations, image-level labels, and crowds.

    Args:
        classes: source ids to target ids.
        raw_ids: ids of the source's file, ascending: class indices of its records.
        mapping: ids of the target's file to class indices; None: id - 1.
        exhaustive: see `register_external`.

    Attributes:
        labels: (K,) class of the target for each class of the source, -1 for none.
    """

    def __init__(
        self,
        classes: ClassMap,
        raw_ids: list[int],
        mapping: dict[int, int] | None,
        exhaustive: bool,
    ) -> None:
        self._target = ids = classes.ids
        self._raw_ids = raw_ids
        self._index = {i: mapping[i] if mapping else i - 1 for i in ids.values()}
        self._exhaustive = exhaustive
        self.labels = np.array([self._index[ids[raw]] if raw in ids else -1 for raw in raw_ids])
        self._sources: dict[int, set[int]] = {}
        for source, target in ids.items():
            self._sources.setdefault(target, set()).add(source)

    def __call__(self, _: int, record: dict[str, Any]) -> dict[str, Any]:
        annotations, present, crowds = [], set(), []
        partial = self._mapped(record.get(NOT_EXHAUSTIVE, ()))
        for annotation in record["annotations"]:
            target = self._target.get(self._raw_ids[annotation["category_id"]])
            if target is None:
                continue
            present.add(target)
            if annotation.get("iscrowd", 0):
                partial.add(target)
                box = annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
                crowds.append(BoxMode.convert(*box))
            annotations.append(annotation | {"category_id": self._index[target]})
        stated = set(record.get(NEGATIVE, ()))
        absent = {t for t, sources in self._sources.items() if sources <= stated}
        if self._exhaustive:
            absent = set(self._sources)
        result = record | {
            "annotations": annotations,
            NEGATIVE: sorted(absent - present - partial),
            NOT_EXHAUSTIVE: sorted(partial),
        }
        if crowds:
            result[FIELD] = np.array(crowds, dtype=np.float32)
        return result

    def _mapped(self, ids: Iterable[int]) -> set[int]:
        return {self._target[i] for i in ids if i in self._target}
