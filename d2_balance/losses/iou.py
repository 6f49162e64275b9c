"""Losses on the overlap of decoded boxes.

    GIoU loss = 1 - IoU + (hull - union) / hull,  hull the area of the smallest enclosing box
    DIoU loss = 1 - IoU + d^2 / c^2,    d the distance of the centres, c the diagonal of the hull
    CIoU loss = DIoU loss + alpha v,    v the difference of the aspect ratios

Sources: Rezatofighi et al., Generalized Intersection over Union, arXiv:1902.09630, algorithm 1;
Zheng et al., Distance-IoU Loss, arXiv:1911.08287, equations 7 and 10. Mean over positives.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from .base import BOX_LOSSES, BoxLoss


@BOX_LOSSES.register()
class GIoU(BoxLoss):
    """Generalised IoU loss (arXiv:1902.09630), in [0, 2] per box."""

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return generalized_box_iou_loss(pred, target)


@BOX_LOSSES.register()
class DIoU(BoxLoss):
    """Distance IoU loss (arXiv:1911.08287, equation 7), in [0, 2] per box."""

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return distance_box_iou_loss(pred, target)


@BOX_LOSSES.register()
class CIoU(BoxLoss):
    """Complete IoU loss (arXiv:1911.08287, equation 10), at least 0 per box."""

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return complete_box_iou_loss(pred, target)
