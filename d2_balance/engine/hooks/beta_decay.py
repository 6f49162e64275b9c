"""The schedule that lowers the beta of smooth L1."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from d2_balance.losses import SmoothL1Loss
from d2_balance.utils.rules import check_values

from ..setup.rules import RULES


def decayed_beta(
    initial: float, iteration: int, *, mode: str, amount: float, period: int, minimum: float = 0.0
) -> float:
    """Beta of smooth L1 at an iteration.

    Source: Qian et al., DR Loss, arXiv:1907.10156v1, section 4.3, which prints
    b_t = b_0 - a (t mod K) and aims at L1; "floor" reads it as floor(t / K).

    Args:
        initial: b_0, at least 0.
        iteration: t, from 0.
        mode: "floor": b_0 - a floor(t / K); "sawtooth": b_0 - a (t mod K); "linear": b_0 - a t / K.
        amount: a, at least 0.
        period: K, at least 1.
        minimum: beta stops here; a b_0 below it stays as it is.
    """
    steps = {
        "floor": iteration // period,
        "sawtooth": iteration % period,
        "linear": iteration / period,
    }[mode]
    return max(initial - amount * steps, min(initial, minimum))


class BetaDecay(HookBase):
    """Lowers the beta of every SmoothL1 of a model, before each step.

    Beta is a function of the iteration and of each module's `initial_beta`, so that a resumed run
    continues with the value of an uninterrupted one.

    Args:
        model: wrapped in DDP or not.
        mode, amount, period, minimum: see `decayed_beta`.

    Raises:
        ValueError: the model has no SmoothL1.
    """

    def __init__(
        self, model: nn.Module, *, mode: str, amount: float, period: int, minimum: float = 0.0
    ) -> None:
        self._modules: list[Any] = [m for m in model.modules() if isinstance(m, SmoothL1Loss)]
        if not self._modules:
            raise ValueError(
                "MODEL.BALANCE.BETA_DECAY.ENABLED is True, but no box loss of the model is "
                "SmoothL1; set MODEL.BALANCE.BOX_LOSS SmoothL1 or switch the schedule off."
            )
        self._schedule: dict[str, Any] = {
            "mode": mode,
            "amount": amount,
            "period": period,
            "minimum": minimum,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> BetaDecay | None:
        """Return the hook that MODEL.BALANCE.BETA_DECAY describes; None where it is switched off.

        Raises:
            ValueError: a value is out of range, or the model has no SmoothL1.
        """
        node = cfg.MODEL.BALANCE.BETA_DECAY
        if not node.ENABLED:
            return None
        check_values(cfg, RULES, "MODEL.BALANCE.BETA_DECAY.")
        return cls(model, mode=node.MODE, amount=node.AMOUNT, period=node.PERIOD, minimum=node.MIN)

    def before_step(self) -> None:
        for module in self._modules:
            beta = decayed_beta(module.initial_beta, self.trainer.iter, **self._schedule)
            module.beta.fill_(beta)
