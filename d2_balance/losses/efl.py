"""EFL: equalized focal loss, with a focusing exponent of its own for each class.

    g_j = clamp(G+_j / G-_j, 0, 1),   gamma_j = gamma_b + s (1 - g_j)
    EFL = -alpha_t (gamma_j / gamma_b) (1 - p_t)^gamma_j log p_t

G+ and G- add up |dL/dz| of positives and negatives over batches and ranks, in closed form: with
w = alpha_t gamma_j / gamma_b,

    |dL/dz| = w (1 - p_t)^gamma_j |gamma_j p_t log p_t - (1 - p_t)|

Source: Li et al., Equalized Focal Loss for Dense Long-Tailed Object Detection, arXiv:2201.02593,
equations 4 to 7. The mean is over positives; each batch enters G divided by its positives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_pass, gradient_sums, needs_grad, with_grad
from ._samples import Samples
from .focal import NegativeFocal


def equalized_focal_loss(
    logits: Tensor, onehot: Tensor, gamma: Tensor, alpha: float, base: float
) -> Tensor:
    """Focal loss with an exponent for each class.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        gamma: (K,), or as the logits: exponents, at least `base`.
        alpha: weight of positives in [0, 1], negatives get `1 - alpha`.
        base: gamma_b, above 0.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> gamma = torch.tensor([2.0, 2.0, 10.0])
        >>> equalized_focal_loss(logits, onehot, gamma, alpha=0.25, base=2.0)
        tensor([[4.5089e-04, 1.6994e-02, 2.5384e-03],
                [1.2997e-01, 2.8306e-01, 2.7571e-10]])
    """
    margin = logits * (2 * onehot - 1)
    ce = -F.logsigmoid(margin)  # -log p_t, stable where p_t rounds to 0
    weight = (onehot * (2 * alpha - 1) + (1 - alpha)) * (gamma / base)
    return weight * torch.exp(-gamma * (margin + ce)) * ce


Passed = tuple[Tensor, Tensor | None]  # losses and their gradients, see `entry_pass`


@CLS_LOSSES.register("EFL")
class EFLLoss(ClassificationLoss):
    """Equalized focal loss (arXiv:2201.02593) for dense sigmoid heads.

    Buffers, float64: `pos_grad` (K,), `neg_grad` (K,), summed across ranks and batches, and their
    ratio `ratio` (K,). A batch is weighted with the ratio of the batches before it.

    Args:
        num_classes: K.
        gamma: gamma_b, exponent of balanced classes, above 0.
        alpha: weight of positives in [0, 1], negatives get `1 - alpha`.
        scale: s, how much the exponent of starved classes grows, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> EFLLoss(num_classes=3)(logits, labels)
        tensor([[0.0005, 0.0170, 0.1300],
                [0.1300, 0.2831, 0.0014]])
    """

    elementwise = True
    activation = "sigmoid"
    weighs_difficulty = True
    update_after = True

    pos_grad: Tensor
    neg_grad: Tensor
    ratio: Tensor

    def __init__(
        self, *, num_classes: int, gamma: float = 2.0, alpha: float = 0.25, scale: float = 8.0
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "gamma", gamma, gamma > 0, "a number above 0")
        check(self, "alpha", alpha, 0 <= alpha <= 1, "a number in [0, 1]")
        check(self, "scale", scale, scale >= 0, "a number of at least 0")
        self.gamma, self.alpha, self.scale = gamma, alpha, scale
        self.num_classes = num_classes
        self.register_buffer("pos_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("neg_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("ratio", torch.ones(num_classes, dtype=torch.float64))

    def class_gamma(self) -> Tensor:
        """(K,) exponents gamma_j."""
        return self.gamma + self.scale * (1 - self.ratio)

    def _pass(self, samples: Samples, grad: bool = True) -> Passed:
        """Losses and derivatives, (R, K) each, with the exponents of the present state."""
        gamma = self.class_gamma().to(samples.logits.dtype)
        return entry_pass(
            samples.logits.detach(),
            samples.column,
            NegativeFocal((1 - self.alpha) * gamma / self.gamma, gamma),
            lambda own: equalized_focal_loss(
                own, samples.hit, gamma[samples.column], self.alpha, self.gamma
            ),
            grad,
        )

    @torch.no_grad()
    def batch_statistics(self, samples: Samples) -> tuple[Tensor, Passed]:
        """(3, K) gradients of positives, of negatives and the positives; losses and gradients."""
        value, grad = self._pass(samples)
        assert grad is not None
        count = samples.foreground.sum().expand(grad.shape[1])
        return torch.stack([*gradient_sums(grad, samples.column), count.double()]), (value, grad)

    def update(self, total: Tensor) -> None:
        count = total[2].clamp(min=1)
        self.pos_grad += total[0] / count
        self.neg_grad += total[1] / count
        ratio = self.pos_grad / self.neg_grad.clamp(min=1e-10)
        self.ratio.copy_(torch.where(self.neg_grad > 0, ratio, 1.0).clamp(0, 1))

    def compute(self, samples: Samples) -> Tensor:
        return with_grad(samples.logits, *self._pass(samples, needs_grad(samples.logits)))

    def compute_from(self, intermediate: Passed, samples: Samples) -> Tensor:
        return with_grad(samples.logits, *intermediate)

    def log_values(self) -> dict[str, Tensor]:
        return {"gamma": self.class_gamma()}
