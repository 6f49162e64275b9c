"""Histograms of gradient norms and their moving average, the state of GHM-C and GHM-R.

Source: Li et al., Gradient Harmonized Single-stage Detector, arXiv:1811.05181, section 3.4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._base import check
from .._samples import Samples
from .entries import Scratch, sample_chunks

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


def level_bins(norm: Tensor, bins: int, level: Tensor | None, levels: int) -> Tensor:
    """(R, C) index of each entry in the (levels, M) bins of all levels, flattened."""
    index = gradient_bins(norm, bins)
    return index if levels == 1 else index + level.unsqueeze(1) * bins


def count_bins(index: Tensor, size: int, scratch: Scratch | None = None) -> Tensor:
    """(size,) int64, how often each of 0 ... size - 1 occurs in integers (R, C)."""
    if index.is_cuda:  # there `bincount` waits for the device twice, to learn the range
        return histogram(index, size)
    # most entries fall into one bin, and a counter waits for its last addition: neighbours count
    # in tables of their own, as many as the type has room for
    tables = max(torch.iinfo(index.dtype).max // size, 1) if index.dtype == torch.uint8 else 1
    table = torch.arange(index.shape[-1]).remainder_(tables).mul_(size).to(index.dtype)
    spread = torch.add(index, table, out=(scratch or Scratch()).take("spread", index))
    counts = torch.bincount(spread.flatten(), minlength=tables * size)
    return counts.view(tables, size).sum(dim=0)


def histogram(index: Tensor, size: int) -> Tensor:
    """`count_bins` without waiting for the device; float32 counts to 2^24 without an error."""
    parts = index.flatten().split(2**24)
    counts = [torch.histc(p.float(), bins=size, min=-0.5, max=size - 0.5) for p in parts]
    return torch.stack(counts).long().sum(dim=0)


@torch.no_grad()
def entry_bins(
    samples: Samples, bins: int, level: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each entry lies in the bins of all levels, and how many lie in each.

    Args:
        samples: see `Samples`.
        bins: M.
        level: (R,) int64 in [0, levels); None: there is one.
        levels: number of levels.

    Returns:
        (R, K) integers in [0, levels * M), of one byte where that is enough, (levels, M)
        int64, and (R, K) probabilities.
    """
    logits, column, size = samples.logits, samples.column, levels * bins
    small = torch.uint8 if size <= 256 else torch.int32
    index = torch.empty_like(logits, dtype=small, memory_format=torch.contiguous_format)
    prob = torch.empty_like(logits, memory_format=torch.contiguous_format)
    own = (logits.gather(1, column).sigmoid() - samples.hit).abs_()
    own = gradient_bins(own, bins).to(small)  # (R, 1)
    counts, scratch = index.new_zeros(size, dtype=torch.int64), Scratch()
    for rows in sample_chunks(logits):
        piece = index[rows]
        norm = torch.sigmoid(logits[rows], out=prob[rows])  # of a negative
        place = torch.mul(norm, bins, out=scratch.take("place", norm))
        piece.copy_(place.clamp_(max=bins - 1))
        if small == torch.int32:  # what is no number becomes the least one, which is no bin
            piece.clamp_(min=0)
        piece.scatter_(1, column[rows], own[rows])
        if levels > 1:
            piece.add_((level[rows] * bins).to(small).unsqueeze(1))
        counts += count_bins(piece, size, scratch)
    return index, counts.view(levels, bins), prob


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
        index = level_bins(norm.detach(), self.bins, level, levels)
        return count_bins(index, levels * self.bins).view(levels, -1)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Moves the density towards (M,) counts summed across ranks; no entries: no change."""
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
