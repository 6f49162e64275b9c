"""Gradient harmonizing: GHM-C for classification, GHM-R for box regression.

    GHM-C   L = (1/n) sum_b ( sum_{i in b} CE_i ) / S_b,      g_i = |p_i - y_i|
    GHM-R   L = (1/n) sum_b ( sum_{i in b} ASL1_i ) / S_b,    ASL1 = sqrt(d^2 + mu^2) - mu,
                                                              g_i = |d_i| / sqrt(d_i^2 + mu^2)

Bin b of M holds the entries with gradient norm g in [b/M, (b+1)/M). S_b is the moving average of
its count, n the number of bins hit by the batch. This is the authors' form written out: their
N / density weights, divided by N, leave one over count and bin.

Source: Li et al., Gradient Harmonized Single-stage Detector, arXiv:1811.05181, equations 4 to 11,
with the moving average of section 3.4. The mean is over bins of the batch of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2_balance.utils.distributed import world_size

from ._base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss, check
from ._kernels.density import (
    EmaMode,
    GradientDensity,
    check_density,
    count_bins,
    entry_bins,
    level_bins,
)
from ._kernels.entries import entry_total, softplus
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss


def _level_weight(norm: Tensor, scales: Tensor, level: Tensor | None) -> Tensor:
    """(R, C) weight of each entry, from (levels, M) scales n * S_b."""
    index = level_bins(norm, scales.shape[1], level)
    return scales.flatten().reciprocal().to(norm.dtype)[index]


def ghm_c_loss(
    logits: Tensor, onehot: Tensor, bin_density: Tensor, level: Tensor | None = None
) -> Tensor:
    """GHM-C for a given density.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        bin_density: (levels, M) n * S_b; an entry of bin b weighs one over it.
        level: (R,) index into `bin_density`; None: there is one.

    Returns:
        0-d tensor.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> ghm_c_loss(logits, onehot, bin_density=torch.tensor([[4.0, 2.0]]))
        tensor(1.3220)
    """
    norm = (logits.detach().sigmoid() - onehot).abs_()
    weight = _level_weight(norm, bin_density, level)
    return (sigmoid_ce_loss(logits, onehot) * weight).sum()


def ghm_r_loss(
    pred: Tensor, target: Tensor, bin_density: Tensor, mu: float, level: Tensor | None = None
) -> Tensor:
    """GHM-R for a given density; one sample per coordinate.

    Args:
        pred: (P, 4) box deltas with unit weights.
        target: (P, 4).
        bin_density: (levels, M) n * S_b.
        mu: where the smooth part ends, above 0.
        level: (P,) index into `bin_density`; None: there is one.

    Returns:
        0-d tensor.

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> ghm_r_loss(pred, target, bin_density=torch.tensor([[4.0, 2.0]]), mu=0.02)
        tensor(1.2712)
    """
    weight = _level_weight(_asl1_norm(pred, target, mu), bin_density, level)
    return (asl1_loss(pred, target, mu) * weight).sum()


def asl1_loss(pred: Tensor, target: Tensor, mu: float) -> Tensor:
    """Authentic smooth L1 of every coordinate: sqrt(d^2 + mu^2) - mu, of the shape of `pred`."""
    return ((pred - target).square() + mu * mu).sqrt() - mu


@torch.no_grad()
def _asl1_norm(pred: Tensor, target: Tensor, mu: float) -> Tensor:
    diff = pred - target
    return diff.abs() / (diff.square() + mu * mu).sqrt()


class _NegativeGHMC:
    """Cross-entropy times the weight (T,) of an index (R, C); `grad` comes in as probabilities."""

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        self.weight, self.index = weight, index

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        # `index_select` takes half the time of `weight[index]`
        weight = self.weight.index_select(0, self.index[chunk].flatten().int()).view_as(value)
        softplus(logits, out=value).mul_(weight)
        if grad is not None:
            grad.mul_(weight)


@CLS_LOSSES.register("GHMC")
class GHMCLoss(ClassificationLoss):
    """GHM-C (arXiv:1811.05181, equation 9): every bin of gradient norms weighs the same.

    Args:
        bins: number of bins M.
        momentum: fraction of the old density, in [0, 1); 0 uses the batch alone.
        ema_mode: "official" (the released code), "debiased" or "paper"; see `GradientDensity`.
        per_level: True calls the loss once per feature level with one shared density and adds the
            results, as the released code does; False takes one histogram of the batch.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> GHMCLoss(bins=5)(logits, labels)
        tensor(2.1074)
    """

    elementwise = False
    activation = "sigmoid"

    def __init__(
        self,
        *,
        bins: int = 30,
        momentum: float = 0.75,
        ema_mode: EmaMode = "official",
        per_level: bool = False,
    ) -> None:
        super().__init__()
        check_density(self, bins, momentum, ema_mode)
        self.per_level = per_level
        self.density = GradientDensity(bins, momentum, ema_mode)

    def _level(self, samples: Samples) -> tuple[Tensor | None, int]:
        if self.per_level and samples.level is not None:
            return samples.level, samples.num_levels
        return None, 1

    def batch_statistics(self, samples: Samples) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(levels, M) counts, and the bins and probabilities (R, K) of the entries."""
        counts, index, prob = entry_bins(samples, self.density.bins, *self._level(samples))
        return counts, (index, prob)

    def update(self, total: Tensor) -> None:
        self.density.update(total)

    def compute(self, samples: Samples) -> Tensor:
        counts, bins = self.batch_statistics(samples)
        return self._weighted(samples, bins, self.density.scale(counts))

    def compute_from(self, intermediate: tuple[Tensor, Tensor], samples: Samples) -> Tensor:
        return self._weighted(samples, intermediate, self.density.scales)

    def _weighted(self, samples: Samples, bins: tuple[Tensor, Tensor], scales: Tensor) -> Tensor:
        """The loss with (levels, M) scales; overwrites the probabilities in `bins`."""
        index, prob = bins
        weight = scales.flatten().reciprocal().to(samples.logits.dtype)  # (levels * M,)
        own_weight = weight[index.gather(1, samples.column).long()]
        loss = entry_total(
            samples.logits,
            samples.column,
            _NegativeGHMC(weight, index),
            lambda own: sigmoid_ce_loss(own, samples.hit) * own_weight,
            prob,
        )
        return loss * world_size()  # DDP takes the mean of the ranks; the bins are of all ranks

    def log_values(self) -> dict[str, Tensor]:
        return self.density.log_values()


