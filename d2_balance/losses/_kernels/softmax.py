"""Softmax cross-entropy of logits that a method has moved, chunk by chunk.

Autograd would keep the moved logits, their softmax and what the method made on the way, each of the
size of the logits. Here only the derivative is kept, softmax minus one-hot.

Shapes as in `samples`; C is the number of columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import map_chunks
from .entries import needs_grad, with_grad


def softmax_losses(
    logits: Tensor, labels: Tensor, moved: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """-log softmax(moved logits) at the label of each sample.

    Args:
        logits: (R, C).
        labels: (R,) int64 in [0, C).
        moved: what a method makes of (r, C) logits, given their slice of the batch: the logits plus
            what counts as a constant.

    Returns:
        (R,), with gradient.
    """
    value, grad = softmax_pass(logits.detach(), labels.unsqueeze(1), moved)
    if not needs_grad(logits):
        return value.squeeze(1)
    # the sum of one column: `squeeze` makes a view, whose gradient torch.compile loses
    return with_grad(logits, value, grad).sum(dim=1)


@torch.no_grad()
def softmax_pass(
    logits: Tensor, own: Tensor, moved: Callable[[Tensor, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """(R, 1) losses and their (R, C) derivatives, for (R, 1) labels; see `softmax_losses`."""
    value = logits.new_empty(len(logits), 1)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)

    def work(chunk: slice) -> None:
        log_p = F.log_softmax(moved(logits[chunk], chunk), dim=1)
        torch.neg(log_p.gather(1, own[chunk]), out=value[chunk])
        torch.exp(log_p, out=grad[chunk])

    map_chunks(work, logits)
    return value, grad.scatter_add_(1, own, -torch.ones_like(value))
