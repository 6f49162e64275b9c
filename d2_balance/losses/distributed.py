"""Joining ranks. Works without an initialised process group, where there is one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def without_other_ranks() -> Iterator[None]:
    """Inside of the block this rank counts as the only one: nothing waits for the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Number of ranks of the default process group, 1 without one."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sum_over_ranks(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums tensors over all ranks with one all-reduce.

    Every rank must call this with the same number and shapes of tensors, an empty batch included:
    a rank that returns early leaves the others waiting.

    Args:
        parts: tensors of any shape, or None, which stays None.

    Returns:
        float64 tensors of the given shapes, detached.
    """
    given = [part for part in parts if part is not None]
    if not given:
        return list(parts)
    flat = torch.cat([part.detach().double().flatten() for part in given])
    if world_size() > 1:
        dist.all_reduce(flat)
    pieces = iter(flat.split([part.numel() for part in given]))
    return [None if part is None else next(pieces).view(part.shape) for part in parts]
