"""Losses of (sample, class) entries with closed-form gradients, computed chunk by chunk.

The logits of a dense head have millions of entries, and nearly all of them are negatives. Autograd
would keep five to ten tensors of their size. Here every entry is first taken as a negative, and
then the one entry of each sample that may be positive is replaced. The gradient is written in the
same pass, in closed form, and is all that is kept for the backward pass.

The plain formulas stand above the modules. They give the value and the gradient of the positives,
and the tests compare the chunks with them.

Shapes as in `samples`; C is the number of columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import map_chunks


class Negative(Protocol):
    """Loss of the entries that are not the class of the object."""

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        """Write the losses of a chunk and their derivatives by the logits.

        Args:
            logits: (r, C), the chunk.
            chunk: its r samples in the batch.
            value: (r, C), written.
            grad: (r, C), written; None: not needed.
        """


Formula = Callable[[Tensor], Tensor]


def softplus(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + e^z), the cross-entropy of a negative; above 40 it is z in float64 as well."""
    return F.softplus(logits, 1, 40, out=out)  # type: ignore[call-arg]  # the stubs lack `out`


def needs_grad(logits: Tensor) -> bool:
    """Whether a backward pass will ask for the gradient of the logits."""
    return torch.is_grad_enabled() and logits.requires_grad


def value_and_grad(formula: Formula, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A formula of entries and its derivative, both of the shape of the logits, without graph."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = formula(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def _positives(
    logits: Tensor, column: Tensor, own: Formula, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(R, 1) losses of the entries in `column`, and their derivatives if they are needed."""
    logits = logits.detach().gather(1, column)
    return value_and_grad(own, logits) if with_grad else (own(logits), None)


@torch.no_grad()
def entry_pass(
    logits: Tensor, column: Tensor, negative: Negative, own: Formula, with_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The loss of every entry and its derivative, both (R, C); arguments as `entry_losses`."""
    own_value, own_grad = _positives(logits, column, own, with_grad)
    value = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad = torch.empty_like(value) if with_grad else None
    map_chunks(
        lambda chunk: negative.write(
            logits[chunk], chunk, value[chunk], None if grad is None else grad[chunk]
        ),
        logits,
    )
    if grad is not None and own_grad is not None:
        grad.scatter_(1, column, own_grad)
    return value.scatter_(1, column, own_value), grad


def entry_losses(logits: Tensor, column: Tensor, negative: Negative, own: Formula) -> Tensor:
    """The loss of every entry.

    Args:
        logits: (R, C).
        column: (R, 1) int64, the column of each sample that `own` computes.
        negative: the loss of all other columns.
        own: loss (R, 1) of the logits (R, 1) in `column`, differentiable.

    Returns:
        (R, C).
    """
    return with_grad(logits, *entry_pass(logits, column, negative, own, needs_grad(logits)))


def entry_total(
    logits: Tensor, column: Tensor, negative: Negative, own: Formula, grad: Tensor
) -> Tensor:
    """The sum of `entry_losses`, 0-d, without a tensor of the single values.

    The derivatives are written to `grad` (R, C), which `negative` receives as it is.
    """
    wanted = needs_grad(logits)
    with torch.no_grad():
        own_value, own_grad = _positives(logits, column, own, wanted)

        def work(chunk: slice) -> Tensor:
            value = torch.empty_like(grad[chunk])
            negative.write(logits[chunk], chunk, value, grad[chunk])
            return value.scatter_(1, column[chunk], own_value[chunk]).sum()

        total = total_of(map_chunks(work, logits), logits.new_zeros(()))
        if own_grad is None:
            return total
        grad.scatter_(1, column, own_grad)
    return with_grad(logits, total, grad)


def total_of(values: list[Tensor], zero: Tensor) -> Tensor:
    """The sum of what the chunks gave, added up in float64, in the type of `zero`."""
    return torch.stack([zero, *values]).sum(dim=0, dtype=torch.float64).to(zero.dtype)


def with_grad(logits: Tensor, value: Tensor, grad: Tensor | None) -> Tensor:
    """A loss whose gradient is given.

    Args:
        logits: (R, C), what the gradient goes to.
        value: (R, C), or 0-d for the sum of all entries.
        grad: (R, C), derivative of each value, or of the sum, by its logit; None: no gradient.

    Returns:
        The value, with the gradient.
    """
    if grad is None:
        return value
    loss: Tensor = _WithGrad.apply(logits, value, grad)
    return loss


def refuse_double_backward() -> None:
    """Raise if the backward pass should have a graph of its own, which a closed form has not.

    Without this a second derivative would silently be zero.

    Raises:
        RuntimeError: the backward pass was called with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the gradient of this loss is in closed form and has no graph. The "
            "function beside the class (focal_loss beside FocalLoss) can be differentiated twice."
        )


class _WithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        refuse_double_backward()
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


@torch.no_grad()
def gradient_sums(grad: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute gradients received by each column, from positives and from negatives.

    Args:
        grad: (R, C) from `entry_pass`: negatives are pushed down, at least 0.
        column: (R, 1) int64, where the positives are, pushed up, at most 0.

    Returns:
        (C,) and (C,), float64.
    """
    zero = grad.new_zeros(grad.shape[1], dtype=torch.float64)
    # never the difference of two sums, which would cancel
    sums = map_chunks(lambda chunk: grad[chunk].clamp(min=0).sum(dim=0), grad)
    own = grad.gather(1, column).squeeze(1).clamp(max=0).neg_()
    positive = torch.zeros_like(zero).scatter_add_(0, column.squeeze(1), own.double())
    return positive, total_of(sums, zero)
