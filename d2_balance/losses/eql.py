"""EQL: equalization loss.

    w_ij = 1 - E_i T(f_j) (1 - y_ij) (1 - verified_ij)      E_i = 1 for a foreground sample i
    L    = sum_j w_ij BCE(z_ij, y_ij),  mean over samples

A foreground sample of one class does not push down the logits of tail classes; background samples
do. Classes that annotators verified in the image (present or absent) keep weight 1.

    step         T(f) = 1 if f < lambda else 0
    exponential  T(f) = max(0, 1 - (a f)^n),               a = 400, n = 2
    gompertz     T(f) = 1 - a exp(-b exp(-c f)),           a = 1, b = 80, c = 3000

Source: Tan et al., Equalization Loss for Long-Tailed Object Recognition, arXiv:2003.05176,
equations 3 to 6; image-level labels: section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._base import CLS_LOSSES, Activation, ClassificationLoss, check
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss, weighted_ce

THRESHOLDS = ("step", "exponential", "gompertz")
Threshold = Literal["step", "exponential", "gompertz"]


def tail_weight(class_frequency: Tensor, lambda_: float, threshold: Threshold) -> Tensor:
    """T(f), how much a class belongs to the tail.

    Args:
        class_frequency: (K,) fraction of training images that contain the class, in [0, 1].
        lambda_: threshold of the step function; the smooth functions do not use it.
        threshold: "step", "exponential" or "gompertz".

    Returns:
        (K,) in [0, 1].
    """
    f = class_frequency
    if threshold == "step":
        return (f < lambda_).to(f.dtype)
    if threshold == "exponential":
        return 1 - (400 * f).square().clamp(max=1)
    return (1 - torch.exp(-80 * torch.exp(-3000 * f))).clamp(0, 1)


def tail_ratio(tail: Tensor, image_count: Tensor) -> Tensor:
    """TR = sum_j T_j N_j / sum_j N_j; 2 to 10 % is the useful range (section 4.3).

    Args:
        tail: (K,) in [0, 1].
        image_count: (K,) training images of each class.

    Returns:
        0-d tensor in [0, 1].
    """
    count = image_count.to(tail.dtype)
    return (tail * count).sum() / count.sum().clamp(min=1)


def eql_loss(
    logits: Tensor,
    onehot: Tensor,
    foreground: Tensor,
    tail: Tensor,
    verified: Tensor | None = None,
) -> Tensor:
    """Equalization loss of every class of every sample.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        foreground: (R,) bool.
        tail: (K,) T(f) in [0, 1].
        verified: (R, K) bool, classes verified in the sample's image; None: no rule.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> foreground, tail = torch.tensor([True, False]), torch.tensor([0.0, 0.0, 1.0])
        >>> eql_loss(logits, onehot, foreground, tail)
        tensor([[0.1269, 0.3133, 0.0000],
                [0.6931, 0.9741, 0.1269]])
    """
    free = onehot > 0 if verified is None else (onehot > 0) | verified
    suppressed = foreground.unsqueeze(1) & ~free
    return sigmoid_ce_loss(logits, onehot) * (1 - tail.to(logits.dtype) * suppressed)


def checked_frequency(
    owner: object, class_frequency: Tensor | Sequence[float], lambda_: float, threshold: str
) -> Tensor:
    """(K,) float64 class frequencies, after a check of what T(f) is made from.

    Raises:
        ValueError: an argument is out of range; names the owner's class and the argument.
    """
    frequency = torch.as_tensor(class_frequency, dtype=torch.float64)
    inside = frequency.dim() == 1 and bool(((frequency >= 0) & (frequency <= 1)).all())
    check(owner, "class_frequency", class_frequency, inside, "K numbers in [0, 1]")
    check(owner, "lambda_", lambda_, 0 <= lambda_ <= 1, "a number in [0, 1]")
    names = f"one of {', '.join(THRESHOLDS)}"
    check(owner, "threshold", threshold, threshold in THRESHOLDS, names)
    return frequency


def uses_image_labels(owner: object, value: bool | str) -> bool:
    """Return whether a loss looks at the image-level labels that a batch has.

    Args:
        owner: the loss, for the message.
        value: True or "always", False or "never", "auto".

    Raises:
        ValueError: another value.
    """
    allowed = value in ("auto", "always", "never", True, False)
    check(owner, "use_image_level_labels", value, allowed, '"auto", "always" or "never"')
    return value not in ("never", False)


@CLS_LOSSES.register("EQL")
class EQLLoss(ClassificationLoss):
    """Equalization loss (arXiv:2003.05176) for sigmoid heads, with LVIS image-level labels.

    Args:
        class_frequency: (K,) fraction of training images that contain the class, in [0, 1].
        lambda_: classes below this frequency are tail classes (step threshold), in [0, 1]. The
            authors use 0.00177 on LVIS v0.5 and 0.0011 on v1.
        threshold: "step", "exponential" or "gompertz".
        use_image_level_labels: "always" keeps weight 1 for classes verified in the image, "never"
            does not, "auto" does so if the data have such labels.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> EQLLoss(class_frequency=[0.5, 0.1, 0.0001])(logits, labels)
        tensor([[0.1269, 0.3133, 0.0000],
                [0.6931, 0.9741, 0.1269]])
    """

    elementwise = True
    activation: Activation = "sigmoid"

    class_frequency: Tensor

    def __init__(
        self,
        *,
        class_frequency: Tensor | Sequence[float],
        lambda_: float = 0.00177,
        threshold: Threshold = "step",
        use_image_level_labels: bool | str = "auto",
    ) -> None:
        super().__init__()
        frequency = checked_frequency(self, class_frequency, lambda_, threshold)
        self.lambda_, self.threshold = lambda_, threshold
        self.use_image_level_labels = uses_image_labels(self, use_image_level_labels)
        self.num_classes = len(frequency)
        self.register_buffer("class_frequency", frequency)

    @property
    def tail(self) -> Tensor:
        """(K,) T(f) of every class."""
        return tail_weight(self.class_frequency, self.lambda_, self.threshold)

    def compute(self, samples: Samples) -> Tensor:
        table, group = self._class_weights(samples)
        return weighted_ce(samples, lambda chunk: table.index_select(0, group[chunk]), 1.0)

    def _class_weights(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """(G, K) weights of negatives for G groups of samples, and (R,) the group of each.

        Group 0 is background; foreground samples are grouped by image.
        """
        kept = 1 - self.tail.to(samples.logits.dtype).unsqueeze(0)  # (1, K)
        group = samples.foreground.long()
        if self.use_image_level_labels and samples.verified is not None:
            kept = torch.where(samples.verified, torch.ones_like(kept), kept)  # (N, K)
            if samples.image_index is not None:
                group = group * (samples.image_index + 1)
        return torch.cat([torch.ones_like(kept[:1]), kept]), group
