"""Boxes of a second annotation file on the images of a training set, as regions to ignore.

LVIS leaves out objects of classes that it did not look for in an image; COCO has boxes of 80
classes on the same images. A record of the training set gets `ignore_boxes`; what the heads do
with them stands in `modeling/image_context.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager

from .annotations import Annotations, read_annotations
from .catalog.metadata import id_map, target_categories
from .catalog.register import resolve_path
from .class_map import load_class_map
from .records import changed

KEY = "DATASETS.IGNORE_REGIONS"
FIELD = "ignore_boxes"
SAME_OBJECT = 0.5  # IoU from which a box of the second file is an object of the training set
_FORM = "[dataset, annotation file] or [dataset, annotation file, class map], each a text"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegionFile:
    """One entry of DATASETS.IGNORE_REGIONS.

    Attributes:
        dataset: training set whose images get regions.
        json_file: COCO- or LVIS-style file with boxes on the same images.
        class_map: file that says which of its classes are classes of the training set; "" goes by
            name and synset.
    """

    dataset: str
    json_file: str
    class_map: str = ""


def region_files(cfg: CfgNode) -> list[RegionFile]:
    """The entries of DATASETS.IGNORE_REGIONS, with paths of files that are there.

    Raises:
        ValueError: naming the entry, if it has another form, speaks of no training set, or if a
            file does not exist.
    """
    entries = cfg.DATASETS.IGNORE_REGIONS
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{KEY} must be a list of {_FORM}, not {entries!r}")
    found = []
    for number, entry in enumerate(entries):
        key = f"{KEY}[{number}]"
        texts = isinstance(entry, list | tuple) and all(isinstance(text, str) for text in entry)
        if not texts or len(entry) not in (2, 3) or not all(entry[:2]):
            raise ValueError(f"{key} is {entry!r}; must be {_FORM}")
        name, json_file, class_map = (*entry, "")[:3]
        if name not in cfg.DATASETS.TRAIN:
            raise ValueError(
                f"{key}: {name!r} is not a training set; must be one of "
                f"{', '.join(cfg.DATASETS.TRAIN)}"
            )
        json_file = resolve_path(json_file, PathManager.isfile, f"{key}: the annotation file")
        if class_map:
            class_map = resolve_path(class_map, PathManager.isfile, f"{key}: the class map")
        found.append(RegionFile(name, json_file, class_map))
    return found


def add_regions(records: Sequence[dict[str, Any]], regions: RegionFile) -> Sequence[dict[str, Any]]:
    """Records of a training set with `ignore_boxes`, an (M, 4) float32 array of corners in pixels.

    Images of the two files are the same where the last part of their path is, and of several
    those with most of their path in common. A box is no region
    where it is an object of the training set: mapped to its class and with an IoU of 0.5 with it.
    Boxes of classes without a match in the training set are regions, as are crowds.

    Args:
        records: Detectron2's standard dicts of the training set; they stay as they are.
        regions: what to read.

    Raises:
        ValueError: naming file and id: no image in common, one image under two ids, or with
            another size; or the class map has names that do not exist.
    """
    source = read_annotations(regions.json_file)
    if source.report:
        logger.warning(source.report.describe())
    classes = load_class_map(
        regions.class_map,
        source.categories,
        target_categories(regions.dataset),
        (regions.json_file, regions.dataset),
    )
    logger.info(f"Ignore regions: {classes.report()}")
    mapping = id_map(regions.dataset)
    same = {raw: mapping[i] if mapping else i - 1 for raw, i in classes.ids.items()}
    mapped = np.array([same.get(raw, -1) for raw in source.category_id.tolist()])
    by_image = _Boxes(source, mapped)
    files = [record["file_name"] for record in records]
    found: dict[int, np.ndarray] = {}
    kept = matched = 0
    for index, image in _same_images(files, source).items():
        record = records[index]
        _check_size(record, source, image)
        boxes, dropped = _regions(record, *by_image.of(image))
        earlier = record.get(FIELD)
        if earlier is not None:
            boxes = np.concatenate([np.asarray(earlier, np.float32).reshape(-1, 4), boxes])
        found[index] = boxes
        kept, matched = kept + len(boxes), matched + dropped
    if not found:
        raise ValueError(
            f"{regions.json_file}: none of its {len(source.image_id)} images is one of the "
            f"{len(records)} of {regions.dataset!r}; the last parts of file_name must agree"
        )
    logger.info(
        f"{kept} ignore regions from {regions.json_file} on {len(found)} of {len(records)} images "
        f"of {regions.dataset}; {matched} boxes are objects there and no regions."
    )
    return changed(records, partial(_with_regions, found))


def _with_regions(
    regions: Mapping[int, np.ndarray], index: int, record: dict[str, Any]
) -> dict[str, Any]:
    return record | {FIELD: regions[index]} if index in regions else record


class _Boxes:
    """Boxes of the second file by image, as corners in pixels."""

    def __init__(self, source: Annotations, mapped: np.ndarray) -> None:
        usable = np.flatnonzero(source.usable)
        chosen = usable[np.argsort(source.image[usable], kind="stable")]
        boxes = source.training_boxes()[chosen]
        self._boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        self._label = mapped[source.category[chosen]]
        self._crowd = source.crowd[chosen]
        images = np.arange(len(source.image_id) + 1)
        self._starts = np.searchsorted(source.image[chosen], images)

    def of(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(M, 4) corners, (M,) classes of the training set or -1, (M,) crowds."""
        own = slice(self._starts[image], self._starts[image + 1])
        return self._boxes[own], self._label[own], self._crowd[own]


