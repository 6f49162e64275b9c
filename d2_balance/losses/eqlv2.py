"""EQLv2: equalization loss driven by the gradients each class has received.

    g_j = G+_j / G-_j,    f(x) = 1 / (1 + exp(-gamma (x - mu)))
    w   = 1 + alpha (1 - f(g_j)) for positives of class j,   f(g_j) for negatives
    L   = (1/R) sum_i sum_j w_ij BCE(z_ij, y_ij)

G+ and G- add up the weighted gradients |p - 1| and p of all batches and ranks. Column K is an
objectness task of weight 1 whose target is 1 for background; at test time p_j is multiplied by
1 - p_background.

The softmax form, which is ours, weights the terms of the sum as the softmax form of EQL does:

    L = -(1/R) sum_i w+_y log( e^{z_y} / (e^{z_y} + sum_{j != y} w-_j e^{z_j}) )

with the same weights, and 1 for background. G+ and G- add up the gradients of this loss.

Source: Tan et al., Equalization Loss v2, arXiv:2012.08548, equations 5 to 9. Mean over samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, Activation, ClassificationLoss, check
from ._kernels.entries import entry_pass, gradient_sums, needs_grad, with_grad
from ._kernels.softmax import softmax_pass
from ._samples import Samples
from .cross_entropy import NegativeCE, sigmoid_ce_loss

BALANCED = 100.0  # ratio g before the first batch: all weights are 1

Passed = tuple[Tensor, Tensor | None]  # losses and their gradients, see `entry_pass`


def eqlv2_loss(
    logits: Tensor, target: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Equalization loss v2 of every column of every sample, for given weights.

    Args:
        logits: (R, C).
        target: (R, C) in {0, 1}.
        positive_weight: (C,), or as the logits: weight of entries with target 1.
        negative_weight: likewise for target 0.

    Returns:
        (R, C).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> eqlv2_loss(logits, onehot, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.5, 0.0]))
        tensor([[0.1269, 0.1566, 0.0000],
                [0.6931, 0.4870, 0.0000]])
    """
    weight = torch.where(target > 0, positive_weight, negative_weight)
    return sigmoid_ce_loss(logits, target) * weight


