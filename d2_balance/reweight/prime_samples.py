"""PISA: prime sample attention. ISR-P weights positives by rank, CARL boxes by score.

ISR-P, for the positives of a batch with IoU_i of the decoded box and its object:

    local rank   of i among the positives of its object, by IoU
    r_i          rank inside the class by (local rank, IoU): best box of every object first
    u_i = (n_max - r_i) / n_max,   w_i = ((1 - b) u_i + b)^k,   n_max: most positives of a class
    w'_i = w_i sum_j CE_j / sum_j w_j CE_j              the sum of the loss stays

CARL, with p_i the score of the object's class (its gradient stays):

    v_i = ((1 - b) p_i + b)^k,   c_i = v_i P / sum_j v_j
    L_box = sum_i (1 + c_i) L_i   (add, as the published models)   or   sum_i c_i L_i   (replace)

Scores of badly placed boxes fall, because their box loss is above the average.

Source: Cao et al., Prime Sample Attention in Object Detection, arXiv:1904.04821, equations 1 to 6.
Ranks are taken over all images of the process; ids of objects are unique over the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..losses import Samples
from ..losses.base import check
from .base import REWEIGHTERS, Reweighter


def rank_within(group: Tensor, order: Tensor) -> Tensor:
    """Rank of each entry inside its group.

    Args:
        group: (P,) int64.
        order: (P,) int64 permutation, entries from first to last.

    Returns:
        (P,) int64, 0 for the first entry of a group.
    """
    order = order[group[order].argsort(stable=True)]  # groups together, order kept inside
    place = torch.arange(len(order), device=order.device)
    sorted_group = group[order]
    begins = torch.ones_like(sorted_group, dtype=torch.bool)
    begins[1:] = sorted_group[1:] != sorted_group[:-1]
    start = torch.where(begins, place, torch.zeros_like(place)).cummax(0).values
    return torch.empty_like(place).scatter_(0, order, place - start)


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
        (P,), without gradient.
    """
    ce = ce.detach()
    most = (rank + 1).amax() if len(rank) else 1  # the last rank of the largest class
    weight = ((1 - bias) * (most - rank) / most + bias).to(ce.dtype).pow(k)
    total = (weight * ce).sum()
    return weight * torch.where(total > 0, ce.sum() / total.clamp(min=1e-12), 1.0)


def object_scores(samples: Samples) -> Tensor:
    """(P,) probability of the object's class, with gradient."""
    logits, own = samples.logits[samples.pos], samples.labels[samples.pos].unsqueeze(1)
    sigmoid = samples.logits.shape[1] == samples.num_classes
    prob = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
    return prob.gather(1, own).squeeze(1)


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
        rows = cls.detach() if cls.dim() == 1 else cls.detach().sum(dim=1)  # (R,)
        ids = samples.gt_index if samples.gt_index is not None else torch.zeros_like(pos)
        rank = hierarchical_rank(samples.iou, ids, labels)
        weights = torch.ones_like(rows)
        weights[pos] = isr_weights(rank, labels, rows[pos], self.k, self.bias)
        return weights, None


@REWEIGHTERS.register()
class CARL(Reweighter):
    """Classification-aware regression loss (arXiv:1904.04821, equation 6).

    Args:
        k: exponent, at least 0.
        bias: b, weight of a score of 0, in [0, 1].
        mode: "add" keeps the box loss and adds the weighted one; "replace" has the weighted one.

    Raises:
        ValueError: an argument is out of range.
    """

    needs_scores = True

    def __init__(
        self, *, k: float = 1.0, bias: float = 0.2, mode: Literal["add", "replace"] = "add"
    ) -> None:
        super().__init__()
        check(self, "k", k, k >= 0, "a number of at least 0")
        check(self, "bias", bias, 0 <= bias <= 1, "a number in [0, 1]")
        check(self, "mode", mode, mode in ("add", "replace"), "one of add, replace")
        self.k, self.bias, self.mode = k, bias, mode

    def forward(self, samples: Samples, cls: Tensor, box: Tensor) -> tuple[None, Tensor]:
        value = ((1 - self.bias) * object_scores(samples) + self.bias).pow(self.k)  # (P,)
        weight = value * (len(value) / value.sum().clamp(min=1e-12))
        return None, weight + 1 if self.mode == "add" else weight
