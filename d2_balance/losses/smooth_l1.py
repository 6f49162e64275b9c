"""Smooth L1, with a beta that a schedule may lower during training.

    L(d) = d^2 / (2 beta)      |d| <  beta
           |d| - beta / 2      otherwise;   beta below 1e-5 is L1

Source: Girshick, Fast R-CNN, arXiv:1504.08083, equation 3 (beta = 1); decaying beta: Qian et al.,
DR Loss, arXiv:1907.10156v1, section 4.3. The schedule lives in `engine.hooks.BetaDecay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import BOX_LOSSES, BoxLoss, check

L1_BELOW = 1e-5  # as fvcore: dividing by a smaller beta would overflow


def smooth_l1_loss(pred: Tensor, target: Tensor, beta: Tensor) -> Tensor:
    """Smooth L1 of every coordinate.

    Args:
        pred: (P, 4).
        target: (P, 4).
        beta: 0-d tensor, at least 0; a tensor, so that a schedule changes it without a host sync.

    Returns:
        (P, 4).

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> smooth_l1_loss(pred, target, torch.tensor(1.0))
        tensor([[0.0050, 0.0000, 1.5000, 0.1250]])
    """
    beta = beta.to(pred.dtype)
    beta = torch.where(beta < L1_BELOW, torch.zeros_like(beta), beta)
    diff = (pred - target).abs()
    square = 0.5 * diff.square() / beta.clamp(min=L1_BELOW)
    return torch.where(diff < beta, square, diff - 0.5 * beta)


@BOX_LOSSES.register("SmoothL1")
class SmoothL1Loss(BoxLoss):
    """Smooth L1 (arXiv:1504.08083, equation 3); MODEL.BALANCE.BETA_DECAY lowers beta by schedule.

    Args:
        beta: width of the quadratic part, at least 0; 0 is L1.

    Raises:
        ValueError: beta is negative.

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> SmoothL1Loss(beta=1.0)(pred, target)
        tensor([[0.0050, 0.0000, 1.5000, 0.1250]])
    """

    elementwise = True
    space = "deltas"

    beta: Tensor

    def __init__(self, *, beta: float = 0.11) -> None:
        super().__init__()
        check(self, "beta", beta, beta >= 0, "a number of at least 0")
        self.initial_beta = beta
        self.register_buffer("beta", torch.tensor(float(beta), dtype=torch.float64))

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(pred, target, self.beta)

    def log_values(self) -> dict[str, Tensor]:
        return {"beta": self.beta}
