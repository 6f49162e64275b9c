"""Reweighters: how much each sample counts."""

from __future__ import annotations

from torch import Tensor, nn

from d2_balance.losses import Samples
from d2_balance.utils.registry import Named, Registry

REWEIGHTERS = Registry("REWEIGHTERS")
REWEIGHTERS.__doc__ = "Reweighters; the names are what MODEL.BALANCE.REWEIGHTERS accepts."


class Reweighter(nn.Module, Named):
    """Base of all reweighters. They multiply elementwise losses before the criterion sums them."""

    needs_scores: bool = False
    """True: it reads class scores off the logits, which must be plain sigmoid or softmax."""

    needs_entries: bool = False
    """True: it weights single classes of a sample: the loss must have K columns and no softmax."""

    def __init__(self) -> None:  # the signature that the config is made from: no arguments
        super().__init__()

    def forward(
        self, samples: Samples, cls: Tensor, box: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the weights of a batch.

        Args:
            samples: see `Samples`.
            cls: (R, C) or (R,) elementwise classification loss.
            box: (P, 4) or (P,) elementwise box loss.

        Returns:
            Weights (R,) or (R, C) of the classification loss and (P,) of the box loss; None: all 1.
        """
        raise NotImplementedError
