"""Focal loss.

    FL(z) = -alpha_t (1 - p_t)^gamma log p_t,   p_t = p for positives, 1 - p for negatives

With the margin x = z for positives and -z for negatives: p_t = sigmoid(x), -log p_t = ce(x), and
1 - p_t = exp(-x - ce(x)), so that one logsigmoid serves all three and nothing overflows.

Source: Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002, equation 5.
The mean is over the anchors assigned to an object; Detectron2 takes a moving average of their
number, and so does `BalancedRetinaNet`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses, softplus
from ._samples import Samples


def focal_loss(logits: Tensor, onehot: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every class of every sample.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        alpha: weight of positives in [0, 1], negatives get `1 - alpha`; negative: no weights.
        gamma: focusing exponent, at least 0.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> focal_loss(logits, onehot, alpha=0.25, gamma=2.0)
        tensor([[0.0005, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """
    margin = logits * (2 * onehot - 1)
    ce = -F.logsigmoid(margin)
    loss = ce * torch.exp(-gamma * (margin + ce))
    return loss if alpha < 0 else loss * (onehot * (2 * alpha - 1) + (1 - alpha))


class NegativeFocal:
    """w p^gamma ce(p) of negatives for `entry_losses`, with ce = -log(1 - p).

    The derivative by the logit is w p^gamma (gamma (1 - p) ce + p).

    Args:
        weight: w, a number or (C,).
        gamma: focusing exponent, a number or (C,).
    """

    def __init__(self, weight: float | Tensor, gamma: float | Tensor) -> None:
        self.weight, self.gamma = weight, gamma

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        ce, prob = softplus(logits, out=value), logits.sigmoid()
        factor = self._modulation(logits, ce, prob)
        if grad is not None:
            torch.addcmul(ce, ce, prob, value=-1, out=grad)  # (1 - p) ce
            if isinstance(self.gamma, Tensor):
                grad.mul_(self.gamma).add_(prob)
            else:
                torch.add(prob, grad, alpha=self.gamma, out=grad)
            grad.mul_(factor)
        ce.mul_(factor)

    def _modulation(self, logits: Tensor, ce: Tensor, prob: Tensor) -> Tensor:
        """(r, C) new tensor w p^gamma."""
        if isinstance(self.gamma, Tensor):  # log p = z - ce
            factor = (logits - ce).mul_(self.gamma).exp_()
        elif self.gamma == 2:  # a product takes a fifth of the time of `pow`
            factor = prob * prob
        else:
            factor = prob.pow(self.gamma)
        plain = not isinstance(self.weight, Tensor) and self.weight == 1
        return factor if plain else factor.mul_(self.weight)


@CLS_LOSSES.register("Focal")
class FocalLoss(ClassificationLoss):
    """Focal loss (arXiv:1708.02002, equation 5), RetinaNet's stock loss.

    Args:
        alpha: weight of positives in [0, 1], negatives get `1 - alpha`; -1: no weights.
        gamma: focusing exponent, at least 0; 0 gives the balanced cross-entropy.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> FocalLoss(gamma=2.0)(logits, labels)
        tensor([[0.0005, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """

    elementwise = True
    activation = "sigmoid"
    weighs_difficulty = True

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        check(self, "alpha", alpha, alpha == -1 or 0 <= alpha <= 1, "a number in [0, 1], or -1")
        check(self, "gamma", gamma, gamma >= 0, "a number of at least 0")
        self.alpha, self.gamma = alpha, gamma

    def compute(self, samples: Samples) -> Tensor:
        return entry_losses(
            samples.logits,
            samples.column,
            NegativeFocal(1.0 if self.alpha < 0 else 1 - self.alpha, self.gamma),
            lambda own: focal_loss(own, samples.hit, self.alpha, self.gamma),
        )
