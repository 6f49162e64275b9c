"""Ranks inside groups and the weights they give (PISA, arXiv:1904.04821)."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_within(group: Tensor, order: Tensor) -> Tensor:
    """Rank of each entry inside its group.

    Args:
        group: (P,) int64.
        order: (P,) int64 permutation, entries from first to last.

    Returns:
        (P,) int64, 0 for the first entry of a group.
    """
    order = order[group[order].argsort(stable=True)]  # groups together, order kept inside
    position = torch.arange(len(order), device=order.device)
    sorted_group = group[order]
    begins = torch.ones_like(sorted_group, dtype=torch.bool)
    begins[1:] = sorted_group[1:] != sorted_group[:-1]
    start = torch.where(begins, position, torch.zeros_like(position)).cummax(0).values
    return torch.empty_like(position).scatter_(0, order, position - start)


def importance(rank: Tensor, most: Tensor | int, k: float, bias: float) -> Tensor:
    """((1 - b) (most - rank) / most + b)^k for ranks (n,) below `most`."""
    return ((1 - bias) * (most - rank) / most + bias).pow(k)


def rescaled(weight: Tensor, ce: Tensor) -> Tensor:
    """Weights (n,) times the factor that keeps the sum of the losses (n,); no gradient."""
    ce = ce.detach()
    total = (weight * ce).sum()
    return weight * torch.where(total > 0, ce.sum() / total.clamp(min=1e-12), 1.0)
