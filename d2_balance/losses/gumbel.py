"""Gumbel activation: asymmetric scores for classes that are rarely present, and GOL with its mask.

    p = exp(-exp(-z)),  u = exp(-z)
    CE = -log p = u  for positives,   -log(1 - p) = -log(1 - e^-u)  for negatives

The gradients are -u and u / (e^u - 1). GOL takes the weights of DropLoss:

    w_ij = 1 - T_j (1 - y_ij) F_ij,  F = 1 in foreground samples, Bernoulli(1 - rho) in background
    L    = sum_j w_ij CE(z_ij, y_ij),  mean over samples

The release clamps z to [-4, 10] in the loss, which leaves an object of a lower logit without a
gradient. Here a positive has the gradient -exp(4) below -4, and a negative its own above 10.

Source: Alexandridis et al., Long-tailed Instance Segmentation using Gumbel Optimized Loss,
arXiv:2207.10936, equations 5 to 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, Activation, ClassificationLoss, check
from ._kernels.entries import entry_losses
from ._samples import Samples
from .cross_entropy import Weight, scale_negatives
from .drop_loss import DropLoss
from .eql import Threshold

BOUND = 80.0  # exp(80) is a float32; beyond, p is 0 or 1 - exp(-z)
SERIES = 4.0  # from here on -log(1 - e^-u) is summed as a series in u


def gumbel_ce_loss(logits: Tensor, onehot: Tensor, min_logit: float = -4.0) -> Tensor:
    """Cross-entropy of Gumbel scores of every class of every sample.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        min_logit: logit below which the loss of a positive grows linearly.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -1.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> gumbel_ce_loss(logits, onehot)
        tensor([[0.1353, 0.0683, 0.4587],
                [0.4587, 0.7880, 0.0683]])
    """
    above = logits.clamp(min=min_logit)
    positive = (-above).exp() * (1 + above - logits)
    # each branch reads logits of its own range only, so that neither gives a NaN to the gradient
    low = -(-(-logits.clamp(-BOUND, SERIES)).exp()).exp().neg().log1p()
    u = (-logits.clamp(min=SERIES)).exp()
    high = logits + u / 2 - u.square() / 24
    negative = torch.where(logits > SERIES, high, low)
    return torch.where(onehot > 0, positive, negative)


def gumbel_scores(logits: Tensor) -> Tensor:
    """exp(-exp(-z)) of every logit."""
    return (-(-logits).exp()).exp()


class NegativeGumbel:
    """Weighted cross-entropy of the Gumbel scores of negatives, for `entry_losses`.

    Args:
        weight: as `NegativeCE`.
    """

    def __init__(self, weight: Weight = 1.0) -> None:
        self.weight = weight

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        # exp2: exp is many times slower on a CPU where it underflows, as it does for most negatives
        u = logits.clamp(-BOUND, BOUND).mul_(-1 / math.log(2)).exp2_()
        prob = (u * (-1 / math.log(2))).exp2_()
        # 1 - p is at least u - u^2 / 2, which is exact where p is close to 1 and 1 - p has lost its
        # digits; the difference is rounded down, and the larger of the two is right to 1e-5
        rest = torch.rsub(prob, 1 - torch.finfo(prob.dtype).eps / 2)
        torch.maximum(rest, torch.addcmul(u, u, u, value=-0.5), out=rest)
        torch.log(rest, out=value).neg_()
        torch.maximum(value, logits, out=value)  # where u ends at the bound
        if grad is not None:
            torch.mul(prob, u, out=grad).div_(rest)
        scale_negatives(self.weight, chunk, value, grad)


class _GumbelLoss(ClassificationLoss):
    """Losses of Gumbel scores."""

    elementwise = True
    activation: Activation = "gumbel"

    min_logit: float

    def _set_min_logit(self, min_logit: float) -> None:
        inside = -BOUND <= min_logit <= 0
        check(self, "min_logit", min_logit, inside, f"a number in [{-BOUND:g}, 0]")
        self.min_logit = min_logit

    def weighted(self, samples: Samples, weight: Weight, own_weight: float | Tensor) -> Tensor:
        """As `weighted_ce`, of Gumbel scores."""
        return entry_losses(
            samples.logits,
            samples.column,
            NegativeGumbel(weight),
            lambda own: gumbel_ce_loss(own, samples.hit, self.min_logit) * own_weight,
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        return F.pad(gumbel_scores(logits), (0, 1))

    def logit(self, probability: float) -> float:
        return -math.log(-math.log(probability))


@CLS_LOSSES.register("GumbelCE")
class GumbelCELoss(_GumbelLoss):
    """Cross-entropy of Gumbel scores (arXiv:2207.10936) for RoI heads.

    Args:
        min_logit: logit below which the gradient of a positive is constant, in [-80, 0].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -1.0]])
        >>> GumbelCELoss()(logits, torch.tensor([0, 3]))
        tensor([[0.1353, 0.0683, 0.4587],
                [0.4587, 0.7880, 0.0683]])
    """

    def __init__(self, *, min_logit: float = -4.0) -> None:
        super().__init__()
        self._set_min_logit(min_logit)

    def compute(self, samples: Samples) -> Tensor:
        return self.weighted(samples, 1.0, 1.0)


@CLS_LOSSES.register("GOL")
class GOLLoss(_GumbelLoss, DropLoss):
    """Gumbel optimized loss (arXiv:2207.10936) for RoI heads.

    The authors start the bias of the classifier at -2 (MODEL.BALANCE.PRIOR_PROB 0.000618) and all
    its weights at 0.001, and use repeat factors.

    Args:
        class_frequency: (K,) fraction of training images that contain the class, in [0, 1].
        lambda_: classes below this frequency are tail classes (step threshold), in [0, 1]. The
            authors use 0.00177 on LVIS v0.5 and 0.0011 on v1.
        threshold: "step", "exponential" or "gompertz".
        min_logit: logit below which the gradient of a positive is constant, in [-80, 0].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> GOLLoss(class_frequency=[0.5, 0.1, 0.0001])(logits, labels)
        tensor([[0.1353, 0.0683, 0.0000],
                [0.4587, 0.7880, 0.0000]])
    """

    def __init__(
        self,
        *,
        class_frequency: Tensor | Sequence[float],
        lambda_: float = 0.00177,
        threshold: Threshold = "step",
        min_logit: float = -4.0,
    ) -> None:
        super().__init__(class_frequency=class_frequency, lambda_=lambda_, threshold=threshold)
        self._set_min_logit(min_logit)
