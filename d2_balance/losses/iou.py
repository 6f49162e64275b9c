"""Losses on the overlap of decoded boxes.

    GIoU loss = 1 - IoU + (hull - union) / hull,  hull the area of the smallest enclosing box
    DIoU loss = 1 - IoU + d^2 / c^2,    d the distance of the centres, c the diagonal of the hull
    CIoU loss = DIoU loss + alpha v,    v the difference of the aspect ratios

Sources: Rezatofighi et al., Generalized Intersection over Union, arXiv:1902.09630, algorithm 1;
Zheng et al., Distance-IoU Loss, arXiv:1911.08287, equations 7 and 10. Mean over positives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import BOX_LOSSES, BoxLoss
from ._samples import paired_iou

_THIN = 1e-4  # pixels; sides below it count as this long in an aspect ratio


_EPS = 1e-7


def _sides(boxes: Tensor) -> Tensor:
    return boxes[:, 2:] - boxes[:, :2]


def _area(sides: Tensor) -> Tensor:
    """(P,) width times height; the backward pass of `prod` is a host-device sync."""
    return sides[:, 0] * sides[:, 1]


def _overlap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) IoU, (P,) union and (P, 2) sides of the hull.

    As torchvision's losses have them, but those pick the boxes that overlap by a mask, a
    host-device sync to learn how many there are.
    """
    low = torch.maximum(pred[:, :2], target[:, :2])
    inter = _area((torch.minimum(pred[:, 2:], target[:, 2:]) - low).clamp(min=0))
    union = _area(_sides(pred)) + _area(_sides(target)) - inter
    low = torch.minimum(pred[:, :2], target[:, :2])
    hull = torch.maximum(pred[:, 2:], target[:, 2:]) - low
    return inter / (union + _EPS), union, hull


def giou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """GIoU loss of P pairs of boxes (P, 4) x0 y0 x1 y1: (P,) in [0, 2].

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> giou_loss(pred, target)
        tensor([0.6667])
    """
    iou, union, hull = _overlap(pred, target)
    area = _area(hull)
    return 1 - iou + (area - union) / (area + _EPS)


def diou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """DIoU loss of P pairs of boxes (P, 4) x0 y0 x1 y1: (P,) in [0, 2].

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> diou_loss(pred, target)
        tensor([0.7436])
    """
    iou, _, hull = _overlap(pred, target)
    centers = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) / 2  # (P, 2)
    return 1 - iou + centers.square().sum(dim=1) / (hull.square().sum(dim=1) + _EPS)


def ciou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """CIoU loss, arXiv:1911.08287, equations 8 to 11; alpha has no gradient.

    torchvision's divides the width by a height of zero: a predicted box that has shrunk to a point
    is NaN there. Here its aspect ratio is that of a flat box. mmdet's differs by up
    to 3e-2: it sets alpha to 0 where the IoU is at most 0.5, and bounds the loss by 2.

    Args:
        pred: (P, 4) x0 y0 x1 y1.
        target: (P, 4).

    Returns:
        (P,), at least 0.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> ciou_loss(pred, target)
        tensor([0.7436])
    """
    difference = _angle(target) - _angle(pred)
    v = 4 / math.pi**2 * difference.square()
    with torch.no_grad():
        alpha = v / (1 - paired_iou(pred, target) + v).clamp(min=1e-7)
    return diou_loss(pred, target) + alpha * v


def _angle(boxes: Tensor) -> Tensor:
    """(P,) arcus tangens of width over height."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    return torch.atan(width / height.clamp(min=_THIN))


@BOX_LOSSES.register("GIoU")
class GIoULoss(BoxLoss):
    """Generalised IoU loss (arXiv:1902.09630), in [0, 2] per box.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> GIoULoss()(pred, target)
        tensor([0.6667])
    """

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return giou_loss(pred, target)


@BOX_LOSSES.register("DIoU")
class DIoULoss(BoxLoss):
    """Distance IoU loss (arXiv:1911.08287, equation 7), in [0, 2] per box.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> DIoULoss()(pred, target)
        tensor([0.7436])
    """

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return diou_loss(pred, target)


@BOX_LOSSES.register("CIoU")
class CIoULoss(BoxLoss):
    """Complete IoU loss (arXiv:1911.08287, equation 10), at least 0 per box.

    Example:
        >>> pred = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> target = torch.tensor([[0.0, 5.0, 10.0, 15.0]])
        >>> CIoULoss()(pred, target)
        tensor([0.7436])
    """

    elementwise = True
    space = "boxes"

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return ciou_loss(pred, target)
