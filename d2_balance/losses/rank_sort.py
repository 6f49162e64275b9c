"""Rank & Sort loss: rank positives above negatives, and sort positives by their IoU.

For a positive i with target y_i = IoU of its decoded box, H the step of `ranking`:

    rank+_i = sum_{k in P} H(s_k - s_i),   FP_i = sum_{j in Neg} H(s_j - s_i)
    l_R(i)  = FP_i / (rank+_i + FP_i)
    l_S(i)  = sum_k H(s_k - s_i) (1 - y_k) / rank+_i
    l_S*(i) = sum_k H(s_k - s_i) [y_k >= y_i] (1 - y_k) / sum_k H(s_k - s_i) [y_k >= y_i]
    L = mean_i l_R(i) + mean_i (l_S(i) - l_S*(i))

The gradient is the paper's identity update: a positive moves up by its own error, negatives and
worse positives above it move down by their fraction of that error.

Source: Oksuz et al., Rank & Sort Loss for Object Detection and Instance Segmentation,
arXiv:2107.11669, equations 6 to 12. One ranking over all images of the process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check, per_sample
from ._kernels.ranking import StepBuckets, error_driven, positive_scores
from ._samples import Samples

MIN_TARGET = 1e-6  # an IoU of exactly 0 would turn the positive into background
PAIRS = 2**18  # of the P x P sorting part at a time


def sorting(scores: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """The sorting part.

    Args:
        scores: (P,) logits of the positives, float64.
        targets: (P,) in (0, 1], float64.
        delta: half width of the step.

    Returns:
        (P,) errors l_S - l_S*, and (P,) gradient of their sum.
    """
    order = scores.argsort()
    scores, targets = scores[order], targets[order]
    error, pushed = torch.zeros_like(scores), torch.zeros_like(scores)
    miss = torch.stack([1 - targets, torch.ones_like(targets)])  # (2, P)
    size = max(PAIRS // max(len(scores), 1), 1)
    starts = range(0, len(scores), size)
    firsts = [0] * len(starts)  # steps of lower scores are 0; a host-device sync on a GPU
    if not scores.is_cuda:
        firsts = torch.searchsorted(scores, scores[::size] - delta).tolist()
    for start, first in zip(starts, firsts, strict=True):  # buffers of P x size stay in the cache
        chunk, others = slice(start, start + size), slice(first, None)
        step = (scores[others] - scores[chunk, None]).mul_(0.5 / delta).add_(0.5).clamp_(0, 1)
        better = torch.empty_like(step)  # (C, P')
        torch.ge(targets[others], targets[chunk, None], out=better).mul_(step)
        worse = step.sub_(better)
        best, rest = (F.linear(x, miss[:, others]) for x in (better, worse))  # (C, 2)
        current = (best[:, 0] + rest[:, 0]) / (best[:, 1] + rest[:, 1])
        error[chunk] = current - best[:, 0] / best[:, 1]
        moved = torch.where(rest[:, 1] > 0, error[chunk], torch.zeros_like(current))
        pushed[others] += (moved / rest[:, 1].clamp(min=1e-12)) @ worse
        pushed[chunk] -= moved
    back = order.argsort()
    return error[back], pushed[back]


def rank_sort_and_gradient(
    scores: Tensor, positive: Tensor, targets: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both parts and the gradient of their sum.

    Args:
        scores: (n,) logits of all (sample, class) entries.
        positive: (P,) int64, indices of the positive entries.
        targets: (P,) IoU of the decoded boxes, in [0, 1].
        delta: half width of the step, above 0.

    Returns:
        0-d ranking part, 0-d sorting part, and (n,) gradient in the type of the scores.
    """
    count = max(len(positive), 1)
    targets = targets.double().clamp(min=MIN_TARGET)
    buckets = StepBuckets.build(scores, scores[positive], delta)
    own = StepBuckets.build(buckets.centers, buckets.centers, delta)
    ranked = own.sum_over_values()  # the entry itself counts one half, as in the release
    below = (buckets.sum_over_values() - ranked).clamp(min=0)
    ranking = below / (ranked + below)
    error = torch.where(below > 0, ranking / below.clamp(min=1e-12), torch.zeros_like(below))
    grad = buckets.sum_over_centers(error / count)
    error, moved = sorting(buckets.centers, targets, delta)
    grad[positive] = ((moved - ranking) / count).to(grad.dtype)
    return ranking.sum() / count, error.sum() / count, grad


def rank_sort_loss(logits: Tensor, positive: Tensor, targets: Tensor, delta: float = 0.5) -> Tensor:
    """Rank & Sort loss, with the gradient of the identity update.

    Args:
        logits: (R, K).
        positive: (P,) int64, indices of the positive entries in the flattened logits.
        targets: (P,) IoU of the decoded boxes, in [0, 1].
        delta: half width of the step, above 0.

    Returns:
        0-d tensor.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> rank_sort_loss(logits, torch.tensor([0, 4]), targets=torch.tensor([0.8, 0.5]))
        tensor(0.)
    """
    scores = logits.detach().flatten()
    ranking, sort, grad = rank_sort_and_gradient(scores, positive, targets, delta)
    return error_driven(logits, ranking + sort, grad)


@CLS_LOSSES.register("RankSort")
class RankSortLoss(ClassificationLoss):
    """Rank & Sort loss (arXiv:2107.11669) for sigmoid heads, used with BOX_LOSS GIoU.

    The box loss is a mean weighted by the highest score of each positive, scaled to the value of
    this loss (section 3.3). Without boxes all targets are 1, which leaves the ranking part.

    Args:
        delta: half width of the smoothed step, in logits, above 0.

    Raises:
        ValueError: delta is not above 0.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> RankSortLoss()(logits, labels)
        tensor(0.)
    """

    elementwise = False
    activation = "sigmoid"
    all_reduced = False
    couples_boxes = True

    def __init__(self, *, delta: float = 0.5) -> None:
        super().__init__()
        check(self, "delta", delta, delta > 0, "a number above 0")
        self.delta = delta

    def compute(self, samples: Samples) -> Tensor:
        return rank_sort_loss(samples.logits, positive_scores(samples), samples.iou, self.delta)

    def coupled_box_loss(
        self, samples: Samples, cls: Tensor, box: Tensor, intermediate: None = None
    ) -> Tensor:
        weight = samples.logits[samples.pos].detach().sigmoid().amax(dim=1)  # (P,)
        loss = (weight * per_sample(box)).sum() / weight.sum().clamp(min=1e-12)
        return loss * (cls.detach() / loss.detach().clamp(min=1e-6)).to(loss.dtype)
