"""Balanced L1: more gradient for inliers than smooth L1 gives, none extra for outliers.

    L(x) = alpha / b (b |x| + 1) ln(b |x| + 1) - alpha |x|     |x| < 1
           gamma |x| + gamma / b - alpha                       otherwise
    b    = e^(gamma / alpha) - 1

The gradient is alpha ln(b |x| + 1) below 1 and gamma above. For beta other than 1 the form is
applied to x / beta and multiplied by beta: the gradient is then continuous at beta and 0 at 0,
which published code misses.

Source: Pang et al., Libra R-CNN, arXiv:1904.02701, equations 6 to 9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import BOX_LOSSES, BoxLoss, check


def balanced_l1_loss(
    pred: Tensor, target: Tensor, alpha: float, gamma: float, beta: float
) -> Tensor:
    """Balanced L1 of every coordinate.

    Args:
        pred: (P, 4).
        target: (P, 4).
        alpha: gain of inliers, above 0.
        gamma: gradient of outliers, above 0.
        beta: where outliers begin, above 0.

    Returns:
        (P, 4).

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> balanced_l1_loss(pred, target, alpha=0.5, gamma=1.5, beta=1.0)
        tensor([[0.0314, 0.0000, 2.5786, 0.4006]])
    """
    b = math.expm1(gamma / alpha)
    x = (pred - target).abs() / beta
    inlier = alpha / b * (b * x + 1) * torch.log1p(b * x) - alpha * x
    outlier = gamma * x + gamma / b - alpha
    return beta * torch.where(x < 1, inlier, outlier)


@BOX_LOSSES.register("BalancedL1")
class BalancedL1Loss(BoxLoss):
    """Balanced L1 (arXiv:1904.02701).

    Args:
        alpha: gain of inliers, above 0.
        gamma: gradient of outliers, above 0.
        beta: where outliers begin, above 0.

    Raises:
        ValueError: an argument is not above 0.

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> BalancedL1Loss()(pred, target)
        tensor([[0.0314, 0.0000, 2.5786, 0.4006]])
    """

    elementwise = True
    space = "deltas"

    def __init__(self, *, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
            check(self, name, value, value > 0, "a number above 0")
        self.alpha, self.gamma, self.beta = alpha, gamma, beta

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return balanced_l1_loss(pred, target, self.alpha, self.gamma, self.beta)
