"""Sums across ranks. Without an initialised process group there is one rank.

The micro-batches of an accumulated step count as ranks too, see `MicroBatches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """The processes of a run."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return _processes()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a (n,) tensor across ranks; every rank must call this."""
        if _processes() > 1:
            dist.all_reduce(values)
        return values


class OneRank(Ranks):
    """This process as the only one."""

    @property
    def world_size(self) -> int:
        """1."""
        return 1

    def sum(self, values: Tensor) -> Tensor:
        """The values of this rank."""
        return values


_ranks: ContextVar[Ranks] = ContextVar("ranks", default=Ranks())  # noqa: B039  it has no state


@contextmanager
def as_ranks(ranks: Ranks) -> Iterator[None]:
    """Inside of the block sums are those of `ranks`."""
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


@contextmanager
def without_other_ranks() -> Iterator[None]:
    """Inside of the block this rank counts as the only one: no sum involves the others."""
    with as_ranks(OneRank()):
        yield


def world_size() -> int:
    """Number of ranks, 1 without a process group; times the micro-batches in a pass over them."""
    return _ranks.get().world_size


@torch.no_grad()
def sum_across_ranks(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sum tensors across all ranks with one all-reduce.

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
    sums = iter(_ranks.get().sum(flat).split([part.numel() for part in given]))
    return [None if part is None else next(sums).view(part.shape) for part in parts]


class MicroBatches(Ranks):
    """Sums of statistics over the micro-batches of one step, as if each were a rank.

    A first forward pass under `no_grad` (`counting`) records what each micro-batch adds to every
    sum, and `total` adds them up over micro-batches and ranks with one all-reduce. In the second
    pass (`summed`) every micro-batch receives these sums, and its losses are those of one of
    `count` times as many ranks. If sums depend on others (guided scaling), the first pass is
    repeated once more; the sums that are known are used in it.

    Args:
        count: micro-batches of a step on each rank, at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._totals: list[Tensor] = []
        self._records: list[list[Tensor]] = []  # by micro-batch, then by call
        self._call, self._recording = 0, False

    @property
    def world_size(self) -> int:
        """Number of ranks times micro-batches."""
        return _processes() * self.count

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The forward pass of the next micro-batch, whose statistics are recorded."""
        self._records.append([])
        self._call, self._recording = 0, True
        with as_ranks(self):
            yield

    @contextmanager
    def summed(self) -> Iterator[None]:
        """The forward pass of a micro-batch that trains on the sums of `total`."""
        self._call, self._recording = 0, False
        with as_ranks(self):
            yield

    def total(self) -> None:
        """Add up what `counting` has recorded; every rank must call this."""
        if len({tuple(len(values) for values in record) for record in self._records}) != 1:
            raise RuntimeError("The micro-batches of a step have asked for different sums.")
        sizes = [len(values) for values in self._records[0]]
        if sizes:
            flat = torch.stack([torch.cat(record) for record in self._records]).sum(dim=0)
            self._totals = list(super().sum(flat).split(sizes))
        self._records = []

    def sum(self, values: Tensor) -> Tensor:
        """The sum for the present call of `sum_across_ranks`."""
        call, self._call = self._call, self._call + 1
        if self._recording:
            self._records[-1].append(values)
        if call < len(self._totals):
            return self._totals[call].clone()
        if self._recording:  # not known yet: as if all micro-batches were like this one
            return values * self.world_size
        raise RuntimeError("A micro-batch asks for a sum that the first pass has not seen.")
