"""Losses on the overlap of decoded boxes.

    GIoU loss = 1 - IoU + (enclosing area - union) / enclosing area

Source: Rezatofighi et al., Generalized Intersection over Union, arXiv:1902.09630, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from .base import BOX_LOSSES, BoxLoss


@BOX_LOSSES.register()
class GIoU(BoxLoss):
    """Generalised IoU loss (arXiv:1902.09630), in [0, 2] per box."""

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return generalized_box_iou_loss(pred, target)
