"""ISR-P: positives weighted by their rank (PISA, prime sample attention).

ISR-P, for the positives of a batch with IoU_i of the decoded box and its object:

    local rank   of i among the positives of its object, by IoU
    r_i          rank inside the class by (local rank, IoU): best box of every object first
    u_i = (n_max - r_i) / n_max,   w_i = ((1 - b) u_i + b)^k,   n_max: most positives of a class
    w'_i = w_i sum_j CE_j / sum_j w_j CE_j              the sum of the loss stays

Source: Cao et al., Prime Sample Attention in Object Detection, arXiv:1904.04821, equations 1 to 6.
Ranks are taken over all images of the process; ids of objects are unique over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2_balance.losses import Samples
from d2_balance.losses._base import check
from d2_balance.losses._kernels.ranks import importance, rank_within, rescaled

from .base import REWEIGHTERS, Reweighter


def hierarchical_rank(iou: Tensor, gt_index: Tensor, labels: Tensor) -> Tensor:
    """IoU-HLR: rank of each positive inside its class.

    Args:
        iou: (P,) in [0, 1].
        gt_index: (P,) int64 id of the object.
        labels: (P,) int64 class.

    Returns:
        (P,) int64, 0 is the most important positive of its class.
    """
    by_iou = iou.argsort(descending=True, stable=True)
    local = rank_within(gt_index, by_iou)
    order = by_iou[local[by_iou].argsort(stable=True)]
    return rank_within(labels, order)


def isr_weights(rank: Tensor, labels: Tensor, ce: Tensor, k: float, bias: float) -> Tensor:
    """ISR-P weights that keep the sum of the loss.

    Args:
        rank: (P,) hierarchical ranks.
        labels: (P,) int64 class.
        ce: (P,) loss of each positive.
        k: exponent, at least 0.
        bias: b, in [0, 1].

    Returns:
        (P,), without a graph.
    """
    most = (rank + 1).amax() if len(rank) else 1  # the last rank of the largest class
    return rescaled(importance(rank, most, k, bias).to(ce.dtype), ce)


@REWEIGHTERS.register()
class ISR(Reweighter):
    """Importance-based sample reweighting of positives, ISR-P (arXiv:1904.04821, equation 3).

    Args:
        k: exponent, at least 0.
        bias: b, weight of the last rank, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, k: float = 2.0, bias: float = 0.0) -> None:
        super().__init__()
        check(self, "k", k, k >= 0, "a number of at least 0")
        check(self, "bias", bias, 0 <= bias <= 1, "a number in [0, 1]")
        self.k, self.bias = k, bias

    def forward(self, samples: Samples, cls: Tensor, box: Tensor) -> tuple[Tensor, None]:
        pos = samples.pos
        labels = samples.labels[pos]
        loss = cls.detach() if cls.dim() == 1 else cls.detach().sum(dim=1)  # (R,)
        ids = samples.gt_index if samples.gt_index is not None else torch.zeros_like(pos)
        rank = hierarchical_rank(samples.iou, ids, labels)
        weights = torch.ones_like(loss)
        weights[pos] = isr_weights(rank, labels, loss[pos], self.k, self.bias)
        return weights, None
