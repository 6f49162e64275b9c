"""Hard negative mining: the hardest background anchors, a few for each positive (SSD).

For an image with P positives and M background anchors, the positives and the min(r P, M) background
anchors of highest classification loss train. With L_i the loss of anchor i and A the sum over the
images of max(P, 1),

    loss_cls = sum_i [i is kept] L_i / A,   loss_box_reg = sum_{positives} / A

An image without positives trains nothing, unless `min_negatives` is above 0.

Source: Liu et al., SSD: Single Shot MultiBox Detector, arXiv:1512.02325, section 2.2.
`min_negatives` is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2_balance.losses import Samples
from d2_balance.losses._base import check
from d2_balance.losses._kernels.ranks import rank_within

from .base import ANCHOR_SAMPLERS, AnchorSampler


def positives_per_image(samples: Samples) -> Tensor:
    """(N,) int64 number of positives of each image."""
    positive = samples.foreground.long()
    if samples.image_index is None:
        return positive.sum().unsqueeze(0)
    return positive.new_zeros(samples.images).index_add_(0, samples.image_index, positive)


def hard_negatives(samples: Samples, loss: Tensor, ratio: float, min_negatives: int = 0) -> Tensor:
    """Choose the positives and the hardest negatives of every image.

    Args:
        samples: R anchors of N images.
        loss: (R,) classification loss of each.
        ratio: negatives for each positive, above 0.
        min_negatives: negatives of an image at least, if it has as many.

    Returns:
        (R,) bool.
    """
    wanted = (positives_per_image(samples) * ratio).floor().long().clamp(min=min_negatives)  # (N,)
    image = samples.image_index
    if image is None:
        image = torch.zeros_like(samples.labels)
    # positives form one more group, so that ranks are among the negatives of an image
    group = torch.where(samples.foreground, len(wanted), image)
    rank = rank_within(group, loss.detach().argsort(descending=True, stable=True))
    return samples.foreground | (rank < wanted[image])


@ANCHOR_SAMPLERS.register()
class HardNegatives(AnchorSampler):
    """Hard negative mining of SSD (arXiv:1512.02325) for RetinaNet, FCOS and the RPN.

    Args:
        ratio: background anchors for each positive of an image, above 0.
        min_negatives: background anchors of an image at least, also without positives; at least 0.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, ratio: float = 3.0, min_negatives: int = 0) -> None:
        super().__init__()
        check(self, "ratio", ratio, ratio > 0, "a number above 0")
        known = min_negatives >= 0
        check(self, "min_negatives", min_negatives, known, "an integer of at least 0")
        self.ratio, self.min_negatives = ratio, min_negatives

    def forward(self, samples: Samples, loss: Tensor) -> Tensor:
        return hard_negatives(samples, loss, self.ratio, self.min_negatives)
