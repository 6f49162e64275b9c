"""PISA: prime sample attention. ISR weights samples by rank, CARL boxes by score.

ISR-P, for the positives of a batch with IoU_i of the decoded box and its object:

    local rank   of i among the positives of its object, by IoU
    r_i          rank inside the class by (local rank, IoU): best box of every object first
    u_i = (n_max - r_i) / n_max,   w_i = ((1 - b) u_i + b)^k,   n_max: most positives of a class
    w'_i = w_i sum_j CE_j / sum_j w_j CE_j              the sum of the loss stays

ISR-N, for the background proposals of a picture, with s_i the highest class probability and boxes
decoded for that class: those with s_i > 0.05 are grouped by suppression (IoU 0.5),

    local rank   of i in its group, by s_i,      r_i: rank by (local rank, s_i), n of them
    u_i = (m - r_i) / m,   w_i = ((1 - b) u_i + b)^k,   m = max(n, negatives wanted)

the first are taken with these weights; random others fill up with the least weight; the sum of the
loss stays, as for ISR-P.

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
from torchvision.ops import box_iou, nms

from d2_balance.losses import Samples
from d2_balance.losses._base import check
from d2_balance.sampling.base import Candidates, Selection, Selector, draw_positives

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
    most = (rank + 1).amax() if len(rank) else 1  # the last rank of the largest class
    return rescaled(importance(rank, most, k, bias).to(ce.dtype), ce)


def importance(rank: Tensor, most: Tensor | int, k: float, bias: float) -> Tensor:
    """((1 - b) (most - rank) / most + b)^k for ranks (n,) below `most`."""
    return ((1 - bias) * (most - rank) / most + bias).pow(k)


def rescaled(weight: Tensor, ce: Tensor) -> Tensor:
    """Weights (n,) times the factor that keeps the sum of the losses (n,); no gradient."""
    ce = ce.detach()
    total = (weight * ce).sum()
    return weight * torch.where(total > 0, ce.sum() / total.clamp(min=1e-12), 1.0)


def nms_groups(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which survivor of non-maximum suppression stands for each box.

    Args:
        boxes: (n, 4) x0 y0 x1 y1.
        scores: (n,).
        iou_threshold: in [0, 1].

    Returns:
        (n,) int64, the first survivor by score that the box overlaps, in order of score.
    """
    keep = nms(boxes, scores, iou_threshold)
    close = box_iou(boxes, boxes[keep]) > iou_threshold  # (n, kept)
    close[keep, torch.arange(len(keep), device=keep.device)] = True  # boxes without area, too
    return close.int().argmax(dim=1) if len(keep) else keep


def score_order(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Order of negatives by (local rank in their group, score): indices (n,), first one first."""
    by_score = scores.argsort(descending=True, stable=True)
    local = rank_within(nms_groups(boxes, scores, iou_threshold), by_score)
    return by_score[local[by_score].argsort(stable=True)]


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
class ISRN(Selector):
    """Importance-based selection and weights of background proposals, ISR-N (arXiv:1904.04821).

    Positives are drawn as Detectron2 draws them. RoI heads only: it needs proposals to draw from.

    Args:
        k: exponent, at least 0.
        bias: b, in [0, 1].
        score_threshold: only negatives with a class score above it are ranked, in [0, 1).
        iou_threshold: IoU of the grouping, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    needs_predictions = True

    def __init__(
        self,
        *,
        k: float = 0.5,
        bias: float = 0.0,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        check(self, "k", k, k >= 0, "a number of at least 0")
        check(self, "bias", bias, 0 <= bias <= 1, "a number in [0, 1]")
        check(self, "score_threshold", score_threshold, 0 <= score_threshold < 1, "in [0, 1)")
        check(self, "iou_threshold", iou_threshold, 0 <= iou_threshold <= 1, "in [0, 1]")
        self.k, self.bias = k, bias
        self.score_threshold, self.iou_threshold = score_threshold, iou_threshold

    def select(self, c: Candidates, batch_size: int, positive_fraction: float) -> Selection:
        positive = draw_positives(c, batch_size, positive_fraction)
        wanted = batch_size - len(positive)
        high = c.scores[c.negative] > self.score_threshold
        ranked = c.negative[high]
        order = score_order(c.pred_boxes[ranked], c.scores[ranked], self.iou_threshold)[:wanted]
        others = c.negative[~high]
        fill = others[torch.randperm(len(others), device=others.device)][: wanted - len(order)]
        negative = torch.cat([ranked[order], fill])
        rank = torch.arange(len(negative), device=order.device)
        rank = rank.clamp(max=max(len(order) - 1, 0))  # the random ones share the last rank
        weight = importance(rank, max(len(ranked), wanted, 1), self.k, self.bias)
        loss = c.cls_loss[negative]
        weight = rescaled(weight.to(loss.dtype), loss)
        return Selection(
            torch.cat([positive, negative]), torch.cat([weight.new_ones(len(positive)), weight])
        )


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
