"""Losses through torch.compile, where that works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2_balance.losses import BoxLoss, ClassificationLoss

KEY = "MODEL.BALANCE.COMPILE"

logger = logging.getLogger(__name__)


class _Fallback:
    """One decision for all losses of a model: compiled until a compilation fails."""

    def __init__(self) -> None:
        self.failed = False

    def note(self, error: Exception, what: str) -> None:
        if not self.failed:
            lines = str(error).strip().splitlines() or [""]
            logger.warning(
                f"{KEY}: {what} could not be compiled ({type(error).__name__}: {lines[0]}); all "
                "losses run as they do without the key."
            )
        self.failed = True


class _Compiled:
    """`compute` of a loss, compiled; the plain one after a failure.

    A loss may raise errors of its own (wrong input): the plain form raises them again, and they are
    no failure of the compiler.
    """

    def __init__(self, loss: ClassificationLoss | BoxLoss, fallback: _Fallback) -> None:
        self._plain, self._fallback = loss.compute, fallback
        self._name = loss.name
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        if self._fallback.failed:
            return self._plain(*inputs)
        try:
            if self._compiled is None:
                # numbers of samples and positives change with every batch
                self._compiled = torch.compile(self._plain, dynamic=True)
            return self._compiled(*inputs)
        except Exception as error:  # of any compiler
            result = self._plain(*inputs)
            self._fallback.note(error, self._name)
            return result


def compile_losses(model: nn.Module) -> None:
    """Compile the losses of a model in place.

    Forward and backward of a small function are compiled first: a machine without a C++ compiler
    fails there, and not in the middle of a step.

    Args:
        model: before it is wrapped in DDP.
    """
    losses = [m for m in model.modules() if isinstance(m, (ClassificationLoss, BoxLoss))]
    fallback = _Fallback()
    device = next(model.parameters()).device
    try:
        probe = torch.ones(8, device=device, requires_grad=True)
        torch.compile(_probe, dynamic=True)(probe).backward()
    except Exception as error:  # of any compiler
        fallback.note(error, "a small function")
        return
    for loss in losses:
        loss.compute = _Compiled(loss, fallback)
    logger.info(f"{KEY}: {len(losses)} losses are compiled at their first batch.")


def _probe(x: Tensor) -> Tensor:
    return (x.sigmoid() * x).sum()
