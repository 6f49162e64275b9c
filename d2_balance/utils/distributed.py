"""Joining ranks. Works without an initialised process group, where there is one rank.

The micro-batches of an accumulated step count as ranks too, see `MicroBatches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False
_micro_batches: MicroBatches | None = None


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
    """Number of ranks, 1 without a process group; times the micro-batches in a pass over them."""
    if _alone:
        return 1
    return _processes() * (1 if _micro_batches is None else _micro_batches.count)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sum_over_ranks(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums tensors across all ranks with one all-reduce.

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
    if _micro_batches is not None and not _alone:
        flat = _micro_batches.join(flat)
    elif world_size() > 1:
        dist.all_reduce(flat)
    pieces = iter(flat.split([part.numel() for part in given]))
    return [None if part is None else next(pieces).view(part.shape) for part in parts]


class MicroBatches:
    """Sums statistics over the micro-batches of one step, as if each were a rank.

    A first pass without gradient (`counting`) notes what each micro-batch adds to every sum, and
    `total` joins them over micro-batches and ranks with one all-reduce. In the second pass
    (`summed`) every micro-batch receives these sums, and its losses are those of one of
    `count` times as many ranks. Where sums depend on others (guided scaling), the first pass is
    repeated once more; the sums that are known are used in it.

    Args:
        count: micro-batches of a step on each rank, at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._totals: list[Tensor] = []
        self._noted: list[list[Tensor]] = []  # by micro-batch, then by call
        self._call, self._counts = 0, False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The forward pass of the next micro-batch, whose statistics are noted."""
        self._noted.append([])
        with self._active(counts=True):
            yield

    @contextmanager
    def summed(self) -> Iterator[None]:
        """The forward pass of a micro-batch that trains on the sums of `total`."""
        with self._active(counts=False):
            yield

    def total(self) -> None:
        """Sums what `counting` has noted; every rank must call this."""
        if len({tuple(len(part) for part in parts) for parts in self._noted}) != 1:
            raise RuntimeError("The micro-batches of a step have asked for different sums.")
        sizes = [len(part) for part in self._noted[0]]
        if sizes:
            flat = torch.stack([torch.cat(parts) for parts in self._noted]).sum(dim=0)
            if _processes() > 1:
                dist.all_reduce(flat)
            self._totals = list(flat.split(sizes))
        self._noted = []

    def join(self, flat: Tensor) -> Tensor:
        """The sum for the present call of `sum_over_ranks`."""
        call, self._call = self._call, self._call + 1
        if self._counts:
            self._noted[-1].append(flat)
        if call < len(self._totals):
            return self._totals[call].clone()
        if self._counts:  # not known yet: as if all micro-batches were like this one
            return flat * (self.count * _processes())
        raise RuntimeError("A micro-batch asks for a sum that the first pass has not seen.")

    @contextmanager
    def _active(self, *, counts: bool) -> Iterator[None]:
        global _micro_batches
        self._call, self._counts = 0, counts
        before, _micro_batches = _micro_batches, self
        try:
            yield
        finally:
            _micro_batches = before
