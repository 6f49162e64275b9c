"""Histograms of gradient norms and their moving average, the state of GHM-C and GHM-R.

Source: Li et al., Gradient Harmonized Single-stage Detector, arXiv:1811.05181, section 3.4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._base import check
from .._samples import Samples
from .chunks import map_chunks, neighbours

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


def level_bins(norm: Tensor, bins: int, level: Tensor | None) -> Tensor:
    """(R, C) index of each entry in the (levels, M) bins of all levels, flattened."""
    index = gradient_bins(norm, bins)
    return index if level is None else index + level.unsqueeze(1) * bins


def count_bins(index: Tensor, size: int) -> Tensor:
    """(size,) int64, how often each of 0 ... size - 1 occurs in integers (R, C)."""
    if index.is_cuda:  # `bincount` is two host-device syncs there, to learn the range
        return histogram(index, size)
    tables = max(255 // size, 1) if index.dtype == torch.uint8 else 1  # as a byte has room for
    if tables > 1:
        index = index + neighbours(index.shape[-1], tables, size, index.device).to(index.dtype)
    return torch.bincount(index.flatten(), minlength=tables * size).view(tables, size).sum(dim=0)


def histogram(index: Tensor, size: int) -> Tensor:
    """`count_bins` without a host-device sync; float32 counts to 2^24 without an error."""
    counts = [
        torch.histc(chunk.float(), bins=size, min=-0.5, max=size - 0.5)
        for chunk in index.flatten().split(2**24)
    ]
    return torch.stack(counts).long().sum(dim=0)


@torch.no_grad()
def entry_bins(
    samples: Samples, bins: int, level: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort every entry into the bins of all levels, and count them.

    Args:
        samples: see `Samples`.
        bins: M.
        level: (R,) int64 in [0, levels); None: there is one.
        levels: number of levels.

    Returns:
        (levels, M) int64 counts, (R, K) integers in [0, levels * M), of one byte if that is
        enough, and (R, K) probabilities.
    """
    logits, column, size = samples.logits.detach(), samples.column, levels * bins
    small = torch.uint8 if size <= 256 else torch.int32
    index = torch.empty_like(logits, dtype=small, memory_format=torch.contiguous_format)
    prob = torch.empty_like(logits, memory_format=torch.contiguous_format)
    own = (logits.gather(1, column).sigmoid() - samples.hit).abs_()
    own = gradient_bins(own, bins).to(small)  # (R, 1)

    def work(chunk: slice) -> Tensor:
        placed = index[chunk]  # a view, written
        norm = torch.sigmoid(logits[chunk], out=prob[chunk])  # of a negative
        placed.copy_((norm * bins).clamp_(max=bins - 1))
        if small == torch.int32:  # NaN becomes the least integer, which is no bin
            placed.clamp_(min=0)
        placed.scatter_(1, column[chunk], own[chunk])
        if level is not None:
            placed.add_((level[chunk] * bins).to(small).unsqueeze(1))
        return count_bins(placed, size)

    counts = torch.stack([own.new_zeros(size, dtype=torch.int64), *map_chunks(work, logits)])
    return counts.sum(dim=0).view(levels, bins), index, prob


class GradientDensity(nn.Module):
    """Moving counts of gradient norms in M bins, the state of GHM-C and GHM-R.

    Buffers, float64: `acc` (M,) moving counts of all ranks together; `steps` (M,) how often each
    was updated; `scales` (levels, M) n * S_b of the last batch, not saved.

    Args:
        bins: M, at least 1.
        momentum: fraction a of the old count that stays, in [0, 1).
        ema_mode: "official" starts at zero and skips empty bins; "debiased" divides by 1 - a^t,
            t counted per bin, and so has no start-up error; "paper" moves every bin each step and
            takes the mean over all M bins.
    """

    acc: Tensor
    steps: Tensor
    scales: Tensor

    def __init__(self, bins: int, momentum: float, ema_mode: EmaMode) -> None:
        super().__init__()
        self.bins, self.momentum, self.ema_mode = bins, momentum, ema_mode
        self.register_buffer("acc", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("scales", torch.ones(1, bins, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Move the density towards counts summed across ranks; no entries: no change.

        Args:
            counts: (levels, M), taken one level after the other.
        """
        scales = []
        for level in counts.to(self.acc.dtype):  # about five
            hit = level > 0
            if self.ema_mode == "paper":
                hit = hit.any().expand_as(level)
            moved = self.momentum * self.acc + (1 - self.momentum) * level
            self.acc.copy_(torch.where(hit, moved, self.acc))
            self.steps.add_(hit)
            scales.append(self.scale(level))
        self.scales = torch.stack(scales)

    def density(self) -> Tensor:
        """(M,) S_b: the moving count, corrected as the mode says; empty bins 0."""
        if self.ema_mode != "debiased":
            return self.acc
        return self.acc / (1 - self.momentum**self.steps).clamp(min=1e-12)

    def scale(self, counts: Tensor) -> Tensor:
        """N * S_b for the present density.

        Args:
            counts: (M,) or (levels, M) of the batch that is weighted.

        Returns:
            As `counts`. Bins that were never hit count as 1, so that the loss of new data stays
            finite in evaluation.
        """
        density = self.density()
        density = torch.where(density > 0, density, torch.ones_like(density))
        if self.ema_mode == "paper":
            return (density * self.bins).expand_as(counts)
        return density * (counts > 0).sum(dim=-1, keepdim=True).clamp(min=1)

    def log_values(self) -> dict[str, Tensor]:
        """Density S_b, mean-one weight of an entry per bin, and the number of dead bins."""
        density = self.density()
        alive = density > 0
        weight = torch.where(alive, density.sum() / density.clamp(min=1e-12) / alive.sum(), 0.0)
        return {"density": density, "weight": weight, "dead_bins": (~alive).sum()}


def check_density(owner: object, bins: int, momentum: float, ema_mode: str) -> None:
    whole = isinstance(bins, int) and bins >= 1
    check(owner, "bins", bins, whole, "an integer of at least 1")
    check(owner, "momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")
    check(owner, "ema_mode", ema_mode, ema_mode in EMA_MODES, f"one of {', '.join(EMA_MODES)}")
