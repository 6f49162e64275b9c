"""Class weights: a fixed weight for each class, from its number of training objects or given.

    effective   w_j = (1 - beta) / (1 - beta^n_j)
    inverse     w_j = n_j^-power                     (power 1: inverse frequency, 1/2: its root)
    list        w_j as given

then divided by their mean, so that the weights of all classes sum to K. A class without a training
object has weight 1. Weights over the samples of a batch do not have mean 1: the loss changes its
scale, and the learning rate may have to follow.

Source of "effective": Cui et al., Class-Balanced Loss Based on Effective Number of Samples,
arXiv:1901.05555, equations 2 to 9. There the weight of a sample is that of its label, on all its
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from d2_balance.losses import Samples
from d2_balance.losses._base import check
from d2_balance.utils.distributed import sum_across_ranks

from .base import REWEIGHTERS, Reweighter

METHODS = ("effective", "inverse", "list")
DENOMINATORS = ("samples", "weights")
TARGETS = ("samples", "positives", "negatives", "both")


def effective_number_weights(count: Tensor, beta: float) -> Tensor:
    """Inverse effective numbers of objects, without normalisation.

    Args:
        count: (K,) training objects of each class, above 0.
        beta: in [0, 1); 0 weighs all classes equally, near 1 it is the inverse count.

    Returns:
        (K,) float64.

    Example:
        >>> effective_number_weights(torch.tensor([1.0, 100.0]), beta=0.99)
        tensor([1.0000, 0.0158], dtype=torch.float64)
    """
    log_beta = torch.tensor(beta, dtype=torch.float64).log()
    # 1 - beta^n by subtraction would lose its digits near beta = 1
    return (1 - beta) / -torch.expm1(count.double() * log_beta)


def normalised(weight: Tensor, seen: Tensor) -> Tensor:
    """(K,) weights divided by the mean of the classes that were `seen` (K,) bool; others 1."""
    mean = torch.where(seen, weight, 0.0).sum() / seen.sum().clamp(min=1)
    return torch.where(seen, weight / mean, 1.0)


@REWEIGHTERS.register()
class ClassWeights(Reweighter):
    """Fixed class weights of the classification loss (arXiv:1901.05555 and others).

    Buffer `weight` (K + 1,) float64, saved with the model; the last is background.

    Args:
        instance_count: (K,) training objects of each class.
        method: "effective" number of samples, "inverse" count to a power, or the "list" `values`.
        beta: of "effective", in [0, 1); the authors try 0.9, 0.99, 0.999 and 0.9999.
        power: of "inverse", at least 0.
        values: of "list", K numbers of at least 0, or K + 1 with that of background last.
        background_weight: weight of background samples, at least 0.
        normalize: whether weights are divided by their mean over classes.
        target: what is weighted: "samples", all columns of a sample by its label; or, without a
            softmax, the entries of each class: "positives", "negatives" or "both".
        denominator: "samples" leaves the denominator of the head; "weights" divides by the sum of
            the weights in its place, a weighted mean over the samples of all ranks (DisAlign), with
            target "samples".

    Raises:
        ValueError: an argument is out of range.
    """

    weight: Tensor

    def __init__(
        self,
        *,
        instance_count: Tensor | Sequence[float],
        method: Literal["effective", "inverse", "list"] = "effective",
        beta: float = 0.9999,
        power: float = 1.0,
        values: Sequence[float] = (),
        background_weight: float = 1.0,
        normalize: bool = True,
        target: Literal["samples", "positives", "negatives", "both"] = "samples",
        denominator: Literal["samples", "weights"] = "samples",
    ) -> None:
        super().__init__()
        count = torch.as_tensor(instance_count, dtype=torch.float64)
        rule = "K counts of at least 0"
        check(self, "instance_count", instance_count, bool((count >= 0).all()), rule)
        check(self, "method", method, method in METHODS, f"one of {', '.join(METHODS)}")
        check(self, "beta", beta, 0 <= beta < 1, "a number in [0, 1)")
        check(self, "power", power, power >= 0, "a number of at least 0")
        known = background_weight >= 0
        check(self, "background_weight", background_weight, known, "a number of at least 0")
        check(self, "target", target, target in TARGETS, f"one of {', '.join(TARGETS)}")
        rule = f"one of {', '.join(DENOMINATORS)}"
        check(self, "denominator", denominator, denominator in DENOMINATORS, rule)
        fits = denominator == "samples" or target == "samples"
        check(self, "denominator", denominator, fits, f"samples with target {target}")
        self.target, self.needs_entries = target, target != "samples"
        self.denominator = denominator
        seen = count > 0
        if method == "list":
            weight, background_weight = self._listed(values, len(count), background_weight)
            seen = torch.ones_like(seen)
        elif method == "effective":
            weight = effective_number_weights(count.clamp(min=1), beta)
        else:
            weight = count.clamp(min=1).pow(-power)
        weight = normalised(weight, seen) if normalize else torch.where(seen, weight, 1.0)
        self.register_buffer("weight", torch.cat([weight, weight.new_tensor([background_weight])]))

    def _listed(
        self, values: Sequence[float], num_classes: int, background_weight: float
    ) -> tuple[Tensor, float]:
        weight = torch.as_tensor(values, dtype=torch.float64)
        right = weight.dim() == 1 and len(weight) in (num_classes, num_classes + 1)
        right = right and bool(((weight >= 0) & weight.isfinite()).all())
        right = right and bool(weight[:num_classes].sum() > 0)
        rule = f"{num_classes} numbers of at least 0, not all 0, or one more for background"
        check(self, "values", values, right, rule)
        if len(weight) > num_classes:
            background_weight = float(weight[-1])
        return weight[:num_classes], background_weight

    def forward(self, samples: Samples, cls: Tensor, box: Tensor) -> tuple[Tensor, None]:
        weight = self.weight.to(cls.dtype)
        if self.target == "samples":
            own = weight[samples.labels]
            return (self._of_mean_one(own) if self.denominator == "weights" else own), None
        weight = weight[:-1].expand(len(samples.labels), -1)  # (R, K), without a copy
        if self.target == "both":
            return weight, None
        positive = samples.onehot > 0
        one = torch.ones_like(cls)
        chosen = positive if self.target == "positives" else ~positive
        return torch.where(chosen, weight, one), None

    def _of_mean_one(self, weight: Tensor) -> Tensor:
        """Weights (R,) divided by their mean over the samples of all ranks.

        Every rank must call this in training, an empty batch included.
        """
        parts = [weight.double().sum(), weight.new_full((), len(weight), dtype=torch.float64)]
        if self.training:
            total, count = sum_across_ranks(parts)
            assert total is not None and count is not None
        else:
            total, count = parts
        mean = torch.where(total > 0, total / count.clamp(min=1), 1.0)
        return weight / mean.to(weight.dtype)

    def log_values(self) -> dict[str, Tensor]:
        return {"weight": self.weight}
