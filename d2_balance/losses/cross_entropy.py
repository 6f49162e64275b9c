"""Cross-entropy: the baselines, and the balanced form of the focal loss paper.

    sigmoid   CE = -y log p - (1 - y) log(1 - p),  p = sigmoid(z)           (per class)
    balanced  CE = -alpha y log p - (1 - alpha) (1 - y) log(1 - p)
    softmax   CE = -log softmax(z)_label                                    (K + 1 classes)

Source of the balanced form: Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002,
section 3.1, equation 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses, softplus
from ._samples import Samples

Weight = float | Tensor | Callable[[slice], Tensor]


def sigmoid_ce_loss(logits: Tensor, onehot: Tensor) -> Tensor:
    """Binary cross-entropy of every class of every sample.

    Args:
        logits: (R, K).
        onehot: (R, K) in [0, 1].

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> sigmoid_ce_loss(logits, onehot)
        tensor([[0.1269, 0.3133, 0.6931],
                [0.6931, 0.9741, 0.1269]])
    """
    return F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")


def balanced_ce_loss(logits: Tensor, onehot: Tensor, alpha: float) -> Tensor:
    """Binary cross-entropy with weight `alpha` on positives and `1 - alpha` on negatives.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        alpha: weight of positives, in [0, 1].

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> balanced_ce_loss(logits, onehot, alpha=0.75)
        tensor([[0.0952, 0.0783, 0.1733],
                [0.1733, 0.2435, 0.0317]])
    """
    return sigmoid_ce_loss(logits, onehot) * (onehot * (2 * alpha - 1) + (1 - alpha))


class NegativeCE:
    """Weighted cross-entropy of negatives, for `entry_losses`.

    Args:
        weight: one number, (C,) per column, or a function from a slice of r samples to (r, C).
    """

    def __init__(self, weight: Weight = 1.0) -> None:
        self.weight = weight

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        softplus(logits, out=value)
        if grad is not None:
            torch.sigmoid(logits, out=grad)
        scale_negatives(self.weight, chunk, value, grad)


def scale_negatives(weight: Weight, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
    """Multiply the losses and the gradients of a chunk by the weight of `NegativeCE`."""
    weight = weight(chunk) if callable(weight) else weight
    if isinstance(weight, Tensor) or weight != 1:
        value.mul_(weight)
        if grad is not None:
            grad.mul_(weight)


def weighted_ce(samples: Samples, weight: Weight, own_weight: float | Tensor) -> Tensor:
    """Binary cross-entropy with a weight for each entry.

    Args:
        samples: K columns of logits.
        weight: of negatives, see `NegativeCE`.
        own_weight: number or (R, 1), weight of the entry in `samples.column`.

    Returns:
        (R, K).
    """
    return entry_losses(
        samples.logits,
        samples.column,
        NegativeCE(weight),
        lambda own: sigmoid_ce_loss(own, samples.hit) * own_weight,
    )


@CLS_LOSSES.register("SigmoidCE")
class SigmoidCELoss(ClassificationLoss):
    """One binary cross-entropy per class: the baseline of all sigmoid losses.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> SigmoidCELoss()(logits, labels)
        tensor([[0.1269, 0.3133, 0.6931],
                [0.6931, 0.9741, 0.1269]])
    """

    elementwise = True
    activation = "sigmoid"

    def compute(self, samples: Samples) -> Tensor:
        return weighted_ce(samples, 1.0, 1.0)


@CLS_LOSSES.register("BalancedCE")
class BalancedCELoss(ClassificationLoss):
    """Sigmoid cross-entropy with a fixed weight for positives (arXiv:1708.02002, equation 3).

    Args:
        alpha: weight of positives, in [0, 1]; negatives get `1 - alpha`.

    Raises:
        ValueError: alpha out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> BalancedCELoss(alpha=0.75)(logits, labels)
        tensor([[0.0952, 0.0783, 0.1733],
                [0.1733, 0.2435, 0.0317]])
    """

    elementwise = True
    activation = "sigmoid"

    def __init__(self, *, alpha: float = 0.75) -> None:
        super().__init__()
        check(self, "alpha", alpha, 0 <= alpha <= 1, "a number in [0, 1]")
        self.alpha = alpha

    def compute(self, samples: Samples) -> Tensor:
        return entry_losses(
            samples.logits,
            samples.column,
            NegativeCE(1 - self.alpha),
            lambda own: balanced_ce_loss(own, samples.hit, self.alpha),
        )


@CLS_LOSSES.register("SoftmaxCE")
class SoftmaxCELoss(ClassificationLoss):
    """Softmax cross-entropy over K classes and background: Fast R-CNN's stock loss.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> SoftmaxCELoss()(logits, labels)
        tensor([0.1698, 0.5239])
    """

    elementwise = True
    activation = "softmax"

    def compute(self, samples: Samples) -> Tensor:
        return F.cross_entropy(samples.logits, samples.labels, reduction="none")