def softmax_eqlv2_loss(
    logits: Tensor, labels: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Equalization loss v2 of a softmax, for given weights.

    Args:
        logits: (R, C).
        labels: (R,) int64 in [0, C).
        positive_weight: (C,) weight of a sample of the class.
        negative_weight: (C,) weight of the class in the sums of other samples, above 0.

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> weights = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.5, 0.01])
        >>> softmax_eqlv2_loss(logits, torch.tensor([0, 1]), *weights)
        tensor([0.0259, 0.9492])
    """
    shift = negative_weight.log().expand_as(logits).scatter(1, labels.unsqueeze(1), 0.0)
    return F.cross_entropy(logits + shift, labels, reduction="none") * positive_weight[labels]


def objectness_probabilities(logits: Tensor) -> Tensor:
    """(R, K + 1) probabilities of sigmoid logits whose last column is background."""
    prob = logits.sigmoid()
    return torch.cat([prob[:, :-1] * (1 - prob[:, -1:]), prob[:, -1:]], dim=1)


@CLS_LOSSES.register("EQLv2")
class EQLv2Loss(ClassificationLoss):
    """Equalization loss v2 (arXiv:2012.08548) for sigmoid RoI heads.

    Buffers, float64: `pos_grad` (K,), `neg_grad` (K,), summed across ranks and batches, and their
    ratio `pos_neg` (K,). A batch is weighted with the ratio of the batches before it.

    Args:
        num_classes: K.
        gamma: steepness of the map f.
        mu: where f is one half.
        alpha: how much positives of starved classes gain, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])  # 3 classes and background
        >>> EQLv2Loss(num_classes=3)(logits, labels)
        tensor([[0.6931, 0.6931, 0.6931, 0.6931],
                [0.6931, 0.6931, 0.6931, 0.6931]])
    """

    elementwise = True
    activation: Activation = "sigmoid"
    update_after = True

    pos_grad: Tensor
    neg_grad: Tensor
    pos_neg: Tensor

    def __init__(
        self, *, num_classes: int, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "gamma", gamma, gamma > 0, "a number above 0")
        check(self, "alpha", alpha, alpha >= 0, "a number of at least 0")
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        self.num_classes = num_classes
        self.register_buffer("pos_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("neg_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("pos_neg", torch.full((num_classes,), BALANCED, dtype=torch.float64))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1

    def class_weights(self) -> tuple[Tensor, Tensor]:
        """(K,) weights of positives and of negatives."""
        mapped = torch.sigmoid(self.gamma * (self.pos_neg - self.mu))
        return 1 + self.alpha * (1 - mapped), mapped

    def _pass(self, samples: Samples, grad: bool = True) -> Passed:
        """Losses and derivatives, (R, K + 1) each, with the weights of the present state."""
        positive, negative = (
            F.pad(w.to(samples.logits.dtype), (0, 1), value=1.0) for w in self.class_weights()
        )
        label = samples.labels.unsqueeze(1)  # every sample has a positive: background is column K
        return entry_pass(
            samples.logits.detach(),
            label,
            NegativeCE(negative),
            lambda own: eqlv2_loss(own, torch.ones_like(own), positive[label], negative[label]),
            grad,
        )

    @torch.no_grad()
    def batch_statistics(self, samples: Samples) -> tuple[Tensor, Passed]:
        """(2, K) gradients of positives and of negatives; losses and gradients (R, K + 1)."""
        value, grad = self._pass(samples)
        assert grad is not None
        sums = gradient_sums(grad, samples.labels.unsqueeze(1))
        return torch.stack([total[:-1] for total in sums]), (value, grad)

    def update(self, total: Tensor) -> None:
        self.pos_grad += total[0]
        self.neg_grad += total[1]
        self.pos_neg.copy_(self.pos_grad / (self.neg_grad + 1e-10))

    def compute(self, samples: Samples) -> Tensor:
        return with_grad(samples.logits, *self._pass(samples, needs_grad(samples.logits)))

    def compute_from(self, intermediate: Passed, samples: Samples) -> Tensor:
        return with_grad(samples.logits, *intermediate)

    def probabilities(self, logits: Tensor) -> Tensor:
        return objectness_probabilities(logits)

    def log_values(self) -> dict[str, Tensor]:
        positive, negative = self.class_weights()
        return {"positive_weight": positive, "negative_weight": negative}


@CLS_LOSSES.register("SoftmaxEQLv2")
class SoftmaxEQLv2Loss(EQLv2Loss):
    """Softmax form of the equalization loss v2 (arXiv:2012.08548), also for plain classification.

    Buffers as `EQLv2Loss`.

    Args:
        num_classes: K.
        gamma: steepness of the map f.
        mu: where f is one half.
        alpha: how much positives of starved classes gain, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> SoftmaxEQLv2Loss(num_classes=3)(logits, torch.tensor([0, 1]))  # before the first batch
        tensor([0.1698, 0.5239])
    """

    activation = "softmax"
    num_outputs = ClassificationLoss.num_outputs
    probabilities = ClassificationLoss.probabilities

    def _pass(self, samples: Samples, grad: bool = True) -> Passed:
        """Losses (R, 1) and derivatives (R, C), with the weights of the present state."""
        logits, labels = samples.logits.detach(), samples.labels.unsqueeze(1)
        extra = logits.shape[1] - samples.num_classes
        positive, negative = (
            F.pad(w.to(logits.dtype), (0, extra), value=1.0) for w in self.class_weights()
        )
        shift = negative.log()

        def moved(logits: Tensor, chunk: slice) -> Tensor:
            return logits + shift.expand_as(logits).scatter(1, labels[chunk], 0.0)

        value, derivative = softmax_pass(logits, labels, moved)
        weight = positive[labels]
        return value.mul_(weight), derivative.mul_(weight) if grad else None

    @torch.no_grad()
    def batch_statistics(self, samples: Samples) -> tuple[Tensor, Passed]:
        """(2, K) gradients of positives and of negatives; losses (R, 1), gradients (R, C)."""
        value, grad = self._pass(samples)
        assert grad is not None
        sums = gradient_sums(grad, samples.labels.unsqueeze(1))
        return torch.stack([total[: samples.num_classes] for total in sums]), (value, grad)

    def compute(self, samples: Samples) -> Tensor:
        return super().compute(samples).sum(dim=1)

    def compute_from(self, intermediate: Passed, samples: Samples) -> Tensor:
        return super().compute_from(intermediate, samples).sum(dim=1)
