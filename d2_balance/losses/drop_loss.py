"""DropLoss: EQL, and background rows drop tail classes at random.

    w_ij = 1 - T_j (1 - y_ij)                  for a foreground row i
           1 - T_j B_ij,  B_ij ~ Bernoulli(1 - rho)   for a background row i
    rho  = share of the foreground rows whose class is a tail class

Source: Hsieh et al., DropLoss for Long-Tail Instance Segmentation, arXiv:2104.06402, equations 4
to 7. Mean over rows; rho is of this process. Without a foreground row rho is 1: nothing is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import CLS_LOSSES
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss, weighted_ce
from .eql import EQLLoss


def drop_loss(
    logits: Tensor, onehot: Tensor, foreground: Tensor, tail: Tensor, dropped: Tensor
) -> Tensor:
    """DropLoss of every class of every row.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        foreground: (R,) bool.
        tail: (K,) T(f) in [0, 1].
        dropped: (R, K) bool, the entries that background rows drop if their class is tail.

    Returns:
        (R, K).
    """
    suppressed = torch.where(foreground.unsqueeze(1), onehot == 0, dropped)
    return sigmoid_ce_loss(logits, onehot) * (1 - tail.to(logits.dtype) * suppressed)


@CLS_LOSSES.register("DropLoss")
class DropLoss(EQLLoss):
    """DropLoss (arXiv:2104.06402) for sigmoid RoI heads.

    Args:
        class_frequency: (K,) share of training images that contain the class, in [0, 1].
        lambda_: classes below this frequency are tail classes (step threshold), in [0, 1].
        threshold: "step", "exponential" or "gompertz".

    Raises:
        ValueError: an argument is out of range.
    """

    all_reduced = False

    def __init__(self, *, class_frequency, lambda_=0.00177, threshold="step") -> None:
        super().__init__(
            class_frequency=class_frequency,
            lambda_=lambda_,
            threshold=threshold,
            use_image_level_labels=False,
        )

    def compute(self, samples: Samples) -> Tensor:
        tail = self.tail.to(samples.logits.dtype)
        one = torch.ones_like(tail)
        fg, own_tail = samples.hit, tail[samples.column]  # (R, 1)
        kept = (fg * own_tail).sum() / fg.sum().clamp(min=1)
        kept = torch.where(fg.any(), kept, torch.ones_like(kept))
        dropped = (torch.rand_like(samples.logits) >= kept).logical_or_(fg)  # (R, K)
        own = 1 - own_tail * (1 - fg) * dropped.gather(1, samples.column)

        def weight(rows: slice) -> Tensor:
            return torch.addcmul(one, tail, dropped[rows].to(tail.dtype), value=-1)

        return weighted_ce(samples, weight, own)
