"""Remedies that change nothing on the data of a run, which a user should know before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from d2_balance.data.class_counts import ClassCounts
from d2_balance.losses import (
    BAGSLoss,
    BalancedSoftmaxLoss,
    ClassificationLoss,
    FederatedLoss,
    LogitAdjustedLoss,
    SoftmaxEQLLoss,
)
from d2_balance.losses.eql import EQLLoss, tail_weight

from .build import build_cls_loss

_REPEATING = ("RepeatFactorTrainingSampler", "WeightedRepeatFactorTrainingSampler")


def inert_remedies(cfg: CfgNode, model: nn.Module) -> list[str]:
    """Return a sentence for each remedy that a config names and that changes nothing here.

    Args:
        cfg: config of a training; its training sets are registered.
        model: as the config builds it.
    """
    losses = {
        type(module): module
        for name, module in model.named_modules()
        if isinstance(module, ClassificationLoss) and "proposal_generator" not in name
    }
    try:
        counts = ClassCounts.from_config(cfg)
    except (ValueError, AttributeError, KeyError):  # datasets and models of others
        counts = None
    return _sentences(cfg, losses.values(), counts)


def inert_on(cfg: CfgNode, counts: ClassCounts) -> list[str]:
    """Return the sentences of `inert_remedies` for any dataset, by its counts."""
    loss = build_cls_loss(cfg, counts.num_classes, counts=counts)
    return _sentences(cfg, [loss] if loss is not None else [], counts)


def _sentences(
    cfg: CfgNode, losses: Iterable[ClassificationLoss], counts: ClassCounts | None
) -> list[str]:
    sentences = [text for loss in losses for text in _of_loss(loss)]
    if counts is None:
        return sentences
    checks = (_of_sampler, _of_norcal, _of_proposal_sampler, _of_beta_decay, _of_copy_paste)
    return sentences + [text for check in checks for text in check(cfg, counts)]


def _of_loss(loss: Any) -> Iterator[str]:
    key = f"MODEL.BALANCE.{loss.name.upper()}"
    if isinstance(loss, EQLLoss | SoftmaxEQLLoss):
        tail = tail_weight(loss.class_frequency, loss.lambda_, loss.threshold)
        if not tail.any():
            rarest = _rarest(loss.class_frequency)
            below = f"below {key}.LAMBDA {loss.lambda_:g}"
            if loss.threshold != "step":
                below = f"in the tail of {key}.THRESHOLD {loss.threshold}"
            plain = "GumbelCE" if loss.activation == "gumbel" else "cross-entropy"
            yield (
                f"{loss.name}: no class is {below}; the rarest is in {rarest:.2%} of the training "
                f"images. It trains as {plain}."
            )
    elif isinstance(loss, BAGSLoss):
        if len(loss.group.unique()) == 1:
            yield (
                f"{loss.name}: {key}.CUTS puts all classes into one group; scores are those of a "
                "softmax over all of them."
            )
    elif isinstance(loss, FederatedLoss):
        if int((loss.weight > 0).sum()) <= loss.num_sampled:
            yield (
                f"{loss.name}: {key}.NUM_SAMPLED {loss.num_sampled} is not below the number of "
                "classes; all of them take part in every image."
            )
    elif isinstance(loss, BalancedSoftmaxLoss | LogitAdjustedLoss):
        counts = loss.class_count if isinstance(loss, BalancedSoftmaxLoss) else loss.instance_count
        if _equal(counts):
            yield f"{loss.name}: all classes are equally frequent; no logit is shifted."


def _of_sampler(cfg: CfgNode, counts: ClassCounts) -> Iterator[str]:
    name, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if name not in _REPEATING or cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        return
    rarest = _rarest(counts.frequency)
    if cfg.DATALOADER.REPEAT_FORM in ("rfs", "rfs_linear") and rarest >= threshold:
        yield (
            f"{name}: no class is in fewer images than DATALOADER.REPEAT_THRESHOLD {threshold:g}; "
            f"the rarest is in {rarest:.2%}. No image is repeated."
        )


def _of_copy_paste(cfg: CfgNode, counts: ClassCounts) -> Iterator[str]:
    node, rarest = cfg.DATALOADER.COPY_PASTE, _rarest(counts.frequency)
    if node.ENABLED and rarest >= node.THRESHOLD:
        yield (
            f"DATALOADER.COPY_PASTE: no class is in fewer images than THRESHOLD "
            f"{node.THRESHOLD:g}; the rarest is in {rarest:.2%}. Nothing is pasted."
        )


def _of_norcal(cfg: CfgNode, counts: ClassCounts) -> Iterator[str]:
    if cfg.MODEL.BALANCE.NORCAL.GAMMA and _equal(counts.image_count):
        yield "MODEL.BALANCE.NORCAL: all classes are equally frequent; their order stays."


def _of_proposal_sampler(cfg: CfgNode, counts: ClassCounts) -> Iterator[str]:
    name = cfg.MODEL.BALANCE.PROPOSAL_SAMPLER
    node = cfg.MODEL.BALANCE.get(name.upper(), {})
    key, wanted = "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    if "ROIS_PER_IMAGE" in node:
        key, wanted = f"MODEL.BALANCE.{name.upper()}.ROIS_PER_IMAGE", node.ROIS_PER_IMAGE
    proposals = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
    if name and not cfg.MODEL.LOAD_PROPOSALS and wanted >= proposals:
        yield (
            f"{name}: {key} {wanted} is not below MODEL.RPN.POST_NMS_TOPK_TRAIN {proposals}; no "
            "proposal is left out."
        )


def _of_beta_decay(cfg: CfgNode, counts: ClassCounts) -> Iterator[str]:
    node = cfg.MODEL.BALANCE.BETA_DECAY
    falls = node.AMOUNT > 0 and (node.MODE != "floor" or node.PERIOD < cfg.SOLVER.MAX_ITER)
    if node.ENABLED and not falls:
        yield (
            f"BETA_DECAY: AMOUNT is {node.AMOUNT:g}, PERIOD {node.PERIOD} and SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}; beta never falls."
        )


def _rarest(frequency: Tensor) -> float:
    """Return the lowest frequency of a class that occurs."""
    occurring = frequency[frequency > 0]
    return float(occurring.min()) if len(occurring) else 0.0


def _equal(counts: Tensor) -> bool:
    return bool(torch.all(counts == counts[:1]))
