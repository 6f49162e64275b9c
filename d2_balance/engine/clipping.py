"""Gradient clipping: Detectron2's of single parameters, and of the whole model."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)


def clipped(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> torch.optim.Optimizer:
    """An optimizer that clips gradients before its steps, as SOLVER.CLIP_GRADIENTS says."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
        return maybe_add_gradient_clipping(cfg, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip_all(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_all)
    return optimizer
