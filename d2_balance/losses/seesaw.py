"""Seesaw loss: rare classes are pushed down less, and more only where they are mistaken.

For a foreground sample of class i and j != i:

    S_ij = M_ij C_ij,  M_ij = (N_j / N_i)^p if N_j < N_i else 1     (mitigation, counts so far)
                       C_ij = (s_j / s_i)^q if s_j > s_i else 1     (compensation, scores)
    L_cls = -log( e^{z_i} / (e^{z_i} + sum_{j != i} S_ij e^{z_j}) )

plus a two-way objectness cross-entropy on all samples; the score is p_object * softmax_j.

Dense heads have separate sigmoids. There S_ij scales the odds of the class in the same way:

    L = -log p_i - sum_{j != i} log(1 - p_ij),  p_ij = S_ij e^{z_j} / (1 + S_ij e^{z_j})

with the weights of focal loss, and s_j = sigmoid(z_j) in C_ij. Background samples have focal loss.
This form is ours.

Source: Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, arXiv:2008.10032,
equations 4 to 8. Both parts are means over all samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_pass, needs_grad, with_grad
from ._kernels.softmax import softmax_losses
from ._samples import Samples
from .focal import NegativeFocal, focal_loss


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
    return logits + log_factors(F.log_softmax(logits.detach(), dim=1), labels, counts, p, q, eps)


def log_factors(
    log_score: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float
) -> Tensor:
    """(R, K) log S_ij from (R, K) log scores; other arguments as `seesaw_ce_loss`."""
    own = labels.unsqueeze(1)  # (R, 1)
    log_count = counts.clamp(min=1).log().to(log_score.dtype)
    fewer = (log_count - log_count[own]).clamp(max=0)  # (R, K)
    higher = (log_score - log_score.gather(1, own).clamp(min=math.log(eps))).clamp(min=0)
    return (p * fewer + q * higher).scatter(1, own, 0.0)  # S_ii = 1


def seesaw_focal_loss(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 0.01,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss whose odds are scaled by the seesaw factors, of every class of every sample.

    Args:
        logits: (R, K).
        labels: (R,) int64 in [0, K]; K is background.
        counts: (K,) objects of each class seen so far.
        p: exponent of the mitigation, at least 0.
        q: exponent of the compensation, at least 0.
        eps: least score of the own class, above 0.
        alpha: as `focal_loss`.
        gamma: as `focal_loss`.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels, counts = torch.tensor([0, 3]), torch.tensor([90, 9, 1])
        >>> seesaw_focal_loss(logits, labels, counts, alpha=-1, gamma=0.0)
        tensor([[0.1269, 0.0567, 0.0270],
                [0.6931, 0.9741, 0.1269]])
    """
    foreground = (labels < logits.shape[1]).unsqueeze(1)
    own = labels.clamp(max=logits.shape[1] - 1)
    factors = log_factors(F.logsigmoid(logits.detach()), own, counts, p, q, eps)
    onehot = torch.zeros_like(logits).scatter_(1, own.unsqueeze(1), foreground.to(logits.dtype))
    return focal_loss(logits + factors * foreground, onehot, alpha, gamma)


class _SeesawLoss(ClassificationLoss):
    """State of both forms."""

    elementwise = True

    counts: Tensor

    def __init__(self, num_classes: int, p: float, q: float, eps: float) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "p", p, p >= 0, "a number of at least 0")
        check(self, "q", q, q >= 0, "a number of at least 0")
        check(self, "eps", eps, 0 < eps < 1, "a number in (0, 1)")
        self.p, self.q, self.eps = p, q, eps
        self.num_classes = num_classes
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.float64))

    def batch_statistics(self, samples: Samples) -> tuple[Tensor, None]:
        return samples.class_counts, None

    def update(self, total: Tensor) -> None:
        self.counts += total

    def log_values(self) -> dict[str, Tensor]:
        return {"counts": self.counts}


@CLS_LOSSES.register("Seesaw")
class SeesawLoss(_SeesawLoss):
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

    activation = "softmax"

    def __init__(
        self, *, num_classes: int, p: float = 0.8, q: float = 2.0, eps: float = 0.01
    ) -> None:
        super().__init__(num_classes, p, q, eps)

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 2

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


@CLS_LOSSES.register("SeesawFocal")
class SeesawFocalLoss(_SeesawLoss):
    """Seesaw loss (arXiv:2008.10032) for sigmoid heads, on top of focal loss.

    Buffer `counts` (K,) float64 as `SeesawLoss`; in a dense head positives are anchors.

    Args:
        num_classes: K.
        p: exponent of the mitigation factor, at least 0.
        q: exponent of the compensation factor, at least 0.
        eps: least score of the own class in the compensation, in (0, 1).
        alpha: weight of positives in [0, 1], negatives get `1 - alpha`; -1: no weights.
        gamma: focusing exponent, at least 0; 0 gives the cross-entropy.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> SeesawFocalLoss(num_classes=3)(logits, labels)  # one object so far: focal loss
        tensor([[0.0005, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """

    activation = "sigmoid"
    weighs_difficulty = True

    def __init__(
        self,
        *,
        num_classes: int,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 0.01,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(num_classes, p, q, eps)
        check(self, "alpha", alpha, alpha == -1 or 0 <= alpha <= 1, "a number in [0, 1], or -1")
        check(self, "gamma", gamma, gamma >= 0, "a number of at least 0")
        self.alpha, self.gamma = alpha, gamma

    def compute(self, samples: Samples) -> Tensor:
        logits, pos = samples.logits.detach(), samples.pos
        wanted = needs_grad(samples.logits)
        negative = NegativeFocal(1.0 if self.alpha < 0 else 1 - self.alpha, self.gamma)

        def passed(logits: Tensor, column: Tensor, hit: Tensor) -> tuple[Tensor, Tensor | None]:
            def own(own: Tensor) -> Tensor:
                return focal_loss(own, hit, self.alpha, self.gamma)

            return entry_pass(logits, column, negative, own, wanted)

        value, grad = passed(logits, samples.column, samples.hit)
        # the positives, which are few, once more with their factors
        labels, logits = samples.labels[pos], logits[pos]
        logits = logits + log_factors(
            F.logsigmoid(logits), labels, self.counts, self.p, self.q, self.eps
        )
        own_value, own_grad = passed(logits, labels.unsqueeze(1), samples.hit[pos])
        value.index_copy_(0, pos, own_value)
        if grad is not None and own_grad is not None:
            grad.index_copy_(0, pos, own_grad)
        return with_grad(samples.logits, value, grad)
