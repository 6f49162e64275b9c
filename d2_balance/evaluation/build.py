"""The evaluator of a dataset, chosen by its metadata."""

import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from d2_balance.data import ClassCounts

from .evaluators import COCOGroupEvaluator, LVISGroupEvaluator

_BY_GROUP = {"coco": COCOGroupEvaluator, "lvis": LVISGroupEvaluator}
_DETECTRON2: dict[str, Callable[[str, str], DatasetEvaluator]] = {
    "cityscapes_instance": lambda name, _: CityscapesInstanceEvaluator(name),
    "cityscapes_sem_seg": lambda name, _: CityscapesSemSegEvaluator(name),
    "coco_panoptic_seg": lambda name, directory: DatasetEvaluators(
        [
            SemSegEvaluator(name, output_dir=directory),
            COCOEvaluator(name, output_dir=directory),
            COCOPanopticEvaluator(name, directory),
        ]
    ),
    "pascal_voc": lambda name, _: PascalVOCDetectionEvaluator(name),
    "sem_seg": lambda name, directory: SemSegEvaluator(name, output_dir=directory),
}

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Evaluator for a registered dataset, by the `evaluator_type` of its metadata.

    "lvis" and "coco" give the evaluators with AP by frequency group; the groups, where the file
    does not have them, are counted on cfg.DATASETS.TRAIN. Models with keypoints and other types of
    datasets get Detectron2's own evaluators.

    Args:
        cfg: config with DATASETS.TRAIN, MODEL.KEYPOINT_ON and OUTPUT_DIR.
        dataset_name: name in the MetadataCatalog.
        output_dir: directory for predictions and tables; None: OUTPUT_DIR/inference.

    Raises:
        ValueError: a type without evaluator, or TEST.EVAL_MAX_DETS below 0.
    """
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco" and cfg.MODEL.KEYPOINT_ON:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return COCOEvaluator(dataset_name, output_dir=output_dir, kpt_oks_sigmas=sigmas)
    if kind in _BY_GROUP:
        return _BY_GROUP[kind](
            dataset_name,
            output_dir=output_dir,
            max_dets=_max_dets(cfg),
            train_image_count=lambda: _train_counts(cfg),
        )
    if kind in _DETECTRON2:
        return _DETECTRON2[kind](dataset_name, output_dir)
    raise ValueError(
        f"dataset {dataset_name!r} has evaluator_type {kind!r} in its metadata; allowed are "
        + ", ".join(sorted([*_BY_GROUP, *_DETECTRON2]))
    )


def _max_dets(cfg: CfgNode) -> int | None:
    limit = cfg.TEST.get("EVAL_MAX_DETS", 0)
    if limit < 0:
        raise ValueError(
            f"TEST.EVAL_MAX_DETS is {limit}; it must be 0 for the rules' own limit, or the number "
            "of detections that count"
        )
    return limit or None


def _train_counts(cfg: CfgNode) -> dict[str, int] | None:
    """Image count by class name on the training sets, or None where they cannot be read."""
    if "BALANCE" not in cfg.MODEL:
        logger.warning("no class counts: the config lacks MODEL.BALANCE (add_balance_config)")
        return None
    try:
        statistics = ClassCounts.from_config(cfg)
    except (OSError, KeyError, ValueError) as error:
        # Evaluating a checkpoint must be possible where the training set is not.
        logger.warning(f"no class counts of {tuple(cfg.DATASETS.TRAIN)}: {error}")
        return None
    counts = [int(n) for n in statistics.image_count]
    return dict(zip(statistics.class_names, counts, strict=True))
