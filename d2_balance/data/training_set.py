"""The records of DATASETS.TRAIN with what Detectron2 does not add: their set and its regions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.build import print_instances_class_histogram

from .catalog.external import is_external
from .catalog.metadata import loaded_metadata
from .ignore_regions import add_regions, region_files
from .records import Records, changed, join, objects_of, subset, without_bad_masks

logger = logging.getLogger(__name__)

SOURCE = "dataset"
"""Key of a record: the dataset that it comes from."""


def training_records(cfg: CfgNode) -> Sequence[dict[str, Any]] | None:
    """All training sets one after the other, as Detectron2's loader puts them together.

    Records are copies with the name of their set under `dataset`, and with the regions of
    DATASETS.IGNORE_REGIONS. Those of annotation files are made when they are asked for.

    Returns:
        The records; None where a set is no list of dicts.

    Raises:
        ValueError: a file of regions cannot be used, or no image is left.
    """
    regions = region_files(cfg)
    points = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else ()
    parts = []
    for number, name in enumerate(cfg.DATASETS.TRAIN):
        records = DatasetCatalog.get(name)
        if isinstance(records, Records) and not points and not files:
            records = _trained(cfg, records, name)
        else:
            records = get_detection_dataset_dicts(
                [name],
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=int(points),
                proposal_files=files[number : number + 1] or None,
            )
        if not isinstance(records, list | Records):
            return None
        for region in regions:
            if region.dataset == name:
                records = add_regions(records, region)
        parts.append(changed(records, partial(_named, name)))
    joined = join(parts)
    if isinstance(joined, Records):
        joined.sources = [
            name
            for name, part in zip(cfg.DATASETS.TRAIN, parts, strict=True)
            for _ in range(len(part))
        ]
    return joined


def sources(records: Sequence[dict[str, Any]]) -> Sequence[str]:
    """The dataset of each of the `training_records`."""
    if isinstance(records, Records) and records.sources is not None:
        return records.sources
    return [record[SOURCE] for record in records]


def _trained(
    cfg: CfgNode, records: Sequence[dict[str, Any]], name: str
) -> Sequence[dict[str, Any]]:
    """The records that Detectron2's loader keeps, with its table of classes."""
    if cfg.MODEL.MASK_ON and not is_external(name):
        records = without_bad_masks(records)
    objects = objects_of(records)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = np.flatnonzero(objects.with_objects())
        logger.info(f"Removed {len(records) - len(kept)} images with no usable annotations.")
        if not len(kept):
            raise ValueError(f"the dataset {name!r} has no image with an object to train on")
        records = subset(records, kept)
    objects = objects_of(records)
    names = loaded_metadata(name).thing_classes
    counts = objects.counts(len(names)).instance_count.tolist()
    one_of_each = [{"category_id": k} for k in range(len(names))]
    every = [one for one, count in zip(one_of_each, counts, strict=True) for _ in range(count)]
    print_instances_class_histogram([{"annotations": every}], names)
    return records


def _named(name: str, _: int, record: dict[str, Any]) -> dict[str, Any]:
    return record | {SOURCE: name}
