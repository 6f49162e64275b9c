"""Seesaw loss: rare classes are pushed down less, and more only where they are mistaken.

For a foreground sample of class i and j != i:

    S_ij = M_ij C_ij,  M_ij = (N_j / N_i)^p if N_j < N_i else 1     (mitigation, counts so far)
                       C_ij = (s_j / s_i)^q if s_j > s_i else 1     (compensation, scores)
    L_cls = -log( e^{z_i} / (e^{z_i} + sum_{j != i} S_ij e^{z_j}) )

plus a two-way objectness cross-entropy on all samples; the score is p_object * softmax_j.

Source: Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, arXiv:2008.10032,
equations 4 to 8. Both parts are means over all samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.softmax import softmax_losses
from ._samples import Samples


def seesaw_ce_loss(
    logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float
) -> Tensor:
    """Class part of the seesaw loss.

    Args:
        logits: (R, K).
        labels: (R,) int64 in [0, K); samples of other labels must be masked by the caller.
        counts: (K,) objects of each class seen so far.
        p: exponent of the mitigation, at least 0.
        q: exponent of the compensation, at least 0.
        eps: least score of the own class, above 0.

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> seesaw_ce_loss(logits, torch.tensor([0, 1]), torch.tensor([90, 9, 1]), 0.8, 2.0, 0.01)
        tensor([0.0115, 0.4828])
    """
    balanced = seesaw_logits(logits, labels, counts, p, q, eps)
    return F.cross_entropy(balanced, labels, reduction="none")


def seesaw_logits(
    logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float
) -> Tensor:
    """(R, K) z_j + log S_ij, whose softmax is that of the loss; arguments as `seesaw_ce_loss`."""
    own = labels.unsqueeze(1)  # (R, 1)
    log_count = counts.clamp(min=1).log().to(logits.dtype)
    fewer = (log_count - log_count[own]).clamp(max=0)  # (R, K)
    score = F.log_softmax(logits.detach(), dim=1)
    higher = (score - score.gather(1, own).clamp(min=math.log(eps))).clamp(min=0)
    return logits + (p * fewer + q * higher).scatter(1, own, 0.0)  # S_ii = 1


@CLS_LOSSES.register("Seesaw")
class SeesawLoss(ClassificationLoss):
    """Seesaw loss (arXiv:2008.10032) for RoI heads; K class outputs and two of objectness.

    Buffer `counts` (K,) float64: positives of each class so far, summed across ranks; a batch is
    counted before its loss.

    Args:
        num_classes: K.
        p: exponent of the mitigation factor, at least 0.
        q: exponent of the compensation factor, at least 0.
        eps: least score of the own class in the compensation, in (0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> SeesawLoss(num_classes=3)(logits, labels)
        tensor([0.1698, 0.5239])
    """

    elementwise = True
    activation = "softmax"

    counts: Tensor

    def __init__(
        self, *, num_classes: int, p: float = 0.8, q: float = 2.0, eps: float = 0.01
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "p", p, p >= 0, "a number of at least 0")
        check(self, "q", q, q >= 0, "a number of at least 0")
        check(self, "eps", eps, 0 < eps < 1, "a number in (0, 1)")
        self.p, self.q, self.eps = p, q, eps
        self.num_classes = num_classes
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.float64))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 2

    def batch_statistics(self, samples: Samples) -> tuple[Tensor, None]:
        return samples.class_counts, None

    def update(self, total: Tensor) -> None:
        self.counts += total

    def compute(self, samples: Samples) -> Tensor:
        fg, num_classes = samples.foreground, samples.num_classes
        classes, objectness = samples.logits[:, :num_classes], samples.logits[:, num_classes:]
        labels = samples.labels.clamp(max=num_classes - 1)

        def balanced(logits: Tensor, chunk: slice) -> Tensor:
            return seesaw_logits(logits, labels[chunk], self.counts, self.p, self.q, self.eps)

        # a mask would hide the NaN of a background sample, but not its gradient
        loss = softmax_losses(classes, labels, balanced) * fg
        if not objectness.shape[1]:  # plain classification
            return loss
        return loss + F.cross_entropy(objectness, (~fg).long(), reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        objectness = logits[:, -2:].softmax(dim=1)  # (R, 2), object and background
        return torch.cat([logits[:, :-2].softmax(dim=1) * objectness[:, :1], objectness[:, 1:]], 1)

    def log_values(self) -> dict[str, Tensor]:
        return {"counts": self.counts}
