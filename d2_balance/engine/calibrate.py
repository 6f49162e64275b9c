"""The pass over the training set behind `d2-balance calibrate`."""

from __future__ import annotations

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from d2_balance.data.checks.classes import configured_num_classes
from d2_balance.data.class_counts import ClassCounts
from d2_balance.modeling.postprocess.statistics import CalibrationStatistics, dataset_dimensions
from d2_balance.utils.config_tree import changed

from .hooks.logit_statistics import collect_logits
from .trainer import BalancedTrainer


def measure(cfg: CfgNode, max_iter: int = 0) -> CalibrationStatistics:
    """Measure the statistics of a training set and, with MODEL.WEIGHTS, of a model on it.

    Args:
        cfg: full config; its datasets are registered.
        max_iter: training batches of the pass; 0 is one epoch.

    Raises:
        ValueError: there is no training set, or the model has no RoI heads.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; must name the training set.")
    num_classes = configured_num_classes(cfg)
    counts = ClassCounts.from_config(cfg)
    dimension = tuple(dataset_dimensions(tuple(cfg.DATASETS.TRAIN), num_classes).tolist())
    if not cfg.MODEL.WEIGHTS:
        return CalibrationStatistics(counts.class_names, dimension)
    key = "MODEL.BALANCE.CALIBRATION."
    cfg = changed(cfg, {key + "NAME": "", key + "MAX_ITER": max_iter})
    model = BalancedTrainer.build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    logits = collect_logits(cfg, BalancedTrainer.build_train_loader, model)
    return CalibrationStatistics.of_values(
        counts.class_names, {"fractal_dimension": dimension, **logits}, cfg.MODEL.WEIGHTS
    )
