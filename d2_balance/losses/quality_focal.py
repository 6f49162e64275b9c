"""Focal losses whose target is the quality of the predicted box.

    QFL = |q - p|^beta BCE(p, q)                          q = IoU on the object's class, 0 elsewhere
    VFL = q BCE(p, q)            where q > 0
          alpha p^gamma BCE(p, 0)  where q = 0

Sources: Li et al., Generalized Focal Loss, arXiv:2006.04388, equation 2; Zhang et al.,
VarifocalNet, arXiv:2008.13367, equation 2. The mean is over positives; the IoU carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses
from ._samples import Samples
from .focal import NegativeFocal


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float) -> Tensor:
    """Quality focal loss of every class of every sample.

    Args:
        logits: (R, K).
        quality: (R, K) in [0, 1], IoU on the object's class, 0 elsewhere.
        beta: focusing exponent, at least 0.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> quality = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> quality_focal_loss(logits, quality, beta=2.0)
        tensor([[0.0034, 0.0227, 0.1733],
                [0.1733, 0.3774, 0.0018]])
    """
    ce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return ce * (quality - logits.sigmoid()).abs().pow(beta)


def varifocal_loss(logits: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Varifocal loss of every class of every sample.

    Args:
        logits: (R, K).
        quality: (R, K) in [0, 1], IoU on the object's class, 0 elsewhere.
        alpha: weight of negatives, at least 0.
        gamma: focusing exponent of negatives, at least 0.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> quality = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> varifocal_loss(logits, quality, alpha=0.75, gamma=2.0)
        tensor([[0.4215, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """
    ce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    negative = alpha * torch.exp(gamma * F.logsigmoid(logits))  # p^gamma, stable at large logits
    return ce * torch.where(quality > 0, quality, negative)


def sample_quality(samples: Samples) -> Tensor:
    """(R, 1) IoU of the decoded box with the object, 0 for background."""
    quality = torch.zeros_like(samples.hit)
    return quality.index_copy_(0, samples.pos, samples.iou.to(quality.dtype).unsqueeze(1))


@CLS_LOSSES.register("QFL")
class QFLLoss(ClassificationLoss):
    """Quality focal loss (arXiv:2006.04388) for dense sigmoid heads.

    Args:
        beta: focusing exponent, at least 0.

    Raises:
        ValueError: beta is negative.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> QFLLoss()(logits, labels)  # without boxes the quality is 1
        tensor([[0.0018, 0.0227, 0.1733],
                [0.1733, 0.3774, 0.0018]])
    """

    elementwise = True
    activation = "sigmoid"
    weighs_difficulty = True

    def __init__(self, *, beta: float = 2.0) -> None:
        super().__init__()
        check(self, "beta", beta, beta >= 0, "a number of at least 0")
        self.beta = beta

    def compute(self, samples: Samples) -> Tensor:
        quality = sample_quality(samples)
        return entry_losses(
            samples.logits,
            samples.column,
            NegativeFocal(1.0, self.beta),
            lambda own: quality_focal_loss(own, quality, self.beta),
        )


@CLS_LOSSES.register("VFL")
class VFLLoss(ClassificationLoss):
    """Varifocal loss (arXiv:2008.13367) for dense sigmoid heads.

    Args:
        alpha: weight of negatives (focal's alpha is that of positives), at least 0.
        gamma: focusing exponent of negatives, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> VFLLoss()(logits, labels)  # without boxes the quality is 1
        tensor([[0.1269, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """

    elementwise = True
    activation = "sigmoid"
    weighs_difficulty = True

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        check(self, "alpha", alpha, alpha >= 0, "a number of at least 0")
        check(self, "gamma", gamma, gamma >= 0, "a number of at least 0")
        self.alpha, self.gamma = alpha, gamma

    def compute(self, samples: Samples) -> Tensor:
        quality = sample_quality(samples)
        return entry_losses(
            samples.logits,
            samples.column,
            NegativeFocal(self.alpha, self.gamma),
            lambda own: varifocal_loss(own, quality, self.alpha, self.gamma),
        )
