"""Hooks of the trainer: the schedule of beta, the log of the losses' state, seeds per step."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_balance.losses import BoxLoss, ClassificationLoss, SmoothL1Loss
from d2_balance.reweight import GuidedScale, Reweighter
from d2_balance.utils.files import atomic_path

from ..resume.random_state import seed_everything

BETA_MODES = ("floor", "sawtooth", "linear")
LOSS_STATS_FILE = "loss_stats.json"


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


def check_beta_decay(cfg: CfgNode) -> None:
    """Checks the values below MODEL.BALANCE.BETA_DECAY where the schedule is switched on.

    Raises:
        ValueError: naming the key and what is allowed.
    """
    node = cfg.MODEL.BALANCE.BETA_DECAY
    if not node.ENABLED:
        return
    rules = {
        "MODE": (node.MODE in BETA_MODES, f"one of {', '.join(BETA_MODES)}"),
        "AMOUNT": (0 <= node.AMOUNT < math.inf, "a number of at least 0"),
        "PERIOD": (node.PERIOD >= 1, "an integer of at least 1"),
        "MIN": (0 <= node.MIN < math.inf, "a number of at least 0"),
    }
    for key, (allowed, rule) in rules.items():
        if not allowed:
            raise ValueError(f"MODEL.BALANCE.BETA_DECAY.{key} is {node[key]!r}; must be {rule}.")


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
        self._modules = [m for m in model.modules() if isinstance(m, SmoothL1Loss)]
        if not self._modules:
            raise ValueError(
                "MODEL.BALANCE.BETA_DECAY.ENABLED is True, but no box loss of the model is "
                "SmoothL1; set MODEL.BALANCE.BOX_LOSS SmoothL1 or switch the schedule off."
            )
        self._schedule = {"mode": mode, "amount": amount, "period": period, "minimum": minimum}

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> BetaDecay | None:
        """The hook that MODEL.BALANCE.BETA_DECAY describes; None where it is switched off.

        Raises:
            ValueError: a value is not allowed, or the model has no SmoothL1.
        """
        node = cfg.MODEL.BALANCE.BETA_DECAY
        if not node.ENABLED:
            return None
        check_beta_decay(cfg)
        return cls(model, mode=node.MODE, amount=node.AMOUNT, period=node.PERIOD, minimum=node.MIN)

    def before_step(self) -> None:
        for module in self._modules:
            beta = decayed_beta(module.initial_beta, self.trainer.iter, **self._schedule)
            module.beta.fill_(beta)


class SeedSteps(HookBase):
    """Seeds the random generators before each step from the run's seed, the rank and the iteration.

    What a step draws (Detectron2 samples anchors and proposals) is then the same in a resumed run,
    with nothing to save.

    Args:
        seed: at least 0.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self) -> None:
        seed_everything(self._seed, comm.get_rank(), self.trainer.iter)


class LossStats(HookBase):
    """Logs what `log_values()` of the losses and reweighters of a model returns.

    Single numbers become scalars `balance/<class>/<name>`; vectors (densities, weights) become
    TensorBoard histograms whose x axis is the index in the vector. The history of the vectors is
    saved with checkpoints and written to OUTPUT_DIR/loss_stats.json when training ends; it is
    thinned out, so that it never holds more than `max_records` times.

    Works on the main process only; the state of the losses is the same on every rank.

    Args:
        model: wrapped in DDP or not.
        output_dir: where loss_stats.json goes.
        period: iterations between two looks.
        max_records: times that are kept, at least 2.
    """

    def __init__(
        self, model: nn.Module, output_dir: str, period: int = 20, max_records: int = 64
    ) -> None:
        self._sources = _named_sources(model)
        self._path = os.path.join(output_dir, LOSS_STATS_FILE)
        self._period, self._max_records = period, max_records
        self._records: list[dict[str, Any]] = []
        self._stride = 1  # every how many looks a record is kept
        self._looks = 0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if comm.is_main_process() and (done % self._period == 0 or done == self.trainer.max_iter):
            self._look(done)

    def after_train(self) -> None:
        if comm.is_main_process() and self._records:
            with atomic_path(self._path) as path, open(path, "w", encoding="utf-8") as file:
                json.dump(self._records, file)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self._records, "stride": self._stride, "looks": self._looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._records = list(state["records"])
        self._stride, self._looks = state["stride"], state["looks"]

    def _look(self, iteration: int) -> None:
        storage = self.trainer.storage
        vectors: dict[str, dict[str, list[float]]] = {}
        for name, source in self._sources.items():
            for key, value in source.log_values().items():
                value = value.detach().double().cpu()
                if value.dim() == 0:
                    tag = f"balance/{name}/{key}"
                    storage.put_scalar(tag, value.item(), smoothing_hint=False)
                else:
                    _put_bars(storage, f"balance/{name}/{key}", value.flatten())
                    vectors.setdefault(name, {})[key] = value.tolist()
        if not vectors:
            return
        last = iteration == self.trainer.max_iter
        if self._looks % self._stride == 0 or last:
            self._records.append({"iteration": iteration, "stats": vectors})
        self._looks += 1
        if len(self._records) > self._max_records:
            self._records = self._records[::2]
            self._stride *= 2


def _named_sources(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with stats by class name; a number is added where a class occurs more than once."""
    kinds = (ClassificationLoss, BoxLoss, Reweighter, GuidedScale)
    found = [m for m in model.modules() if isinstance(m, kinds) and hasattr(m, "log_values")]
    names = [getattr(m, "name", type(m).__name__) for m in found]
    sources = {}
    for i, (name, module) in enumerate(zip(names, found, strict=True)):
        number = f"_{names[:i].count(name)}" if names.count(name) > 1 else ""
        sources[name + number] = module
    return sources


def _put_bars(storage: EventStorage, tag: str, values: Tensor) -> None:
    """Adds a vector to TensorBoard as a histogram with one bar per entry.

    `EventStorage.put_histogram` counts how often values occur; here the values are the counts.
    """
    values = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    index = torch.arange(len(values), dtype=values.dtype)
    storage._histograms.append(
        {
            "tag": tag,
            "min": 0.0,
            "max": float(len(values)),
            "num": float(values.sum()),
            "sum": float((values * index).sum()),
            "sum_squares": float((values * index.square()).sum()),
            "bucket_limits": (index + 1).tolist(),
            "bucket_counts": values.tolist(),
            "global_step": storage.iter,
        }
    )
