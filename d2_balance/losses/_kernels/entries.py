"""Losses of (row, class) entries, computed in pieces that stay in the cache.

The logits of a dense head have millions of entries, and nearly all of them are negatives. Autograd
would keep five to ten tensors of their size. Here every entry is first taken as a negative, piece
by piece, and then the one entry of each row that may be positive is put right. The derivative is
written in the same pass, in closed form, and is all that is kept for the backward pass.

The plain formulas stand above the modules. They give the value and the gradient of the positives,
and the tests compare the pieces with them.

Shapes as in `samples`; C is the number of columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE = 2**17  # entries of a piece per thread: a few float32 buffers of that size stay in the cache


def sample_chunks(logits: Tensor) -> list[slice]:
    """Slices of the rows of (R, C) logits; on a GPU one slice, where every call costs a launch."""
    rows, columns = logits.shape
    size = rows if logits.is_cuda else PIECE * torch.get_num_threads() // max(columns, 1)
    size = max(size, 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Scratch:
    """Buffers that the pieces of a pass share.

    Each thread then writes where it wrote before. A new buffer for every piece often lies in the
    cache of another core, and to fetch it from there can take as long as the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of a name, in the shape of a piece (r, C); the first piece is the longest."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(
                like, dtype=dtype, memory_format=torch.contiguous_format
            )
        return self._buffers[name][: len(like)]


def look_up(table: Tensor, index: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Entries of a table by their numbers.

    Args:
        table: (T,).
        index: (r, C) integers in [0, T).
        scratch: holds the result, until it is asked for the next piece.

    Returns:
        (r, C).
    """
    scratch = scratch or Scratch()
    if index.dtype != torch.int64:
        index = scratch.take("index", index, torch.int64).copy_(index)
    found = scratch.take("found", index, table.dtype)
    # `index_select` of one dimension would use one thread
    return torch.gather(table.expand(len(index), -1), 1, index, out=found)


class Negative(Protocol):
    """How an entry counts that is not the object's class."""

    def write(self, logits: Tensor, rows: slice, value: Tensor, grad: Tensor | None) -> None:
        """Writes the losses of a piece and their derivatives by the logits.

        Args:
            logits: (r, C), the piece.
            rows: its r rows in the batch.
            value: (r, C), written.
            gradient: (r, C), written; None: not wanted.
        """


def softplus(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + e^z), the cross-entropy of a negative; above 40 it is z in float64 as well."""
    return F.softplus(logits, 1, 40, out=out)


def value_and_grad(formula: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """A formula of entries and its derivative, both of the shape of the logits, without graph."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = formula(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@torch.no_grad()
def entry_pass(
    logits: Tensor,
    column: Tensor,
    negative: Negative,
    own: Callable[[Tensor], Tensor],
    with_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The loss of every entry and its derivative, both (R, C); arguments as `entry_losses`."""
    own_value, own_grad = value_and_grad(own, logits.gather(1, column))
    value = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad = torch.empty_like(value) if with_grad else None
    for rows in sample_chunks(logits):
        piece = None if grad is None else grad[rows]
        negative.write(logits[rows], rows, value[rows], piece)
    if grad is not None:
        grad.scatter_(1, column, own_grad)
    return value.scatter_(1, column, own_value), grad


def entry_losses(
    logits: Tensor, column: Tensor, negative: Negative, own: Callable[[Tensor], Tensor]
) -> Tensor:
    """The loss of every entry.

    Args:
        logits: (R, C).
        column: (R, 1) int64, the column of each row that `own` computes.
        negative: the loss of all other columns.
        own: loss (R, 1) of the logits (R, 1) in `column`, differentiable.

    Returns:
        (R, C).
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return with_grad(logits, *entry_pass(logits, column, negative, own, wanted))


def entry_total(
    logits: Tensor,
    column: Tensor,
    negative: Negative,
    own: Callable[[Tensor], Tensor],
    grad: Tensor,
) -> Tensor:
    """The sum of `entry_losses`, 0-d, without a tensor of the single values.

    The derivatives are written to `gradient` (R, C), which `negative` gets as it is.
    """
    with torch.no_grad():
        own_value, own_grad = value_and_grad(own, logits.gather(1, column))
        total, scratch = logits.new_zeros((), dtype=torch.float64), Scratch()
        for rows in sample_chunks(logits):
            value = scratch.take("value", grad[rows])
            negative.write(logits[rows], rows, value, grad[rows])
            total += value.scatter_(1, column[rows], own_value[rows]).sum()
        grad.scatter_(1, column, own_grad)
    return with_grad(logits, total.to(logits.dtype), grad)


def with_grad(logits: Tensor, value: Tensor, grad: Tensor | None) -> Tensor:
    """A loss whose gradient is given.

    Args:
        logits: (R, C), what the gradient goes to.
        value: (R, C), or 0-d for the sum of all entries.
        gradient: (R, C), derivative of each value, or of the sum, by its logit; None: no gradient.

    Returns:
        The value, with the gradient.
    """
    return value if grad is None else _WithSlope.apply(logits, value, grad)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


@torch.no_grad()
def gradient_sums(grad: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute gradients received by each column, from positives and from negatives.

    Args:
        gradient: (R, C) from `entry_pass`: negatives are pushed down, at least 0.
        column: (R, 1) int64, where the positives are, pushed up, at most 0.

    Returns:
        (C,) and (C,), float64.
    """
    negative = grad.new_zeros(grad.shape[1], dtype=torch.float64)
    for rows in sample_chunks(grad):  # never the difference of two sums, which would cancel
        negative += grad[rows].clamp(min=0).sum(dim=0)
    own = grad.gather(1, column).squeeze(1).clamp(max=0).neg_()
    return torch.zeros_like(negative).scatter_add_(0, column.squeeze(1), own.double()), negative
