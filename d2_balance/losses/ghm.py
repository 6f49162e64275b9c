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

from typing import Literal

import torch
from torch import Tensor, nn

from .base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss, check
from .cross_entropy import sigmoid_ce_loss
from .distributed import world_size
from .samples import Samples

EMA_MODES = ("official", "debiased", "paper")
EmaMode = Literal["official", "debiased", "paper"]


def gradient_bins(norm: Tensor, bins: int) -> Tensor:
    """Index of the unit region of each gradient norm.

    Args:
        norm: any shape, in [0, 1]; 1 falls into the last bin.
        bins: M.

    Returns:
        int64 of the same shape, in [0, M).
    """
    return (norm * bins).long().clamp_(0, bins - 1)


def _level_bins(norm: Tensor, bins: int, level: Tensor | None, levels: int) -> Tensor:
    """(R, C) index of each entry in the (levels, M) bins of all levels, flattened."""
    index = gradient_bins(norm, bins)
    return index if levels == 1 else index + level.unsqueeze(1) * bins


def _level_weight(norm: Tensor, scales: Tensor, level: Tensor | None) -> Tensor:
    """(R, C) weight of each entry, from (levels, M) scales n * S_b."""
    index = _level_bins(norm, scales.shape[1], level, len(scales))
    return scales.flatten().reciprocal().to(norm.dtype)[index]


def ghm_c_loss(
    logits: Tensor, onehot: Tensor, bin_density: Tensor, level: Tensor | None = None
) -> Tensor:
    """GHM-C for a given density.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        bin_density: (levels, M) n * S_b; an entry of bin b weighs one over it.
        level: (R,) row of `bin_density`; None: there is one.

    Returns:
        0-d tensor.
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
        level: (P,) row of `bin_density`; None: there is one.

    Returns:
        0-d tensor.
    """
    weight = _level_weight(_asl1_norm(pred, target, mu), bin_density, level)
    return (((pred - target).square() + mu * mu).sqrt().sub(mu) * weight).sum()


@torch.no_grad()
def _asl1_norm(pred: Tensor, target: Tensor, mu: float) -> Tensor:
    diff = pred - target
    return diff.abs() / (diff.square() + mu * mu).sqrt()


