"""Losses on the overlap of decoded boxes.

    GIoU loss = 1 - IoU + (enclosing area - union) / enclosing area

Source: Rezatofighi et al., Generalized Intersection over Union, arXiv:1902.09630, algorithm 1.
"""

from __future__ import annotations

from fvcore.nn import giou_loss
from torch import Tensor

from .base import BOX_LOSSES, BoxLoss


@BOX_LOSSES.register()
class GIoU(BoxLoss):
    """Generalised IoU loss (arXiv:1902.09630), in [0, 2] per box."""

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return giou_loss(pred, target, reduction="none")
