"""SEQL: the softmax form of the equalization loss.

    L = -log( e^{z_y} / sum_k w_k e^{z_k} ),   w_k = 1 - B T(f_k) (1 - y_k),  B ~ Bernoulli(gamma)

B is sampled for every sample and tail class, so that a fraction 1 - gamma of the suppressing
gradients stays. Background stays in the sum, and a background sample keeps all classes.

Source: Tan et al., Equalization Loss for Long-Tailed Object Recognition, arXiv:2003.05176,
equations 8 to 10. Mean over samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.softmax import softmax_losses
from ._samples import Samples
from .eql import Threshold, checked_frequency, tail_weight


def softmax_eql_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Softmax cross-entropy whose denominator is weighted.

    Args:
        logits: (R, C).
        labels: (R,) int64 in [0, C).
        weight: (R, C) in [0, 1], 1 at the label.

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> softmax_eql_loss(logits, torch.tensor([0, 1]), weight)
        tensor([0.0486, 0.5239])
    """
    # a logit of z + log w stands for w e^z. log 0 = -inf takes the class out of the sum, however
    # large z is; a small weight instead of 0 would not, and the label keeps weight 1
    return F.cross_entropy(logits + weight.log(), labels, reduction="none")


@CLS_LOSSES.register("SoftmaxEQL")
class SoftmaxEQLLoss(ClassificationLoss):
    """Softmax equalization loss (arXiv:2003.05176) for softmax heads and plain classification.

    Args:
        class_frequency: (K,) fraction of training images that contain the class, in [0, 1].
        lambda_: classes below this frequency are tail classes (step threshold), in [0, 1].
        gamma: probability that a suppressing gradient is dropped, in [0, 1].
        threshold: "step", "exponential" or "gompertz".

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> SoftmaxEQLLoss(class_frequency=[0.5, 0.1, 0.0001], gamma=1.0)(logits, labels)
        tensor([0.0486, 0.4741])
    """

    elementwise = True
    activation = "softmax"
    all_reduced = False

    class_frequency: Tensor

    def __init__(
        self,
        *,
        class_frequency: Tensor | Sequence[float],
        lambda_: float = 0.00177,
        gamma: float = 0.95,
        threshold: Threshold = "step",
    ) -> None:
        super().__init__()
        frequency = checked_frequency(self, class_frequency, lambda_, threshold)
        check(self, "gamma", gamma, 0 <= gamma <= 1, "a number in [0, 1]")
        self.lambda_, self.gamma, self.threshold = lambda_, gamma, threshold
        self.num_classes = len(frequency)
        self.register_buffer("class_frequency", frequency)

    def compute(self, samples: Samples) -> Tensor:
        logits, pos = samples.logits, samples.pos
        tail = tail_weight(self.class_frequency, self.lambda_, self.threshold).to(logits.dtype)
        log_weight = F.pad((-tail).log1p(), (0, logits.shape[1] - len(tail)))  # (C,)
        dropped = torch.zeros_like(logits, dtype=torch.bool)  # (R, C)
        sampled = torch.rand(len(pos), len(tail), device=logits.device) < self.gamma
        dropped[pos, : len(tail)] = sampled.scatter_(1, samples.column[pos], False)

        def weighted(logits: Tensor, chunk: slice) -> Tensor:
            return torch.where(dropped[chunk], logits + log_weight, logits)

        return softmax_losses(logits, samples.labels, weighted)
