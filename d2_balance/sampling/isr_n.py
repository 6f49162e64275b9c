"""ISR-N: background proposals sampled and weighted by rank (PISA, prime sample attention).

For the background proposals of an image, with s_i the highest class probability and boxes
decoded for that class: those with s_i > 0.05 are grouped by suppression (IoU 0.5),

    local rank   of i in its group, by s_i,      r_i: rank by (local rank, s_i), n of them
    u_i = (m - r_i) / m,   w_i = ((1 - b) u_i + b)^k,   m = max(n, negatives to be taken)

the first are taken with these weights; random others fill up with the least weight; the sum of the
loss stays, as for ISR-P.

Source: Cao et al., Prime Sample Attention in Object Detection, arXiv:1904.04821, equations 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from d2_balance.losses._base import check
from d2_balance.losses._kernels.ranks import importance, rank_within, rescaled

from .base import (
    PROPOSAL_SAMPLERS,
    Candidates,
    ProposalSampler,
    Selection,
    random_subset,
    sample_positives,
)


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
    owner: Tensor = close.int().argmax(dim=1) if len(keep) else keep
    return owner


def score_order(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Order of negatives by (local rank in their group, score): indices (n,), first one first."""
    by_score = scores.argsort(descending=True, stable=True)
    local = rank_within(nms_groups(boxes, scores, iou_threshold), by_score)
    return by_score[local[by_score].argsort(stable=True)]


@PROPOSAL_SAMPLERS.register()
class ISRN(ProposalSampler):
    """Importance-based selection and weights of background proposals, ISR-N (arXiv:1904.04821).

    Positives are sampled as in Detectron2. RoI heads only: it needs proposals to sample from.

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
        assert c.scores is not None and c.pred_boxes is not None and c.cls_loss is not None
        positive = sample_positives(c, batch_size, positive_fraction)
        wanted = min(batch_size - len(positive), len(c.negative))
        high = c.scores[c.negative] > self.score_threshold
        ranked = c.negative[high]
        order = score_order(c.pred_boxes[ranked], c.scores[ranked], self.iou_threshold)[:wanted]
        others = c.negative[~high]
        fill = random_subset(others, wanted - len(order))
        negative = torch.cat([ranked[order], fill])
        rank = torch.arange(len(negative), device=order.device)
        rank = rank.clamp(max=max(len(order) - 1, 0))  # the random ones have the last rank
        weight = importance(rank, max(len(ranked), wanted, 1), self.k, self.bias)
        loss = c.cls_loss[negative]
        weight = rescaled(weight.to(loss.dtype), loss)
        return Selection(
            torch.cat([positive, negative]), torch.cat([weight.new_ones(len(positive)), weight])
        )