def _same_images(files: Sequence[str], source: Annotations) -> dict[int, int]:
    """Image of the second file for each record that is one of them, by the end of their paths.

    Where several images bear a name, those are the same that have most of their path in common.

    Raises:
        ValueError: two images of the second file fit one record equally well.
    """
    by_name: dict[str, list[tuple[int, list[str]]]] = {}
    for image in range(len(source.image_id)):
        places = source.image_places(image)
        if not places:
            raise ValueError(
                f"{source.path}: image {source.image_id[image]} has neither 'file_name' nor "
                "'coco_url'"
            )
        parts = _parts(places[0])
        by_name.setdefault(parts[0], []).append((image, parts))
    best: dict[int, dict[int, int]] = {}  # image of the second file: records, by parts in common
    found: dict[int, int] = {}
    for index, file in enumerate(files):
        own = _parts(file)
        candidates = [(_in_common(own, parts), image) for image, parts in by_name.get(own[0], ())]
        if not candidates:
            continue
        most = max(candidates)[0]
        fitting = [image for common, image in candidates if common == most]
        if len(fitting) > 1:
            first, second = (source.image_id[i] for i in fitting[:2])
            raise ValueError(
                f"{source.path}: the images {first} and {second} are both called {own[0]!r}; "
                "the last parts of file_name must differ"
            )
        found[index] = fitting[0]
        best.setdefault(fitting[0], {})[index] = most
    for records in best.values():
        most = max(records.values())
        for index, common in records.items():
            if common < most:  # an image of the same name in another directory
                del found[index]
    return found


def _parts(path: str) -> list[str]:
    return path.replace("\\", "/").split("/")[::-1]


def _in_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of parts, from the last one on, that two paths have in common."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _check_size(record: Mapping[str, Any], source: Annotations, image: int) -> None:
    height, width = source.size[image].tolist()
    if (width, height) != (record["width"], record["height"]):
        raise ValueError(
            f"{source.path}: image {source.image_id[image]} is {width} x {height} pixels and the "
            f"training set's {record['file_name']} is {record['width']} x {record['height']}; they "
            "must be the same image"
        )


def _regions(
    record: Mapping[str, Any], corners: np.ndarray, mapped: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, int]:
    """Boxes (M, 4) that are no object of the record, and how many are one."""
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    if not len(boxes) or not objects:
        return boxes.numpy(), 0
    there = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    overlap = pairwise_iou(Boxes(boxes), Boxes(torch.tensor(there)))  # (M, objects)
    labels = torch.tensor([a["category_id"] for a in objects])
    same = (overlap >= SAME_OBJECT) & (torch.from_numpy(mapped)[:, None] == labels)
    is_object = same.any(dim=1) & ~torch.tensor(crowd)
    return boxes[~is_object].numpy(), int(is_object.sum())
