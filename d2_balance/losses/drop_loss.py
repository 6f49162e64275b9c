"""DropLoss: EQL, and background samples drop tail classes at random.

    w_ij = 1 - T_j (1 - y_ij)                  for a foreground sample i
           1 - T_j B_ij,  B_ij ~ Bernoulli(1 - rho)   for a background sample i
    rho  = fraction of the foreground samples whose class is a tail class

Source: Hsieh et al., DropLoss for Long-Tail Instance Segmentation, arXiv:2104.06402, equations 4
to 7. Mean over samples; rho is of this process. Without a foreground sample rho is 1:
nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import CLS_LOSSES
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss, weighted_ce
from .eql import EQLLoss, Threshold


def drop_loss(
    logits: Tensor, onehot: Tensor, foreground: Tensor, tail: Tensor, dropped: Tensor
) -> Tensor:
    """DropLoss of every class of every sample.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        foreground: (R,) bool.
        tail: (K,) T(f) in [0, 1].
        dropped: (R, K) bool, the entries that background samples drop if their class is tail.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> foreground, tail = torch.tensor([True, False]), torch.tensor([0.0, 0.0, 1.0])
        >>> drop_loss(logits, onehot, foreground, tail, dropped=torch.zeros(2, 3, dtype=torch.bool))
        tensor([[0.1269, 0.3133, 0.0000],
                [0.6931, 0.9741, 0.1269]])
    """
    suppressed = torch.where(foreground.unsqueeze(1), onehot == 0, dropped)
    return sigmoid_ce_loss(logits, onehot) * (1 - tail.to(logits.dtype) * suppressed)


@CLS_LOSSES.register("DropLoss")
class DropLoss(EQLLoss):
    """DropLoss (arXiv:2104.06402) for sigmoid RoI heads.

    Args:
        class_frequency: (K,) fraction of training images that contain the class, in [0, 1].
        lambda_: classes below this frequency are tail classes (step threshold), in [0, 1].
        threshold: "step", "exponential" or "gompertz".

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> DropLoss(class_frequency=[0.5, 0.1, 0.0001])(logits, labels)
        tensor([[0.1269, 0.3133, 0.0000],
                [0.6931, 0.4741, 0.0000]])
    """

    all_reduced = False

    def __init__(
        self,
        *,
        class_frequency: Tensor | Sequence[float],
        lambda_: float = 0.00177,
        threshold: Threshold = "step",
    ) -> None:
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

        def weight(chunk: slice) -> Tensor:
            return torch.addcmul(one, tail, dropped[chunk].to(tail.dtype), value=-1)

        return weighted_ce(samples, weight, own)
