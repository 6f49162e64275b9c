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

from .base import CLS_LOSSES, ClassificationLoss, check
from .samples import Samples


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float) -> Tensor:
    """Quality focal loss of every class of every row.

    Args:
        logits: (R, K).
        quality: (R, K) in [0, 1], IoU on the object's class, 0 elsewhere.
        beta: focusing exponent, at least 0.

    Returns:
        (R, K).
    """
    ce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return ce * (quality - logits.sigmoid()).abs().pow(beta)


def varifocal_loss(logits: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Varifocal loss of every class of every row.

    Args:
        logits: (R, K).
        quality: (R, K) in [0, 1], IoU on the object's class, 0 elsewhere.
        alpha: weight of negatives, at least 0.
        gamma: focusing exponent of negatives, at least 0.

    Returns:
        (R, K).
    """
    ce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    negative = alpha * torch.exp(gamma * F.logsigmoid(logits))  # p^gamma, stable at large logits
    return ce * torch.where(quality > 0, quality, negative)


def quality_targets(samples: Samples) -> Tensor:
    """(R, K) IoU of the decoded box on the object's class, 0 elsewhere."""
    quality = torch.zeros_like(samples.onehot)
    quality[samples.pos, samples.labels[samples.pos]] = samples.iou.to(quality.dtype)
    return quality


@CLS_LOSSES.register()
class QFL(ClassificationLoss):
    """Quality focal loss (arXiv:2006.04388) for dense sigmoid heads.

    Args:
        beta: focusing exponent, at least 0.

    Raises:
        ValueError: beta is negative.
    """

    elementwise = True
    activation = "sigmoid"

    def __init__(self, *, beta: float = 2.0) -> None:
        super().__init__()
        check(self, "beta", beta, beta >= 0, "a number of at least 0")
        self.beta = beta

    def compute(self, samples: Samples) -> Tensor:
        return quality_focal_loss(samples.logits, quality_targets(samples), self.beta)


@CLS_LOSSES.register()
class VFL(ClassificationLoss):
    """Varifocal loss (arXiv:2008.13367) for dense sigmoid heads.

    Args:
        alpha: weight of negatives (focal's alpha is that of positives), at least 0.
        gamma: focusing exponent of negatives, at least 0.

    Raises:
        ValueError: an argument is out of range.
    """

    elementwise = True
    activation = "sigmoid"

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        check(self, "alpha", alpha, alpha >= 0, "a number of at least 0")
        check(self, "gamma", gamma, gamma >= 0, "a number of at least 0")
        self.alpha, self.gamma = alpha, gamma

    def compute(self, samples: Samples) -> Tensor:
        return varifocal_loss(samples.logits, quality_targets(samples), self.alpha, self.gamma)
