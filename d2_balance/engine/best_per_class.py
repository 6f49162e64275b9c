"""Inference that keeps the best detections of each class instead of those of each image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_context
from torch import nn

from d2_balance.evaluation.evaluators import COCOGroupEvaluator

_LIMITS = {"test_topk_per_image": -1, "max_detections_per_image": sys.maxsize}
"""What Detectron2's heads call their limit of an image, and what turns it off."""


def check_best_per_class(cfg: CfgNode) -> None:
    """Check TEST.DETECTIONS_PER_CLASS.

    Raises:
        ValueError: it is below 0, or another key does not go with it.
    """
    limit = cfg.TEST.DETECTIONS_PER_CLASS
    if limit < 0:
        raise ValueError(f"TEST.DETECTIONS_PER_CLASS is {limit}; it must be at least 0.")
    for key, on in (
        ("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED),
        ("MODEL.BALANCE.MASKNESS", cfg.MODEL.BALANCE.MASKNESS > 0),
    ):
        if limit and on:
            raise ValueError(
                f"TEST.DETECTIONS_PER_CLASS does not work with {key}; switch one of them off."
            )


@contextmanager
def best_per_class(
    model: nn.Module,
    evaluator: DatasetEvaluator,
    build_loader: Callable[[], Iterable[list[dict]]],
) -> Iterator[None]:
    """A block in which the model gives all detections that may be among the best of their classes.

    The least score of each class that still counts rises while the images go by, and is the score
    threshold of the model. A model with masks looks at all images without them first, so that masks
    are made for detections that count only.

    Args:
        model: Detectron2's or ours, its heads with a score threshold.
        evaluator: has `keep_per_class`.
        build_loader: returns the loader of the test set.

    Raises:
        ValueError: a model or an evaluator that this does not work with.
    """
    heads = [module for module in model.modules() if hasattr(module, "test_score_thresh")]
    if not heads or not isinstance(evaluator, COCOGroupEvaluator):
        what = f"the model {type(model).__name__}" if not heads else type(evaluator).__name__
        raise ValueError(
            f"TEST.DETECTIONS_PER_CLASS does not work with {what}; it needs a detector with a "
            "score threshold, and a dataset in COCO's or LVIS's format. Set it to 0."
        )
    own: Any = getattr(model, "module", model)
    with _running_thresholds(heads, evaluator, own.device):
        if getattr(getattr(own, "roi_heads", None), "mask_on", False):
            _look_without_masks(own, evaluator, build_loader())
        yield


@contextmanager
def _running_thresholds(
    heads: Sequence[Any], evaluator: COCOGroupEvaluator, device: torch.device
) -> Iterator[None]:
    """A block in which the evaluator sets the score thresholds of the heads."""
    names = ("test_score_thresh", *_LIMITS)
    before = [{k: getattr(head, k) for k in names if hasattr(head, k)} for head in heads]

    def raise_thresholds(floors: np.ndarray) -> None:
        # scores must be above a threshold, and those on the floor count
        below = torch.from_numpy(np.nextafter(floors, np.float32(-1))).to(device)
        for head, kept in zip(heads, before, strict=True):
            # a dataset may lack classes of the model
            thresholds = below.new_zeros(max(head.num_classes, len(below)))
            thresholds[: len(below)] = below
            thresholds.clamp_(min=kept["test_score_thresh"])
            head.test_score_thresh = thresholds[: head.num_classes]

    evaluator.when_floors_rise = raise_thresholds
    try:
        for head, kept in zip(heads, before, strict=True):
            for name in kept.keys() & _LIMITS.keys():
                setattr(head, name, _LIMITS[name])
        yield
    finally:
        evaluator.when_floors_rise = None
        for head, kept in zip(heads, before, strict=True):
            for name, value in kept.items():
                setattr(head, name, value)


def _look_without_masks(
    model: Any, evaluator: COCOGroupEvaluator, loader: Iterable[list[dict]]
) -> None:
    """Find the thresholds in a first pass over the images."""
    evaluator.reset()
    model.roi_heads.mask_on = False
    try:
        with inference_context(model), torch.no_grad():
            for batch in loader:
                evaluator.look(batch, model(batch))
    finally:
        model.roi_heads.mask_on = True
    evaluator.keep_floors()
