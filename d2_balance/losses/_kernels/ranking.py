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

from .._samples import Samples
from .chunks import chunk_slices, map_chunks, neighbours
from .entries import total_of, with_grad


@dataclass(frozen=True)
class StepBuckets:
    """The break points of P centres, and the bucket of each of n values.

    Sums are float64; the n values are read chunk by chunk, and per value only the bucket is kept.

    Attributes:
        centers: (P,) float64.
        edges: (2 P,) float64, the break points in ascending order.
        values: (n,) floating point.
        bucket: (n,) int32 in [0, 2 P], the number of break points at or below a value.
        delta: half width of the step.
    """

    centers: Tensor
    edges: Tensor
    values: Tensor
    bucket: Tensor
    delta: float

    @classmethod
    def build(cls, values: Tensor, centers: Tensor, delta: float) -> StepBuckets:
        """Sort the break points of (P,) centres and find the buckets of (n,) values."""
        centers = centers.double()
        edges = torch.cat([centers - delta, centers + delta]).sort().values
        return cls(centers, edges, values, find_buckets(edges, values), delta)

    def sum_over_values(self, weights: Tensor | None = None) -> Tensor:
        """(P,) sum_j w_j H(s_j - q_i) for every centre.

        Args:
            weights: (n,) float64; None: ones.
        """
        size, tables = len(self.edges) + 1, 4 if self.values.device.type == "cpu" else 1
        length = max((s.stop - s.start for s in chunk_slices(self.values)), default=0)
        offset = neighbours(length, tables, size, self.values.device)
        ones = self.centers.new_ones(length)

        def work(group: slice) -> Tensor:
            sums = self.centers.new_zeros(2, tables * size)
            buckets, values = self.bucket[group], self.values[group]
            for chunk in chunk_slices(values):
                value = values[chunk].double()
                index = buckets[chunk] + offset[: len(value)]
                weight = ones[: len(value)] if weights is None else weights[group][chunk]
                sums[0].scatter_add_(0, index, weight)
                sums[1].scatter_add_(0, index, value if weights is None else value * weight)
            return sums.view(2, tables, size).sum(dim=1)

        zero = self.centers.new_zeros(2, size)
        # groups of chunks share tables, which are long if there are many positives
        count, total = total_of(map_chunks(work, self.values, groups=8), zero)
        # sums over all values at or above the lower end of a bucket
        count, total = (x.flip(0).cumsum(0).flip(0) for x in (count, total))
        low, high = self._ends()
        inside, moment = count[low] - count[high], total[low] - total[high]
        ramp = (moment - self.centers * inside) / (2 * self.delta) + inside / 2
        result: Tensor = ramp + count[high]
        return result

    def sum_over_centers(self, weights: Tensor) -> Tensor:
        """(n,) sum_i w_i H(s_j - q_i) for every value, in the type of the values.

        Args:
            weights: (P,) float64.
        """
        low, high = self._ends()
        grad = weights / (2 * self.delta)
        offset = weights / 2 - grad * self.centers
        grads = grad.new_zeros(len(self.edges) + 1)
        offsets = torch.zeros_like(grads)
        grads.index_add_(0, low, grad).index_add_(0, high, -grad)
        offsets.index_add_(0, low, offset).index_add_(0, high, weights - offset)
        grads, offsets = grads.cumsum(0), offsets.cumsum(0)
        out = torch.empty_like(self.values)

        def work(chunk: slice) -> None:
            bucket = self.bucket[chunk]
            at, grad = offsets.index_select(0, bucket), grads.index_select(0, bucket)
            out[chunk] = at.addcmul_(grad, self.values[chunk].double())

        map_chunks(work, self.values)
        return out

    def _ends(self) -> tuple[Tensor, Tensor]:
        """(P,) and (P,), the first buckets of the rising and of the level part of each step."""
        low = torch.searchsorted(self.edges, self.centers - self.delta, right=True)
        return low, torch.searchsorted(self.edges, self.centers + self.delta, right=True)


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
        (n,) int32 in [0, E].
    """
    cells = min(64 * len(edges), 2**18)  # a table of 1 MB at most
    if values.is_cuda or not len(edges) or len(values) < 4 * cells:
        return torch.searchsorted(edges, values.double(), right=True, out_int32=True)
    scale = (cells - 2) / (edges[-1] - edges[0]).clamp(min=1e-30)
    # two cells of distance: rounding must not bring an edge into cell 0, where most values lie
    low, scale = (edges[0] - 2 / scale).to(values.dtype), scale.to(values.dtype)

    def cell(x: Tensor) -> Tensor:  # 0 is below all edges; what is no number goes there, too
        return (x - low).mul_(scale).clamp_(0, cells + 1).int().clamp_(min=0)

    at_edges = torch.bincount(cell(edges.to(values.dtype)), minlength=cells + 2)
    table = at_edges.cumsum(0).int().masked_fill_(at_edges > 0, -1)  # -1: to be searched
    bucket = torch.empty_like(values, dtype=torch.int32)

    def work(chunk: slice) -> None:
        index = table.index_select(0, cell(values[chunk]))
        mixed = (index < 0).nonzero().squeeze(1)
        wide = values[chunk][mixed].double()
        index[mixed] = torch.searchsorted(edges, wide, right=True, out_int32=True)
        bucket[chunk] = index

    map_chunks(work, values)
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
    return with_grad(logits, loss.to(logits.dtype), grad.to(logits.dtype).view_as(logits))
