"""AP-loss: one minus average precision, with an error-driven gradient.

For a positive i, with H the step of `ranking`:

    a_i = 1 + sum_{k in P, k != i} H(s_k - s_i),   b_i = sum_{j in Neg} H(s_j - s_i)
    prec_i = a_i / (a_i + b_i),   iprec = running maximum of prec, from low to high scores
    L = 1 - mean_i iprec_i
    dL/ds_i = -(1 - iprec_i) / P
    dL/ds_j = (1 / P) sum_i c_i H(s_j - s_i) / (a_i + b_i),   c_i = (1 - iprec_i) / (1 - prec_i)

Source: Chen et al., Towards Accurate One-Stage Object Detection with AP-Loss, arXiv:1904.06373,
equations 5 to 11 and algorithm 1. One ranking over all images of the process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.ranking import StepBuckets, error_driven, positive_scores
from ._samples import Samples


def ap_loss_and_gradient(scores: Tensor, positive: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """AP-loss and its error-driven gradient.

    Args:
        scores: (n,) logits of all (sample, class) entries.
        positive: (P,) int64, indices of the positive entries.
        delta: half width of the step, above 0.

    Returns:
        0-d loss and (n,) gradient in the type of the scores; zero without positives.
    """
    count = max(len(positive), 1)
    buckets = StepBuckets.build(scores, scores[positive], delta)
    own = StepBuckets.build(buckets.centers, buckets.centers, delta)
    ranked = own.sum_over_values() + 0.5  # the entry itself counts 1, H(0) gives one half
    below = buckets.sum_over_values() - own.sum_over_values()
    total = ranked + below
    precision = ranked / total
    order = buckets.centers.argsort(stable=True)
    interpolated = torch.empty_like(precision)
    interpolated[order] = precision[order].cummax(0).values if len(order) else precision
    factor = (1 - interpolated) / (1 - precision).clamp(min=1e-12)
    factor = torch.where(interpolated > precision, factor, torch.ones_like(factor))
    grad = buckets.sum_over_centers(factor / total / count)
    grad[positive] = ((interpolated - 1) / count).to(grad.dtype)
    return (1 - interpolated).sum() / count, grad


def ap_loss(logits: Tensor, positive: Tensor, delta: float = 1.0) -> Tensor:
    """AP-loss, with the error-driven gradient.

    Args:
        logits: (R, K).
        positive: (P,) int64, indices of the positive entries in the flattened logits.
        delta: half width of the step, above 0.

    Returns:
        0-d tensor.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> ap_loss(logits, positive=torch.tensor([0, 4]))
        tensor(0.1000)
    """
    return error_driven(logits, *ap_loss_and_gradient(logits.detach().flatten(), positive, delta))


@CLS_LOSSES.register("AP")
class APLoss(ClassificationLoss):
    """AP-loss (arXiv:1904.06373) for dense sigmoid heads; inference is unchanged.

    The loss is not divided by the number of positives again. The authors train 100 epochs with a
    learning rate of 0.001 at batch 8.

    Args:
        delta: half width of the smoothed step, in logits, above 0.

    Raises:
        ValueError: delta is not above 0.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> APLoss()(logits, labels)
        tensor(0.)
    """

    elementwise = False
    activation = "sigmoid"
    all_reduced = False

    def __init__(self, *, delta: float = 1.0) -> None:
        super().__init__()
        check(self, "delta", delta, delta > 0, "a number above 0")
        self.delta = delta

    def compute(self, samples: Samples) -> Tensor:
        return ap_loss(samples.logits, positive_scores(samples), self.delta)
