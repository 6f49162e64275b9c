"""Moving average of the weights of a model, evaluated and saved in their place.

With t the steps taken so far, every weight w has an average a, a <- d a + (1 - d) w, with
d = min(DECAY, (1 + t) / (10 + t)), so that the random start is forgotten early in a run. What batch
norms have counted is averaged the same way: it belongs to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..resume.checkpoint import BalancedCheckpointer

FILE = "model_final_ema"
"""Name of the file of the averaged weights, without its ending."""


def check_ema(cfg: CfgNode) -> None:
    """Refuse an average beside TEST.PRECISE_BN.

    Raises:
        ValueError: naming both keys.
    """
    if cfg.SOLVER.EMA.ENABLED and cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN measures the statistics of the weights, and SOLVER.EMA evaluates "
            "their average, which has statistics of its own; set one of them to False."
        )


class WeightAverage(HookBase):
    """Keeps the average after every step that has changed the weights.

    Stands before checkpoints, whose part it is; every rank has one. Frozen parameters are not
    copied. Averages are float32.

    Args:
        model: wrapped in DDP or not.
        decay: fraction of the old average, in [0, 1).
        period: iterations between two checkpoints.
        checkpointer: writes the file at the end of the run.
    """

    def __init__(
        self, model: nn.Module, decay: float, period: int, checkpointer: BalancedCheckpointer
    ) -> None:
        self._model = getattr(model, "module", model)
        self._decay, self._period, self._checkpointer = decay, period, checkpointer
        self._steps = 0
        self._own = _averaged(self._model)
        self._average = {name: value.detach().float().clone() for name, value in self._own.items()}
        self._per_rank: list[dict[str, Tensor]] = []

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, checkpointer: BalancedCheckpointer
    ) -> WeightAverage | None:
        """Return the hook that SOLVER.EMA describes; None where it is switched off."""
        node = cfg.SOLVER.EMA
        if not node.ENABLED:
            return None
        return cls(model, node.DECAY, cfg.SOLVER.CHECKPOINT_PERIOD, checkpointer)

    def before_train(self) -> None:
        if self._steps == 0:  # the weights may have been loaded since
            _copy(self._average, self._own)

    @torch.no_grad()
    def after_step(self) -> None:
        if getattr(self.trainer._trainer, "took_step", True):
            decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
            weights = [value.detach().float() for value in self._own.values()]
            torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)
            self._steps += 1
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self.gather()

    def gather(self) -> None:
        """Collect what batch norms of each rank have counted; every rank must call this."""
        if comm.get_world_size() > 1:
            norms = {name for name, _ in _norm_buffers(self._model)}
            own = {name: v.cpu().clone() for name, v in self._average.items() if name in norms}
            self._per_rank = comm.gather(own)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self.save()

    def save(self) -> None:
        """Write the averaged weights to OUTPUT_DIR, in the first process."""
        with self.applied():
            self._checkpointer.save(FILE, iteration=self.trainer.iter - 1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside of the block the model has the averages for weights."""
        weights = {name: value.detach().clone() for name, value in self._own.items()}
        _copy(self._own, self._average)
        try:
            yield
        finally:
            _copy(self._own, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "average": self._average, "ranks": self._per_rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._per_rank = state["steps"], list(state["ranks"])
        saved, rank = dict(state["average"]), comm.get_rank()
        if rank < len(self._per_rank):
            saved |= self._per_rank[rank]
        # a parameter that was frozen then has no average: it starts with the weight itself
        _copy(self._average, self._own | {k: v for k, v in saved.items() if k in self._average})


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that are averaged, by name."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return found | dict(_norm_buffers(model))


def _norm_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for name, value in module.named_buffers(prefix, recurse=False):
                if value.is_floating_point():
                    yield name, value


@torch.no_grad()
def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