class GradientDensity(nn.Module):
    """Moving counts of gradient norms in M bins, the state of GHM-C and GHM-R.

    Buffers, float64: `acc` (M,) moving counts of all ranks together; `steps` (M,) how often each
    was updated; `batch` (M,) counts of the last batch, not saved. `scales` (levels, M) are those of
    the present batch, for the loss that follows `update_levels`.

    Args:
        bins: M, at least 1.
        momentum: share a of the old count, in [0, 1).
        ema_mode: "official" starts at zero and skips empty bins; "debiased" divides by 1 - a^t,
            t counted per bin, and so has no start-up error; "paper" moves every bin each step and
            takes the mean over all M bins.
    """

    def __init__(self, bins: int, momentum: float, ema_mode: EmaMode) -> None:
        super().__init__()
        self.bins, self.momentum, self.ema_mode = bins, momentum, ema_mode
        self.register_buffer("acc", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("batch", torch.zeros(bins, dtype=torch.float64), persistent=False)
        self.scales: Tensor | None = None

    def count(self, norm: Tensor, level: Tensor | None = None, levels: int = 1) -> Tensor:
        """(levels, M) counts of gradient norms (R, C); one level does not ask for `level` (R,)."""
        index = _level_bins(norm.detach(), self.bins, level, levels)
        return torch.bincount(index.flatten(), minlength=levels * self.bins).view(levels, -1)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Moves the density towards (M,) counts summed over ranks; no entries: no change."""
        counts = counts.to(self.acc.dtype)
        if self.ema_mode == "paper":
            hit = (counts.sum() > 0).expand_as(counts)
        else:
            hit = counts > 0
        moved = self.momentum * self.acc + (1 - self.momentum) * counts
        self.acc.copy_(torch.where(hit, moved, self.acc))
        self.steps.add_(hit)
        self.batch.copy_(counts)

    def update_levels(self, total: Tensor) -> None:
        """Takes (levels, M) counts one level after the other, and keeps `scale` after each."""
        scales = []
        for counts in total:  # coarse loop of about five
            self.update(counts)
            scales.append(self.scale())
        self.scales = torch.stack(scales)

    def frozen_scales(self, counts: Tensor) -> Tensor:
        """(levels, M) scales for (levels, M) counts that do not enter the state (evaluation)."""
        return torch.stack([self.scale(level) for level in counts])

    def density(self) -> Tensor:
        """(M,) S_b: the moving count, corrected as the mode says; empty bins 0."""
        if self.ema_mode != "debiased":
            return self.acc
        return self.acc / (1 - self.momentum**self.steps).clamp(min=1e-12)

    def scale(self, counts: Tensor | None = None) -> Tensor:
        """(M,) n * S_b for the last batch, or for counts that did not enter the state.

        Bins that were never hit count as 1, so that evaluation on new data stays finite.
        """
        counts = self.batch if counts is None else counts
        density = self.density()
        density = torch.where(density > 0, density, torch.ones_like(density))
        full = self.ema_mode == "paper"
        return density * (self.bins if full else (counts > 0).sum().clamp(min=1))

    def stats(self) -> dict[str, Tensor]:
        """Density S_b, mean-one weight of an entry per bin, and the number of dead bins."""
        density = self.density()
        alive = density > 0
        weight = torch.where(alive, density.sum() / density.clamp(min=1e-12) / alive.sum(), 0.0)
        return {"density": density, "weight": weight, "dead_bins": (~alive).sum()}


def _check_density(owner: object, bins: int, momentum: float, ema_mode: str) -> None:
    whole = isinstance(bins, int) and bins >= 1
    check(owner, "bins", bins, whole, "a whole number of at least 1")
    check(owner, "momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")
    check(owner, "ema_mode", ema_mode, ema_mode in EMA_MODES, f"one of {', '.join(EMA_MODES)}")


@CLS_LOSSES.register()
class GHMC(ClassificationLoss):
    """GHM-C (arXiv:1811.05181, equation 9): every bin of gradient norms weighs the same.

    Args:
        bins: number of bins M.
        momentum: share of the old density, in [0, 1); 0 uses the batch alone.
        ema_mode: "official" (the released code), "debiased" or "paper"; see `GradientDensity`.
        per_level: True calls the loss once per feature level with one shared density and adds the
            results, as the released code does; False takes one histogram of the batch.

    Raises:
        ValueError: an argument is out of range.
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
        _check_density(self, bins, momentum, ema_mode)
        self.per_level = per_level
        self.density = GradientDensity(bins, momentum, ema_mode)

    def _level(self, samples: Samples) -> tuple[Tensor | None, int]:
        if self.per_level and samples.level is not None:
            return samples.level, samples.num_levels
        return None, 1

    @torch.no_grad()
    def statistics(self, samples: Samples) -> Tensor:
        level, levels = self._level(samples)
        norm = (samples.logits.sigmoid() - samples.onehot).abs_()
        return self.density.count(norm, level, levels)

    def update(self, total: Tensor) -> None:
        self.density.update_levels(total)

    def compute(self, samples: Samples) -> Tensor:
        scales = self.density.scales
        if not self.training or scales is None:
            scales = self.density.frozen_scales(self.statistics(samples))
        loss = ghm_c_loss(samples.logits, samples.onehot, scales, self._level(samples)[0])
        return loss * world_size()  # DDP takes the mean of the ranks; the bins are of all ranks

    def stats(self) -> dict[str, Tensor]:
        return self.density.stats()


@BOX_LOSSES.register()
class GHMR(BoxLoss):
    """GHM-R (arXiv:1811.05181, equation 11) on box deltas with unit weights.

    The released configurations multiply it by 10: set MODEL.BALANCE.BOX_WEIGHT.

    Args:
        mu: width of the smooth part of the authentic smooth L1, above 0.
        bins: number of bins M.
        momentum: share of the old density, in [0, 1).
        ema_mode: "official", "debiased" or "paper"; see `GradientDensity`.
        per_level: True calls the loss once per feature level with one shared density and adds the
            results, as the released code does; False takes one histogram of the batch.

    Raises:
        ValueError: an argument is out of range.
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
        _check_density(self, bins, momentum, ema_mode)
        self.mu, self.per_level = mu, per_level
        self.density = GradientDensity(bins, momentum, ema_mode)

    def statistics(
        self, pred: Tensor, target: Tensor, level: Tensor | None = None, levels: int = 1
    ) -> Tensor:
        return self.density.count(_asl1_norm(pred, target, self.mu), level, levels)

    def update(self, total: Tensor) -> None:
        self.density.update_levels(total)

    def compute(
        self, pred: Tensor, target: Tensor, level: Tensor | None = None, levels: int = 1
    ) -> Tensor:
        scales = self.density.scales
        if not self.training or scales is None:
            counts = self.statistics(pred, target, level, levels)
            scales = self.density.frozen_scales(counts)
        return ghm_r_loss(pred, target, scales, self.mu, level) * world_size()

    def stats(self) -> dict[str, Tensor]:
        return self.density.stats()
