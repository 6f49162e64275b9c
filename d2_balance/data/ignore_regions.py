"""Boxes of a second annotation file on the images of a training set, as regions to ignore.

LVIS leaves out objects of classes that it did not look for in an image; COCO has boxes of 80
classes on the same images. A record of the training set gets `ignore_boxes`; what the heads do
with them stands in `modeling/ignore_regions.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager

from .annotations import image_places, read_json
from .catalog.class_map import load_class_map
from .catalog.metadata import id_map, target_categories
from .catalog.register import resolve_path
from .checks.annotations import find_bad_annotations
from .checks.structure import check_structure

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
                f"{key}: {name!r} is not a training set; allowed: {', '.join(cfg.DATASETS.TRAIN)}"
            )
        json_file = resolve_path(json_file, PathManager.isfile, f"{key}: the annotation file")
        if class_map:
            class_map = resolve_path(class_map, PathManager.isfile, f"{key}: the class map")
        found.append(RegionFile(name, json_file, class_map))
    return found


def add_regions(records: Sequence[dict[str, Any]], regions: RegionFile) -> list[dict[str, Any]]:
    """Records of a training set with `ignore_boxes`, an (M, 4) float32 array of corners in pixels.

    Images of the two files are the same where the last part of their path is. A box is no region
    where it is an object of the training set: mapped to its class and with an IoU of 0.5 with it.
    Boxes of classes without a match in the training set are regions, as are crowds.

    Args:
        records: Detectron2's standard dicts of the training set; they stay as they are.
        regions: what to read.

    Raises:
        ValueError: naming file and id: no image in common, one image under two ids, or with
            another size; or the class map has names that do not exist.
    """
    data = read_json(regions.json_file)
    check_structure(data, regions.json_file)
    classes = load_class_map(
        regions.class_map,
        data["categories"],
        target_categories(regions.dataset),
        (regions.json_file, regions.dataset),
    )
    logger.info(f"Ignore regions: {classes.report()}")
    by_image = _annotations_by_image(data, regions.json_file)
    mapping = id_map(regions.dataset)
    same = {raw: mapping[i] if mapping else i - 1 for raw, i in classes.ids.items()}
    result, known, kept, matched = [], 0, 0, 0
    for record in records:
        name = _base(record["file_name"])
        if name not in by_image:
            result.append(record)
            continue
        image, annotations = by_image[name]
        _check_size(record, image, regions.json_file)
        boxes, dropped = _regions(record, annotations, same)
        earlier = record.get(FIELD)
        if earlier is not None:
            boxes = np.concatenate([np.asarray(earlier, np.float32).reshape(-1, 4), boxes])
        result.append(record | {FIELD: boxes})
        known, kept, matched = known + 1, kept + len(boxes), matched + dropped
    if not known:
        raise ValueError(
            f"{regions.json_file}: none of its {len(data['images'])} images is one of the "
            f"{len(records)} of {regions.dataset!r}; the last parts of file_name must agree"
        )
    logger.info(
        f"{kept} ignore regions from {regions.json_file} on {known} of {len(records)} images of "
        f"{regions.dataset}; {matched} boxes are objects there and no regions."
    )
    return result


def _annotations_by_image(data: dict, json_file: str) -> dict[str, tuple[dict, list[dict]]]:
    """Image and annotations with sound boxes (XYXY_ABS) by the last part of the image's path."""
    images = {image["id"]: image for image in data["images"]}
    sizes = {i: (int(image["height"]), int(image["width"])) for i, image in images.items()}
    boxed = [{k: v for k, v in a.items() if k != "segmentation"} for a in data["annotations"]]
    findings = find_bad_annotations(boxed, sizes, json_file)
    if findings.report:
        logger.warning(findings.report.describe())
    by_id: dict[Any, list[dict]] = {i: [] for i in images}
    for position, annotation in enumerate(boxed):
        if position not in findings.skip:
            box = findings.boxes.get(position, annotation["bbox"])
            box = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            by_id[annotation["image_id"]].append(annotation | {"bbox": box})
    found: dict[str, tuple[dict, list[dict]]] = {}
    for i, image in images.items():
        names = image_places(image)
        if not names:
            raise ValueError(f"{json_file}: image {i} has neither 'file_name' nor 'coco_url'")
        name = _base(names[0])
        if name in found:
            raise ValueError(
                f"{json_file}: the images {found[name][0]['id']} and {i} are both called {name!r}; "
                "the last parts of file_name must differ"
            )
        found[name] = image, by_id[i]
    return found


def _check_size(record: Mapping[str, Any], image: Mapping[str, Any], json_file: str) -> None:
    size, own = (image["width"], image["height"]), (record["width"], record["height"])
    if size != own:
        raise ValueError(
            f"{json_file}: image {image['id']} is {size[0]} x {size[1]} pixels and the training "
            f"set's {record['file_name']} is {own[0]} x {own[1]}; they must be the same image"
        )


def _regions(
    record: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], same: Mapping[int, int]
) -> tuple[np.ndarray, int]:
    """Boxes (M, 4) that are no object of the record, and how many are one."""
    boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    if not len(boxes) or not objects:
        return boxes.float().numpy(), 0
    there = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    overlap = pairwise_iou(Boxes(boxes), Boxes(torch.tensor(there)))  # (M, objects)
    mapped = torch.tensor([same.get(a["category_id"], -1) for a in annotations])
    labels = torch.tensor([a["category_id"] for a in objects])
    crowd = torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations])
    found = (overlap >= SAME_OBJECT) & (mapped[:, None] == labels)
    is_object = found.any(dim=1) & ~crowd
    return boxes[~is_object].float().numpy(), int(is_object.sum())


def _base(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]
