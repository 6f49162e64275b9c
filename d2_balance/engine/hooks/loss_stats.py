"""The state of the losses (densities, class weights) in the logs."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_balance.losses import BoxLoss, ClassificationLoss
from d2_balance.reweight import GuidedScale, Reweighter
from d2_balance.utils.files import write_json

LOSS_STATS_FILE = "loss_stats.json"


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
            write_json(self._path, self._records)

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


def _named_sources(model: nn.Module) -> dict[str, Any]:
    """Modules with stats by class name; a number is added where a class occurs more than once."""
    kinds = (ClassificationLoss, BoxLoss, Reweighter, GuidedScale)
    found = [m for m in model.modules() if isinstance(m, kinds) and hasattr(m, "log_values")]
    names = [getattr(m, "name", type(m).__name__) for m in found]
    sources: dict[str, Any] = {}
    for i, (name, module) in enumerate(zip(names, found, strict=True)):
        number = f"_{names[:i].count(name)}" if names.count(name) > 1 else ""
        sources[name + number] = module
    return sources


def _put_bars(storage: EventStorage, tag: str, values: Tensor) -> None:
    """Add a vector to TensorBoard as a histogram with one bar per entry.

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
