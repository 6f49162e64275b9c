"""ECM: effective class-margin loss, a margin for each class from its number of images.

    a_j = (N - n_j) / n_j,    N = sum of all n_j with background,   n_background = rho sum_j n_j
    L   = (1/R) sum_i sum_j omega_j BCE(2 z_ij - log(a_j) / 4, y_ij),  omega_j = a_j log(1 + 1/a_j)

Column K is background, a task of its own whose target is 1 for background. This is the released
form e^+ / (e^+ + e^-), e^+ = e^z (1 + a^-1/4), e^- = e^-z (1 + a^1/4), written as a sigmoid. At
test time the score is sigmoid(z_j) (1 - sigmoid(z_background)), without factor and margin.

Source: Cho and Krähenbühl, Long-tail Detection with Effective Class-Margins, ECCV 2022, and its
released code. Mean over samples. A class without training images counts as one image, where the
release has no number; the weights are computed in float64, because those of rare classes are wrong
by up to 5 % in the release's float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses, softplus
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss
from .eqlv2 import objectness_probabilities


def class_odds(class_count: Tensor, fg_bg_ratio: float) -> Tensor:
    """Odds against each class.

    Args:
        class_count: (K,) training images of each class; 0 counts as 1.
        fg_bg_ratio: rho, background samples per foreground sample, above 0.

    Returns:
        (K + 1,) float64 a_j, above 0; the last is background.
    """
    count = class_count.double().clamp(min=1)
    count = torch.cat([count, fg_bg_ratio * count.sum(dim=0, keepdim=True)])
    return (count.sum() - count) / count


def ecm_loss(logits: Tensor, target: Tensor, odds: Tensor) -> Tensor:
    """Effective class-margin loss of every column of every sample.

    Args:
        logits: (R, C).
        target: (R, C) in {0, 1}.
        odds: (C,), or as the logits: odds against each class, above 0.

    Returns:
        (R, C).

    Example:
        >>> odds = class_odds(torch.tensor([90, 9, 1]), fg_bg_ratio=6.0)
        >>> ecm_loss(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 1.0, 0.0]]), odds)
        tensor([[0.4499, 0.2892, 1.8138, 0.3055]])
    """
    margin, weight = margin_and_weight(odds)
    loss = sigmoid_ce_loss(2 * logits - margin.to(logits.dtype), target)
    return loss * weight.to(logits.dtype)


def margin_and_weight(odds: Tensor) -> tuple[Tensor, Tensor]:
    """log(a) / 4, and omega = a log(1 + 1/a), of the shape and the type of the odds a."""
    return odds.log() / 4, odds * odds.reciprocal().log1p()


class _NegativeECM:
    """Margin cross-entropy of negatives for `entry_losses`, with (C,) margins and weights."""

    def __init__(self, margin: Tensor, weight: Tensor) -> None:
        self.margin, self.weight = margin, weight

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        shifted = torch.sub(logits * 2, self.margin)
        softplus(shifted, out=value).mul_(self.weight)
        if grad is not None:
            torch.sigmoid(shifted, out=grad).mul_(2 * self.weight)


@CLS_LOSSES.register("ECM")
class ECMLoss(ClassificationLoss):
    """Effective class-margin loss (ECCV 2022) for sigmoid RoI heads.

    Margins set the start of the scores: leave the bias of the classifier at 0 with
    MODEL.BALANCE.PRIOR_PROB 0.5. The authors warm up for 10,000 iterations and use a cosine
    classifier.

    Args:
        class_count: (K,) training images of each class; 0 counts as 1.
        fg_bg_ratio: rho, background samples per foreground sample, above 0 (the authors counted
            6.3313 in the RoI heads of LVIS v1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> loss = ECMLoss(class_count=[90, 9, 1], fg_bg_ratio=6.0)
        >>> loss(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[0.4499, 0.2892, 1.8138, 0.3055]])
    """

    elementwise = True
    activation = "sigmoid"

    odds: Tensor

    def __init__(
        self, *, class_count: Tensor | Sequence[float], fg_bg_ratio: float = 6.3313
    ) -> None:
        super().__init__()
        count = torch.as_tensor(class_count, dtype=torch.float64)
        check(self, "class_count", class_count, bool((count >= 0).all()), "K counts of at least 0")
        check(self, "fg_bg_ratio", fg_bg_ratio, fg_bg_ratio > 0, "a number above 0")
        self.num_classes = len(count)
        self.register_buffer("odds", class_odds(count, fg_bg_ratio))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1

    def compute(self, samples: Samples) -> Tensor:
        margin, weight = (x.to(samples.logits.dtype) for x in margin_and_weight(self.odds))
        label = samples.labels.unsqueeze(1)  # every sample has a positive: background is column K
        return entry_losses(
            samples.logits,
            label,
            _NegativeECM(margin, weight),
            lambda own: ecm_loss(own, torch.ones_like(own), self.odds[label]),
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        return objectness_probabilities(logits)

    def log_values(self) -> dict[str, Tensor]:
        margin, weight = margin_and_weight(self.odds)
        return {"margin": margin, "weight": weight}
