"""Reads COCO- and LVIS-style annotation files into Detectron2's standard dicts."""

import logging
import mmap
import os
import re
from collections import Counter
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .checks.annotations import Findings, find_bad_annotations, remember
from .checks.structure import IMAGE_LABEL_KEYS, category_name, check_structure
from .file_counts import content_key, count, file_state, keep, known_content
from .groups import GROUPS
from .json_files import parse_json, read_content
from .json_files import read_json as read_json  # imported from here by others

_LVIS_MARKS = (rb'"neg_category_ids"\s*:\s*\[', rb'"frequency"\s*:\s*"[rcf]"')
_SHOWN = 5

logger = logging.getLogger(__name__)


def annotation_style(json_file: str) -> str:
    """Style of a file: "lvis" if it has verified negatives or groups r, c, f; else "coco".

    Looks at the text without parsing it, so that a large file is told apart in a second.
    """
    with open(PathManager.get_local_path(json_file), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return "coco"  # an empty file cannot be mapped; reading it raises later
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return "lvis" if any(re.search(mark, text) for mark in _LVIS_MARKS) else "coco"


def load_json(json_file: str, image_root: str, name: str | None = None) -> list[dict[str, Any]]:
    """Load a COCO- or LVIS-style file as Detectron2's standard dicts.

    Works without ``segmentation``, ``coco_url``, ``frequency`` and contiguous ids. Images are
    found by ``file_name``, else by the last two parts of ``coco_url``, else by its last part,
    whichever exists below ``image_root``. Objects with ``ignore: 1`` are treated as crowds.

    Args:
        json_file: the annotation file.
        image_root: the directory of the images.
        name: a registered name. If given, the metadata of that name get thing_classes,
            thing_dataset_id_to_contiguous_id, class_image_count and, where the file has them,
            class_group (K letters of "rcf") and class_synset (K texts or None).

    Returns:
        One dict per image, by ascending image id: file_name, height, width, image_id,
        annotations (bbox XYWH_ABS in pixels, category_id in [0, K), segmentation and iscrowd where
        the file has them), and neg_category_ids / not_exhaustive_category_ids (raw ids) where the
        file has them.

    Raises:
        ValueError: for a file that cannot be trained on, or missing images. Single bad
            annotations are left out and reported, see `bad_annotations`.
    """
    state, content = file_state(json_file), read_content(json_file)
    data, key = parse_json(content, json_file), content_key(content)
    del content
    check_structure(data, json_file)
    images, annotations = data["images"], data["annotations"]
    file_names = find_images(images, image_root, json_file)
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in images}
    findings = find_bad_annotations(annotations, sizes, json_file)
    # class statistics will be asked for: counted here, the file is not read for them again
    keep(json_file, state, key, known_content(key) or count(data, findings.skip))
    category_ids = sorted(category["id"] for category in data["categories"])
    contiguous_id = {raw: index for index, raw in enumerate(category_ids)}

    records = {}
    for image, file_name in zip(images, file_names, strict=True):
        height, width = sizes[image["id"]]
        record = {"file_name": file_name, "height": height, "width": width}
        record["image_id"] = image["id"]
        record |= {key: image[key] for key in IMAGE_LABEL_KEYS if key in image}
        records[image["id"]] = record | {"annotations": []}
    for position, annotation in enumerate(annotations):
        if position not in findings.skip:
            records[annotation["image_id"]]["annotations"].append(
                _standard_annotation(annotation, position, contiguous_id, findings)
            )
    order = sorted(records, key=lambda image_id: (isinstance(image_id, str), image_id))
    dataset_dicts = [records[image_id] for image_id in order]
    if name is not None:
        remember(name, findings.report)
        MetadataCatalog.get(name).set(**_metadata(data, contiguous_id, dataset_dicts))
    logger.info("Loaded %d images from %s", len(dataset_dicts), json_file)
    return dataset_dicts


def find_images(images: list[dict[str, Any]], image_root: str, json_file: str) -> list[str]:
    """Path of every image; each directory is listed once, which is faster than asking per file.

    Raises:
        ValueError: with the number of missing images and the first names.
    """
    directories: dict[str, frozenset[str]] = {}
    paths, missing = [], []
    for image in images:
        candidates = image_places(image)
        if not candidates:
            raise ValueError(
                f"{json_file}: image {image['id']} has neither 'file_name' nor 'coco_url'; one of "
                "them must be given"
            )
        for candidate in candidates:
            path = os.path.join(image_root, candidate)
            directory, base = os.path.split(path)
            if directory not in directories:
                exists = PathManager.isdir(directory)
                directories[directory] = frozenset(PathManager.ls(directory) if exists else ())
            if base in directories[directory]:
                paths.append(path)
                break
        else:
            missing.append(candidates[0])
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(
            f"{json_file}: {len(missing)} of {len(images)} images are missing below "
            f"{image_root}: {shown}; the image directory must hold every file_name (or the last "
            "one or two parts of coco_url)"
        )
    return paths


def image_places(image: dict[str, Any]) -> list[str]:
    """Places below the image directory where an image may lie, the likeliest first."""
    candidates = [image["file_name"]] if image.get("file_name") else []
    if image.get("coco_url"):
        parts = image["coco_url"].split("/")
        candidates += ["/".join(parts[-2:]), parts[-1]]
    return candidates


def _standard_annotation(
    annotation: dict[str, Any],
    position: int,
    contiguous_id: dict[int, int],
    findings: Findings,
) -> dict[str, Any]:
    result = {
        "bbox": findings.boxes.get(position, annotation["bbox"]),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous_id[annotation["category_id"]],
    }
    if "iscrowd" in annotation or annotation.get("ignore"):
        result["iscrowd"] = int(bool(annotation.get("iscrowd") or annotation.get("ignore")))
    segmentation = findings.segmentations.get(position, annotation.get("segmentation"))
    if segmentation:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        result["segmentation"] = segmentation
    return result


def _metadata(
    data: dict[str, Any], contiguous_id: dict[int, int], dataset_dicts: list[dict]
) -> dict[str, Any]:
    categories = sorted(data["categories"], key=lambda category: category["id"])
    counts = [category.get("image_count") for category in categories]
    if not all(isinstance(count, int) for count in counts):
        present = Counter(
            class_id
            for record in dataset_dicts
            for class_id in {
                annotation["category_id"]
                for annotation in record["annotations"]
                if not annotation.get("iscrowd", 0)
            }
        )
        counts = [present[index] for index in range(len(categories))]
    metadata = {
        "thing_classes": [category_name(category) for category in categories],
        "thing_dataset_id_to_contiguous_id": contiguous_id,
        "class_image_count": [
            {"id": category["id"], "image_count": count}
            for category, count in zip(categories, counts, strict=True)
        ],
    }
    if any(category.get("synset") for category in categories):
        metadata["class_synset"] = [category.get("synset") for category in categories]
    groups = [category.get("frequency") for category in categories]
    if all(group in tuple(GROUPS) for group in groups):
        metadata["class_group"] = groups
    return metadata
