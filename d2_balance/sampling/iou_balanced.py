"""IoU-balanced sampling: background is sampled evenly over its overlap with the objects.

Random sampling finds mostly background far from any object; most hard negatives overlap one. The
interval [floor, m] of the IoU with the nearest object, m the largest among the negatives, is cut
into `bins` of equal width, and every bin gives the same number of negatives; what a bin cannot give
is sampled uniformly from all that are left.

Source: Pang et al., Libra R-CNN, arXiv:1904.02701, section 3.1, equations 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2_balance.losses._base import check
from d2_balance.losses._kernels.ranks import rank_within

from .base import PROPOSAL_SAMPLERS, Candidates, ProposalSampler, Selection, sample_positives


def sample_evenly(iou: Tensor, count: int, bins: int, floor: float) -> Tensor:
    """Sample negatives evenly over bins of their IoU.

    Args:
        iou: (n,) IoU with the nearest object, in [0, 1].
        count: how many to sample, at least 0.
        bins: number of bins, at least 1.
        floor: IoU at which the first bin begins; negatives below only fill up.

    Returns:
        (min(n, count),) int64 indices without repetition.
    """
    width = (iou.amax() - floor).clamp(min=1e-12) / bins if len(iou) else 1.0
    group = (1 + (iou - floor) / width).floor().long().clamp(0, bins)  # 0: below the floor
    shuffled = torch.randperm(len(iou), device=iou.device)
    rank = rank_within(group, shuffled)
    # equal numbers; a remainder goes to the bins of highest overlap
    quota = count // bins + (bins - group < count % bins).long()
    rest = (group == 0) | (rank >= quota)
    # in an order of its own: in that of `shuffled` large bins would come before small ones
    again = torch.randperm(len(iou), device=iou.device)
    return again[rest[again].int().argsort(stable=True)][:count]


@PROPOSAL_SAMPLERS.register()
class IoUBalanced(ProposalSampler):
    """IoU-balanced sampling of background proposals (arXiv:1904.02701); positives stay random.

    Args:
        bins: number of IoU bins, at least 1.
        floor: IoU at which the first bin begins, in [0, 1). Negatives below fill up what the
            bins cannot give.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, bins: int = 3, floor: float = 0.0) -> None:
        super().__init__()
        check(self, "bins", bins, bins >= 1, "an integer of at least 1")
        check(self, "floor", floor, 0 <= floor < 1, "a number in [0, 1)")
        self.bins, self.floor = bins, floor

    def select(self, c: Candidates, batch_size: int, positive_fraction: float) -> Selection:
        positive = sample_positives(c, batch_size, positive_fraction)
        count = batch_size - len(positive)
        negative = c.negative[sample_evenly(c.iou[c.negative], count, self.bins, self.floor)]
        return Selection(torch.cat([positive, negative]))
