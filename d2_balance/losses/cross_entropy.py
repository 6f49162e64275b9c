"""Cross-entropy: the baselines, and the balanced form of the focal loss paper.

    sigmoid   CE = -y log p - (1 - y) log(1 - p),  p = sigmoid(z)           (per class)
    balanced  CE = -alpha y log p - (1 - alpha) (1 - y) log(1 - p)
    softmax   CE = -log softmax(z)_label                                    (K + 1 classes)

Source of the balanced form: Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002,
section 3.1, equation 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import CLS_LOSSES, ClassificationLoss, check
from .samples import Samples


def sigmoid_ce_loss(logits: Tensor, onehot: Tensor) -> Tensor:
    """Binary cross-entropy of every class of every row.

    Args:
        logits: (R, K).
        onehot: (R, K) in [0, 1].

    Returns:
        (R, K).
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
    """
    return sigmoid_ce_loss(logits, onehot) * (onehot * (2 * alpha - 1) + (1 - alpha))


@CLS_LOSSES.register()
class SigmoidCE(ClassificationLoss):
    """One binary cross-entropy per class: the baseline of all sigmoid losses."""

    elementwise = True
    activation = "sigmoid"

    def compute(self, samples: Samples) -> Tensor:
        return sigmoid_ce_loss(samples.logits, samples.onehot)


@CLS_LOSSES.register()
class BalancedCE(ClassificationLoss):
    """Sigmoid cross-entropy with a fixed weight for positives (arXiv:1708.02002, equation 3).

    Args:
        alpha: weight of positives, in [0, 1]; negatives get `1 - alpha`.

    Raises:
        ValueError: alpha out of range.
    """

    elementwise = True
    activation = "sigmoid"

    def __init__(self, *, alpha: float = 0.75) -> None:
        super().__init__()
        check(self, "alpha", alpha, 0 <= alpha <= 1, "a number in [0, 1]")
        self.alpha = alpha

    def compute(self, samples: Samples) -> Tensor:
        return balanced_ce_loss(samples.logits, samples.onehot, self.alpha)


@CLS_LOSSES.register()
class SoftmaxCE(ClassificationLoss):
    """Softmax cross-entropy over K classes and background: Fast R-CNN's stock loss."""

    elementwise = True
    activation = "softmax"

    def compute(self, samples: Samples) -> Tensor:
        return F.cross_entropy(samples.logits, samples.labels, reduction="none")
