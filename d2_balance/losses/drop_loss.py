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
from .cross_entropy import Weight, sigmoid_ce_loss, weighted_ce
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


STEPS = 2**15  # of the random numbers, which makes rho exact to 3e-5


@torch.no_grad()
def drop_noise(logits: Tensor) -> Tensor:
    """Random integers in [0, STEPS), int16 of the shape of the logits.

    Four come from one 64-bit number: a float for each entry takes as long as the loss.
    """
    words = logits.new_empty((logits.numel() + 3) // 4, dtype=torch.int64).random_()
    words &= 0x7FFF_7FFF_7FFF_7FFF
    return words.view(torch.int16)[: logits.numel()].view(logits.shape)


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
        noise = drop_noise(samples.logits)  # (R, K), dropped where above `most`
        most = (((kept * STEPS).round() * (1 - fg)) - 1).to(noise.dtype)  # (R, 1)
        own = 1 - own_tail * (1 - fg) * (noise.gather(1, samples.column) > most)

        def weight(chunk: slice) -> Tensor:
            dropped = torch.empty_like(noise[chunk], dtype=tail.dtype)
            torch.gt(noise[chunk], most[chunk], out=dropped)  # a mask would be slower to multiply
            return torch.addcmul(one, tail, dropped, value=-1)

        return self.weighted(samples, weight, own)

    def weighted(self, samples: Samples, weight: Weight, own_weight: float | Tensor) -> Tensor:
        """As `weighted_ce`."""
        return weighted_ce(samples, weight, own_weight)
