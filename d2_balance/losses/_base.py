"""Contracts and registries of the losses.

A loss is a module with a keyword-only constructor whose defaults are the paper's. It holds no
reduction: an elementwise loss returns one value per entry, and the criterion sums and normalises;
a loss that ranks or normalises over a set returns a 0-d tensor that is used as it is.

State that depends on data (densities, counters) lives in buffers and changes only in training
mode. `batch_statistics` returns what the state needs from a batch, and `update` takes the sum
across ranks; the criterion sums the statistics of all parts with one all-reduce.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_balance.utils.distributed import sum_over_ranks
from d2_balance.utils.registry import Named, Registry

from ._samples import Samples

CLS_LOSSES = Registry("CLS_LOSSES")
CLS_LOSSES.__doc__ = "Classification losses; the names are what MODEL.BALANCE.CLS_LOSS accepts."

BOX_LOSSES = Registry("BOX_LOSSES")
BOX_LOSSES.__doc__ = "Box regression losses; the names are what MODEL.BALANCE.BOX_LOSS accepts."


class _Loss(nn.Module, Named):
    """What classification and box losses share: state and logging."""

    elementwise: bool

    update_after: bool = False
    """True: `update` runs after the loss, which then sees the state of earlier batches."""

    all_reduced: bool = True
    """False: each rank works on its own rows (it ranks or draws them), and k ranks differ from one
    process on the joined batch; state that is kept is summed across ranks all the same."""

    def __init__(self) -> None:  # the signature that the config is made from: no arguments
        super().__init__()

    def batch_statistics(self, *inputs) -> Tensor | None:
        """What `update` needs from this rank's batch, to be summed across ranks; None: nothing."""
        return None

    def update(self, total: Tensor) -> None:
        """Updates the buffers from statistics summed across all ranks (float64)."""

    def compute(self, *inputs) -> Tensor:
        """The loss for the present state."""
        raise NotImplementedError

    def log_values(self) -> dict[str, Tensor]:
        """Tensors worth logging; read by the hooks, never on the training path."""
        return {}

    def _step(self, *inputs) -> Tensor:
        if not self.training:
            return self.compute(*inputs)
        (total,) = sum_over_ranks([self.batch_statistics(*inputs)])
        return self.step(total, *inputs)

    def step(self, total: Tensor | None, *inputs) -> Tensor:
        """The loss, with the state brought up to date from statistics already summed."""
        if total is not None and not self.update_after:
            self.update(total)
        loss = self.compute(*inputs)
        if total is not None and self.update_after:
            self.update(total)
        return loss


class ClassificationLoss(_Loss):
    """Base of all classification losses.

    Class attributes:
        elementwise: True if `forward` returns (R, C) or (R,), False if it returns a 0-d tensor.
        activation: how logits become probabilities, "sigmoid" or "softmax".
    """

    activation: Literal["sigmoid", "softmax"]

    couples_boxes: bool = False
    """True: `coupled_box_loss` takes the place of the criterion's sum over the box loss."""

    def coupled_box_loss(self, samples: Samples, cls: Tensor, box: Tensor) -> Tensor:
        """Box loss of methods that rank classes and boxes together.

        Args:
            samples: see `Samples`.
            cls: 0-d value of this loss for the same batch.
            box: (P, 4) or (P,) elementwise box loss.

        Returns:
            0-d tensor, used as it is.
        """
        raise NotImplementedError

    def num_outputs(self, num_classes: int) -> int:
        """Columns of the logits for K classes; the last is background in a softmax."""
        return num_classes + (self.activation == "softmax")

    def forward(self, samples: Samples) -> Tensor:
        """The loss of a batch; in training mode the state is updated as well.

        Args:
            samples: see `Samples`. Half precision logits are raised to float32.

        Returns:
            (R, C) or (R,) if elementwise, else a 0-d tensor.
        """
        return self._step(samples.upcast())

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


class BoxLoss(_Loss):
    """Base of all box losses. The criterion hands it positives only.

    Class attributes:
        elementwise: True if `forward` returns (P, 4) or (P,), False if it returns a 0-d tensor.
        space: "deltas" if it compares regression targets, "boxes" for decoded x0 y0 x1 y1.
        unit_weights: True if deltas must not carry the box coder's weights, because the loss has
            a scale of its own.
    """

    space: Literal["deltas", "boxes"]
    unit_weights: bool = False

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss of P positives; in training mode the state is updated as well.

        Args:
            pred: (P, 4) in the space of the loss. Half precision is raised to float32.
            target: (P, 4).

        Returns:
            (P, 4) or (P,) if elementwise, else a 0-d tensor.
        """
        if pred.dtype in (torch.float16, torch.bfloat16):
            pred = pred.float()
        return self._step(pred, target.to(pred.dtype))


def check(owner: object, name: str, value: object, allowed: bool, rule: str) -> None:
    """Raises ValueError unless `allowed`, naming the class, the argument and the rule."""
    if not allowed:
        label = getattr(owner, "name", type(owner).__name__)
        raise ValueError(f"{label}: {name}={value!r} is not allowed; {rule}.")


def per_sample(loss: Tensor) -> Tensor:
    """(P,) sums over the coordinates of a (P, 4) or (P,) box loss."""
    return loss.sum(dim=1) if loss.dim() == 2 else loss
