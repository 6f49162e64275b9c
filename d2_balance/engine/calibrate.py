"""The pass over the training set behind `d2-balance calibrate`."""

from __future__ import annotations

import itertools
import math

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from d2_balance.data.checks.classes import configured_num_classes
from d2_balance.data.class_counts import ClassCounts
from d2_balance.modeling.postprocess.statistics import (
    CalibrationStatistics,
    dataset_dimensions,
    logit_statistics,
)
from d2_balance.utils.config_tree import changed
from d2_balance.utils.progress import progress

from .trainer import BalancedTrainer


def measure(cfg: CfgNode, max_iter: int = 0) -> CalibrationStatistics:
    """Measure the statistics of a training set and, with MODEL.WEIGHTS, of a model on it.

    Args:
        cfg: full config; its datasets are registered.
        max_iter: training batches of the pass; 0 is one epoch.

    Raises:
        ValueError: there is no training set, or the model has no single classifier.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; must name the training set.")
    num_classes = configured_num_classes(cfg)
    counts = ClassCounts.from_config(cfg)
    dimension = tuple(dataset_dimensions(tuple(cfg.DATASETS.TRAIN), num_classes).tolist())
    if not cfg.MODEL.WEIGHTS:
        return CalibrationStatistics(counts.class_names, dimension)
    model = BalancedTrainer.build_model(changed(cfg, {"MODEL.BALANCE.CALIBRATION.NAME": ""}))
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    steps = max_iter or math.ceil(counts.num_images / cfg.SOLVER.IMS_PER_BATCH)
    batches = itertools.islice(iter(BalancedTrainer.build_train_loader(cfg)), steps)
    logits = logit_statistics(
        model, progress(batches, "counting logits", steps, unit="batches"), num_classes
    )
    return CalibrationStatistics(
        counts.class_names, dimension, tuple(logits.mean.tolist()), tuple(logits.variance.tolist())
    )
