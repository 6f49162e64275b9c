"""Contracts and registries of the losses.

A loss is a module with a keyword-only constructor whose defaults are the paper's. It holds no
reduction: an elementwise loss returns one value per entry, and the criterion sums and normalises;
a loss that ranks or normalises over a set returns a 0-d tensor that is used as it is.

State that depends on data (densities, counters) lives in buffers and changes only in training
mode. `batch_statistics` returns what the state needs from a batch, and `update` takes the sum
across ranks; the criterion sums the statistics of all parts with one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_balance.utils.distributed import sum_across_ranks
from d2_balance.utils.registry import Named, Registry

from ._samples import Samples, upcast

Activation = Literal["sigmoid", "softmax", "gumbel"]

CLS_LOSSES = Registry("CLS_LOSSES")
CLS_LOSSES.__doc__ = "Classification losses; the names are what MODEL.BALANCE.CLS_LOSS accepts."

BOX_LOSSES = Registry("BOX_LOSSES")
BOX_LOSSES.__doc__ = "Box regression losses; the names are what MODEL.BALANCE.BOX_LOSS accepts."


class _Loss(Named, nn.Module):
    """State and logging of classification and box losses."""

    elementwise: bool

    update_after: bool = False
    """True: `update` runs after the loss, which then sees the state of earlier batches."""

    all_reduced: bool = True
    """False: each rank works on its own samples (it ranks or samples them), and k ranks differ from
    one process on the joined batch; state is summed across ranks all the same."""

    compute: Callable[..., Tensor]

    def __init__(self) -> None:  # the signature that the config is made from: no arguments
        super().__init__()

    def batch_statistics(self, *inputs: Any) -> tuple[Tensor | None, Any]:
        """Compute what the state needs from a batch of this rank.

        Args:
            inputs: as for `compute`.

        Returns:
            Sums for `update`, to be added up across ranks, and intermediate results for
            `compute_from`; None each if there are none.
        """
        return None, None

    def update(self, total: Tensor) -> None:
        """Update the buffers from sums across all ranks (float64)."""

    def compute_from(self, intermediate: Any, *inputs: Any) -> Tensor:
        """Compute the loss from what `batch_statistics` returned for the same inputs."""
        return self.compute(*inputs)

    def log_values(self) -> dict[str, Tensor]:
        """Tensors worth logging; read by the hooks, never on the training path."""
        return {}

    def _forward(self, *inputs: Any) -> Tensor:
        if not self.training or torch.is_inference_mode_enabled():
            return self.compute(*inputs)
        sums, intermediate = self.batch_statistics(*inputs)
        (total,) = sum_across_ranks([sums])
        return self.step(total, intermediate, *inputs)

    def step(self, total: Tensor | None, intermediate: Any, *inputs: Any) -> Tensor:
        """Compute the loss and update the state.

        Args:
            total: sums across ranks; None: there is no state.
            intermediate: from `batch_statistics`, used up by this call.
            inputs: as for `compute`.
        """
        if total is not None and not self.update_after:
            self.update(total)
        if intermediate is None:
            loss = self.compute(*inputs)
        else:
            loss = self.compute_from(intermediate, *inputs)
        if total is not None and self.update_after:
            self.update(total)
        return loss


class ClassificationLoss(_Loss):
    """Base of all classification losses.

    Class attributes:
        elementwise: True if `forward` returns (R, C) or (R,), False if it returns a 0-d tensor.
        activation: how logits become probabilities, "sigmoid", "softmax" or "gumbel".
    """

    activation: Activation

    class_logits: bool = True
    """False: the first K columns are not the logits of the classes in one softmax or sigmoid."""

    weighs_difficulty: bool = False
    """True: easy samples count less already, so that mining hard ones would do it twice."""

    num_classes: int | None = None
    """K if the loss was made for so many classes."""

    couples_boxes: bool = False
    """True: `coupled_box_loss` takes the place of the criterion's sum over the box loss."""

    def coupled_box_loss(
        self, samples: Samples, cls: Tensor, box: Tensor, intermediate: Any = None
    ) -> Tensor:
        """Box loss of methods that rank classes and boxes together.

        Args:
            samples: see `Samples`.
            cls: 0-d value of this loss for the same batch.
            box: (P, 4) or (P,) elementwise box loss.
            intermediate: from `batch_statistics` for the same samples; None: computed again.

        Returns:
            0-d tensor, used as it is.
        """
        raise NotImplementedError

    def num_outputs(self, num_classes: int) -> int:
        """Columns of the logits for K classes; the last is background in a softmax."""
        return num_classes + (self.activation == "softmax")

    def column_counts(self, num_classes: int) -> tuple[int, ...]:
        """Numbers of columns that `forward` accepts for K classes.

        A softmax without background, as in plain classification, has K.
        """
        if self.activation == "softmax":
            return num_classes, self.num_outputs(num_classes)
        return (self.num_outputs(num_classes),)

    def forward(self, samples: Samples | Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch; in training mode the state is updated as well.

        Args:
            samples: see `Samples`, or (R, C) logits for plain classification. K is then what the
                loss was made for, or else C: each column is a class.
            labels: (R,) int64 with the logits, in [0, K); K is background, which is no class in a
                sigmoid, and the last of K + 1 columns in a softmax.

        Returns:
            (R, C) or (R,) if elementwise, else a 0-d tensor. Half precision is raised to float32.

        Raises:
            ValueError: the columns do not fit the loss, or a label is out of range.
        """
        if not isinstance(samples, Samples):
            samples = self._plain_samples(samples, labels)
        return self._forward(samples.upcast())

    def _plain_samples(self, logits: Tensor, labels: Tensor | None) -> Samples:
        if labels is None or logits.dim() != 2:
            raise ValueError(
                f"{self.name}: must be called with Samples, or with logits (R, C) and labels (R,)."
            )
        num_classes = logits.shape[1] if self.num_classes is None else self.num_classes
        allowed = self.column_counts(num_classes)
        if logits.shape[1] not in allowed:
            raise ValueError(
                f"{self.name}: logits of {num_classes} classes must have "
                f"{' or '.join(map(str, allowed))} columns, not {logits.shape[1]}."
            )
        return Samples(logits=logits, labels=labels, num_classes=num_classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities for inference.

        Args:
            logits: (R, C), C = `num_outputs(K)`.

        Returns:
            (R, K + 1), the last column background (zero for sigmoid losses; Detectron2's
            inference drops it).
        """
        if self.activation == "softmax":
            return F.softmax(logits, dim=-1)
        return F.pad(torch.sigmoid(logits), (0, 1))

    def logit(self, probability: float) -> float:
        """The logit of a class, outside of a softmax, whose score is `probability` in (0, 1)."""
        return -math.log((1 - probability) / probability)


class BoxLoss(_Loss):
    """Base of all box losses. The criterion gives it positives only.

    Class attributes:
        elementwise: True if `forward` returns (P, 4) or (P,), False if it returns a 0-d tensor.
        space: "deltas" if it compares regression targets, "boxes" for decoded x0 y0 x1 y1.
        unit_weights: True if deltas must not carry the box coder's weights, because the loss has
            a scale of its own.
    """

    space: Literal["deltas", "boxes"]
    unit_weights: bool = False

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of P positives; in training mode the state is updated as well.

        Args:
            pred: (P, 4) in the space of the loss. Half precision is raised to float32.
            target: (P, 4).

        Returns:
            (P, 4) or (P,) if elementwise, else a 0-d tensor.
        """
        pred = upcast(pred)
        return self._forward(pred, target.to(pred.dtype))


def check(owner: object, name: str, value: object, valid: bool, rule: str) -> None:
    """Raise ValueError unless `valid`, naming the class, the argument and what it must be."""
    if not valid:
        label = getattr(owner, "name", type(owner).__name__)
        raise ValueError(f"{label}: {name} is {value!r}; must be {rule}.")


def per_sample(loss: Tensor) -> Tensor:
    """(P,) sums over the coordinates of a (P, 4) or (P,) box loss."""
    return loss.sum(dim=1) if loss.dim() == 2 else loss
