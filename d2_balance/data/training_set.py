"""The records of DATASETS.TRAIN with what Detectron2 does not add: their set and its regions."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from .ignore_regions import add_regions, region_files

SOURCE = "dataset"
"""Key of a record: the dataset that it comes from."""


def training_records(cfg: CfgNode) -> list[dict[str, Any]] | None:
    """All training sets one after the other, as Detectron2's loader puts them together.

    Records are copies with the name of their set under `dataset`, and with the regions of
    DATASETS.IGNORE_REGIONS.

    Returns:
        The records; None where a set is no list of dicts.

    Raises:
        ValueError: a file of regions cannot be used.
    """
    regions = region_files(cfg)
    points = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else ()
    result = []
    for number, name in enumerate(cfg.DATASETS.TRAIN):
        records = get_detection_dataset_dicts(
            [name],
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=int(points),
            proposal_files=files[number : number + 1] or None,
        )
        if not isinstance(records, list):
            return None
        for region in regions:
            if region.dataset == name:
                records = add_regions(records, region)
        result += [record | {SOURCE: name} for record in records]
    return result
