"""Softmax with class priors: balanced softmax and logit adjustment.

    train   L = -log softmax(z + log pi)_label       (logit adjustment: z + tau log pi)
    test    softmax(z)

pi of background is 1, which leaves its logit alone; logits with K columns have no
background. Balanced softmax takes for pi the number of training images of a class over that of the
most frequent class, which competes with background as it does in plain softmax; logit adjustment
takes the fraction of all objects that are of a class.

Sources: Ren et al., Balanced Meta-Softmax, arXiv:2007.10740, equation 4; Menon et al., Long-Tail
Learning via Logit Adjustment, arXiv:2007.07314, equation 10. Mean over samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._samples import Samples


def adjusted_ce_loss(logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """Softmax cross-entropy with log priors added to the class logits.

    Args:
        logits: (R, K + 1), the last column background, or (R, K).
        labels: (R,) int64.
        log_prior: (K,).

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> adjusted_ce_loss(logits, torch.tensor([0, 1]), torch.tensor([0.9, 0.09, 0.01]).log())
        tensor([0.0065, 1.9565])
    """
    shift = F.pad(log_prior.to(logits.dtype), (0, logits.shape[1] - len(log_prior)))
    return F.cross_entropy(logits + shift, labels, reduction="none")


@CLS_LOSSES.register("BalancedSoftmax")
class BalancedSoftmaxLoss(ClassificationLoss):
    """Balanced softmax (arXiv:2007.10740) for softmax heads; inference is unchanged.

    Args:
        class_count: (K,) training images of each class; 0 counts as 1.

    Raises:
        ValueError: a count is negative.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> BalancedSoftmaxLoss(class_count=[90, 9, 1])(logits, labels)
        tensor([0.0065, 1.9565])
    """

    elementwise = True
    activation = "softmax"

    class_count: Tensor

    def __init__(self, *, class_count: Tensor | Sequence[float]) -> None:
        super().__init__()
        count = torch.as_tensor(class_count, dtype=torch.float64)
        check(self, "class_count", class_count, bool((count >= 0).all()), "K counts of at least 0")
        self.num_classes = len(count)
        self.register_buffer("class_count", count)

    def compute(self, samples: Samples) -> Tensor:
        count = self.class_count.clamp(min=1)
        return adjusted_ce_loss(samples.logits, samples.labels, (count / count.max()).log())


@CLS_LOSSES.register("LogitAdjusted")
class LogitAdjustedLoss(ClassificationLoss):
    """Logit adjustment (arXiv:2007.07314) for softmax heads; inference is unchanged.

    Args:
        instance_count: (K,) training objects of each class; 0 counts as 1.
        tau: strength of the adjustment, at least 0; 0 is the plain cross-entropy.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> LogitAdjustedLoss(instance_count=[90, 9, 1])(logits, labels)
        tensor([0.0065, 1.9565])
    """

    elementwise = True
    activation = "softmax"

    instance_count: Tensor

    def __init__(self, *, instance_count: Tensor | Sequence[float], tau: float = 1.0) -> None:
        super().__init__()
        count = torch.as_tensor(instance_count, dtype=torch.float64)
        rule = "K counts of at least 0"
        check(self, "instance_count", instance_count, bool((count >= 0).all()), rule)
        check(self, "tau", tau, tau >= 0, "a number of at least 0")
        self.tau, self.num_classes = tau, len(count)
        self.register_buffer("instance_count", count)

    def compute(self, samples: Samples) -> Tensor:
        count = self.instance_count.clamp(min=1)
        prior = self.tau * (count / count.sum()).log()
        return adjusted_ce_loss(samples.logits, samples.labels, prior)
