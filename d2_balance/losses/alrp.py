"""aLRP loss: average localisation recall precision, one ranking for classes and boxes.

For a positive i with box error e_i (GIoU loss), H the step of `ranking`:

    rank_i = 1 + sum_{k in P, k != i} H(s_k - s_i) + b_i,   b_i = sum_{j in Neg} H(s_j - s_i)
    L_cls  = 1 - mean_i (rank_i - b_i) / rank_i
    LRP_i  = ( sum_{k in P, k != i} H(s_k - s_i) e_k + b_i ) / rank_i
    dL/ds_i = -LRP_i / P,   dL/ds_j = (1/P) sum_i H(s_j - s_i) / b_i LRP_i
    L_box  = mean_i ( sum of e_k over positives that score at least as high as i ) / rank_i

L_box is multiplied by a self-balancing weight: 50 at first, then after every `period` iterations
(mean L_cls + mean L_box) / mean L_box of that time.

Source: Oksuz et al., A Ranking-based, Balanced Loss Function Unifying Classification and
Localisation in Object Detection, arXiv:2009.13592, equations 8 to 14 and section 4.3. One ranking
over all images of the process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2_balance.utils.distributed import world_size

from ._base import CLS_LOSSES, ClassificationLoss, check, per_sample
from ._kernels.ranking import StepBuckets, error_driven, positive_scores
from ._samples import Samples
from .iou import giou_loss

START_WEIGHT = 50.0
Ranked = tuple[Tensor, Tensor, Tensor]  # what `alrp_and_gradient` returns


def alrp_and_gradient(
    scores: Tensor, positive: Tensor, errors: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification part, its gradient, and the ranks that the box part needs.

    Args:
        scores: (n,) logits of all (sample, class) entries.
        positive: (P,) int64, indices of the positive entries.
        errors: (P,) localisation errors, at least 0.
        delta: half width of the step, above 0.

    Returns:
        0-d loss, (n,) gradient and (P,) ranks, float64.
    """
    count = max(len(positive), 1)
    errors = errors.double()
    buckets = StepBuckets.build(scores, scores[positive], delta)
    own = StepBuckets.build(buckets.centers, buckets.centers, delta)
    above = own.sum_over_values()  # the entry itself counts H(0) = 1/2
    below = (buckets.sum_over_values() - above).clamp(min=0)
    rank = above + 0.5 + below
    lrp = (own.sum_over_values(errors) - errors / 2 + below) / rank
    moved = torch.where(below > 1e-5, lrp, torch.zeros_like(lrp))
    grad = buckets.sum_over_centers(moved / below.clamp(min=1e-5) / count)
    grad[positive] = (-moved / count).to(grad.dtype)
    return (below / rank).sum() / count, grad, rank


def alrp_box_loss(errors: Tensor, scores: Tensor, rank: Tensor) -> Tensor:
    """Localisation part.

    Args:
        errors: (P,) localisation errors, with gradient.
        scores: (P,) logits of the positives.
        rank: (P,) from `alrp_and_gradient`.

    Returns:
        0-d tensor.
    """
    order = scores.argsort(descending=True, stable=True)
    return (errors[order].cumsum(0) / rank[order].to(errors.dtype)).sum() / max(len(errors), 1)


def alrp_loss(
    logits: Tensor, positive: Tensor, errors: Tensor, delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Classification part of aLRP loss, with the error-driven gradient.

    Args:
        logits: (R, K).
        positive: (P,) int64, indices of the positive entries in the flattened logits.
        errors: (P,) localisation errors of the boxes, at least 0, such as GIoU losses.
        delta: half width of the step, above 0.

    Returns:
        0-d loss, and (P,) ranks for `alrp_box_loss`.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> loss, rank = alrp_loss(logits, torch.tensor([0, 4]), errors=torch.tensor([0.2, 0.5]))
        >>> loss
        tensor(0.1000)
    """
    loss, grad, rank = alrp_and_gradient(logits.detach().flatten(), positive, errors, delta)
    return error_driven(logits, loss, grad), rank


@CLS_LOSSES.register("ALRP")
class ALRPLoss(ClassificationLoss):
    """aLRP loss (arXiv:2009.13592) for dense sigmoid heads, used with BOX_LOSS GIoU.

    Without boxes all errors are 0. Buffers, float64: `balance`, the self-balancing weight; `sums`
    (3,) classification loss, box loss and steps since it was set, of all ranks.

    Args:
        delta: half width of the smoothed step, in logits, above 0.
        period: iterations between two settings of the weight, at least 1 (an epoch of COCO at
            batch 16 has 7330).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> ALRPLoss()(logits, labels)
        tensor(0.)
    """

    elementwise = False
    activation = "sigmoid"
    all_reduced = False
    couples_boxes = True

    balance: Tensor
    sums: Tensor

    def __init__(self, *, delta: float = 1.0, period: int = 7330) -> None:
        super().__init__()
        check(self, "delta", delta, delta > 0, "a number above 0")
        check(self, "period", period, period >= 1, "an integer of at least 1")
        self.delta, self.period = delta, period
        self.register_buffer("balance", torch.tensor(START_WEIGHT, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def _rank(self, samples: Samples) -> tuple[Tensor, Ranked]:
        """(P,) box errors, and the loss, its gradient and the ranks."""
        if samples.pred_deltas is None or samples.gt_boxes is None:
            errors = samples.logits.new_zeros(len(samples.pos))
        else:
            boxes = samples.pred_boxes.detach()
            errors = giou_loss(boxes, samples.gt_boxes.to(boxes.dtype))
        positive, scores = positive_scores(samples), samples.logits.detach().flatten()
        return errors, alrp_and_gradient(scores, positive, errors, self.delta)

    @torch.no_grad()
    def batch_statistics(self, samples: Samples) -> tuple[Tensor, Ranked]:
        """(3,) classification loss, box loss and 1; the loss, its gradient and the ranks."""
        errors, ranked = self._rank(samples)
        scores = samples.logits.detach().flatten()[positive_scores(samples)]
        box = alrp_box_loss(errors.double(), scores, ranked[2])
        return torch.stack([ranked[0], box, torch.ones_like(box)]), ranked

    def update(self, total: Tensor) -> None:
        sums = self.sums + total
        due = sums[2] >= self.period * world_size()
        weight = (sums[0] + sums[1]) / sums[1].clamp(min=1e-12)
        self.balance.copy_(torch.where(due & (sums[1] > 0), weight, self.balance))
        self.sums.copy_(torch.where(due, torch.zeros_like(sums), sums))

    def compute(self, samples: Samples) -> Tensor:
        return self.compute_from(self._rank(samples)[1], samples)

    def compute_from(self, intermediate: Ranked, samples: Samples) -> Tensor:
        loss, grad, _ = intermediate
        return error_driven(samples.logits, loss, grad)

    def coupled_box_loss(
        self, samples: Samples, cls: Tensor, box: Tensor, intermediate: Ranked | None = None
    ) -> Tensor:
        _, _, rank = intermediate or self._rank(samples)[1]
        scores = samples.logits.detach().flatten()[positive_scores(samples)]
        loss = alrp_box_loss(per_sample(box), scores, rank)
        return loss * self.balance.to(loss.dtype)

    def log_values(self) -> dict[str, Tensor]:
        return {"balance": self.balance}