@BOX_LOSSES.register("GHMR")
class GHMRLoss(BoxLoss):
    """GHM-R (arXiv:1811.05181, equation 11) on box deltas with unit weights.

    The released configurations multiply it by 10: set MODEL.BALANCE.BOX_LOSS_WEIGHT.

    Args:
        mu: width of the smooth part of the authentic smooth L1, above 0.
        bins: number of bins M.
        momentum: fraction of the old density, in [0, 1).
        ema_mode: "official", "debiased" or "paper"; see `GradientDensity`.
        per_level: True calls the loss once per feature level with one shared density and adds the
            results, as the released code does; False takes one histogram of the batch.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> pred, target = torch.tensor([[0.1, 0.0, -2.0, 0.5]]), torch.zeros(1, 4)
        >>> GHMRLoss()(pred, target)
        tensor(1.4125)
    """

    elementwise = False
    space = "deltas"
    unit_weights = True

    def __init__(
        self,
        *,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        ema_mode: EmaMode = "official",
        per_level: bool = False,
    ) -> None:
        super().__init__()
        check(self, "mu", mu, mu > 0, "a number above 0")
        check_density(self, bins, momentum, ema_mode)
        self.mu, self.per_level = mu, per_level
        self.density = GradientDensity(bins, momentum, ema_mode)

    def batch_statistics(
        self, pred: Tensor, target: Tensor, level: Tensor | None = None, levels: int = 1
    ) -> tuple[Tensor, Tensor]:
        """(levels, M) counts, and (P, 4) bins of the coordinates."""
        index = level_bins(_asl1_norm(pred, target, self.mu), self.density.bins, level)
        return count_bins(index, levels * self.density.bins).view(levels, -1), index

    def update(self, total: Tensor) -> None:
        self.density.update(total)

    def compute(
        self, pred: Tensor, target: Tensor, level: Tensor | None = None, levels: int = 1
    ) -> Tensor:
        counts, index = self.batch_statistics(pred, target, level, levels)
        return self._weighted(pred, target, index, self.density.scale(counts))

    def compute_from(
        self,
        intermediate: Tensor,
        pred: Tensor,
        target: Tensor,
        level: Tensor | None = None,
        levels: int = 1,
    ) -> Tensor:
        return self._weighted(pred, target, intermediate, self.density.scales)

    def _weighted(self, pred: Tensor, target: Tensor, index: Tensor, scales: Tensor) -> Tensor:
        weight = scales.flatten().reciprocal().to(pred.dtype)[index]
        return (asl1_loss(pred, target, self.mu) * weight).sum() * world_size()

    def log_values(self) -> dict[str, Tensor]:
        return self.density.log_values()
