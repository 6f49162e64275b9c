"""Sums over pairs of scores without a matrix of pairs, shared by the ranking losses.

    H(x) = clamp(x / (2 delta) + 1/2, 0, 1)

is piecewise linear, so that for fixed centres q_i the sum F(s) = sum_i w_i H(s - q_i) is linear
between the sorted break points q_i - delta and q_i + delta. With P centres and n values, both the
sums over centres and the sums over values cost O(n log P) time and O(n + P) memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Samples


@dataclass(frozen=True)
class StepBuckets:
    """The break points of P centres, and the bucket of each of n values.

    Attributes:
        centers: (P,) float64.
        edges: (2 P,) float64, the break points in ascending order.
        values: (n,) float64.
        bucket: (n,) int64 in [0, 2 P], the number of break points at or below a value.
        delta: half width of the step.
    """

    centers: Tensor
    edges: Tensor
    values: Tensor
    bucket: Tensor
    delta: float

    @classmethod
    def build(cls, values: Tensor, centers: Tensor, delta: float) -> StepBuckets:
        """Sorts the break points of (P,) centres and places (n,) values between them."""
        centers, wide = centers.double(), values.double()
        edges = torch.cat([centers - delta, centers + delta]).sort().values
        return cls(centers, edges, wide, find_buckets(edges, values), delta)

    def sum_over_values(self, weights: Tensor | None = None) -> Tensor:
        """(P,) sum_j w_j H(s_j - q_i) for every centre.

        Args:
            weights: (n,) float64; None: ones.
        """
        size = len(self.edges) + 1
        zeros = self.values.new_zeros(size)
        if weights is None:
            weights, moments = self.values.new_ones(()).expand_as(self.values), self.values
        else:
            moments = weights * self.values
        count = zeros.scatter_add(0, self.bucket, weights)
        total = zeros.scatter_add(0, self.bucket, moments)
        # sums over all values at or above the lower end of a bucket
        count, total = (x.flip(0).cumsum(0).flip(0) for x in (count, total))
        low = torch.searchsorted(self.edges, self.centers - self.delta, right=True)
        high = torch.searchsorted(self.edges, self.centers + self.delta, right=True)
        inside, moment = count[low] - count[high], total[low] - total[high]
        ramp = (moment - self.centers * inside) / (2 * self.delta) + inside / 2
        return ramp + count[high]

    def sum_over_centers(self, weights: Tensor) -> Tensor:
        """(n,) sum_i w_i H(s_j - q_i) for every value.

        Args:
            weights: (P,) float64.
        """
        size = len(self.edges) + 1
        low = torch.searchsorted(self.edges, self.centers - self.delta, right=True)
        high = torch.searchsorted(self.edges, self.centers + self.delta, right=True)
        slope = weights / (2 * self.delta)
        offset = weights / 2 - slope * self.centers
        slopes = slope.new_zeros(size).index_add_(0, low, slope).index_add_(0, high, -slope)
        offsets = offset.new_zeros(size).index_add_(0, low, offset)
        offsets.index_add_(0, high, weights - offset)
        slopes, offsets = slopes.cumsum(0), offsets.cumsum(0)
        at = offsets.index_select(0, self.bucket)
        return at.addcmul_(slopes.index_select(0, self.bucket), self.values)


def find_buckets(edges: Tensor, values: Tensor) -> Tensor:
    """Number of edges at or below each value.

    On a CPU the binary search of millions of values is most of a ranking loss. There a grid of
    equal cells comes first: a value in a cell without an edge is placed by one look-up, and only
    the others are searched. Rounding cannot misplace a value, because the cell of a number never
    falls as the number grows.

    Args:
        edges: (E,) float64, ascending.
        values: (n,) floating point.

    Returns:
        (n,) int64 in [0, E].
    """
    cells = min(32 * len(edges), 2**18)
    if values.is_cuda or not len(edges) or len(values) < 4 * cells:
        return torch.searchsorted(edges, values.double(), right=True)
    low, high = edges[0], edges[-1]
    scale = (cells - 1) / (high - low).clamp(min=1e-30)

    def cell(x: Tensor) -> Tensor:
        place = (x - low.to(x.dtype)).mul_(scale.to(x.dtype)).clamp_(min=-1, max=cells)
        return place.add_(1).int().clamp_(min=0, max=cells + 1)  # what is no number goes to 0

    at_edges = torch.bincount(cell(edges.to(values.dtype)), minlength=cells + 2)
    at = cell(values)
    bucket = at_edges.cumsum(0).index_select(0, at)
    unsure = (at_edges > 0).index_select(0, at).nonzero().squeeze(1)
    bucket[unsure] = torch.searchsorted(edges, values[unsure].double(), right=True)
    return bucket


def positive_scores(samples: Samples) -> Tensor:
    """(P,) int64, indices of the positive entries in the flattened (R * K,) logits."""
    return samples.pos * samples.logits.shape[1] + samples.labels[samples.pos]


def error_driven(logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
    """A loss whose gradient is given: the update of the ranking losses, not a derivative.

    Args:
        logits: (R, K), what the gradient goes to.
        loss: 0-d value.
        grad: (R * K,) gradient of the flattened logits.

    Returns:
        0-d tensor in the type of the logits; NaN where the gradient is not finite, which the value
        of a rank does not show.
    """
    loss = loss + 0 * grad.sum()  # a gradient that is no number shows in no rank
    return _ErrorDriven.apply(logits, loss, grad.to(logits.dtype).view_as(logits))


class _ErrorDriven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.to(logits.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None
