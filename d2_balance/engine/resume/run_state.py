"""What a run is besides weights and optimizer, so that a resumed one continues exactly.

Random numbers and the data need no state: they are functions of the seed, the rank and the
iteration (`SeedSteps`, `TrainStream`). What is left: scalars that the log still smooths, how far
the log files had been written, buffers that differ between ranks, and images that were skipped.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor, nn

LOGS = ("metrics.json", "metrics.csv")
"""Files of OUTPUT_DIR that writers append to; what follows a checkpoint is written once more."""

CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds")
"""Scalars that measure time; a resumed run measures anew."""

WINDOW = 20
"""Iterations that Detectron2's writers smooth over."""

logger = logging.getLogger(__name__)


class RunState(HookBase):
    """Saves and restores the state of a run that no other part of a checkpoint holds.

    Stands on every rank, directly before PeriodicCheckpointer; where that hook is missing, on the
    other ranks, before the hooks that follow it.

    Args:
        model: wrapped in DDP or not.
        output_dir: directory of the log files.
        period: iterations between two checkpoints.
    """

    def __init__(self, model: nn.Module, output_dir: str, period: int) -> None:
        self._model = getattr(model, "module", model)
        self._directory, self._period = output_dir, period
        self._ranks: list[dict[str, Any]] = []
        self._resumed: dict[str, Any] = {}
        self.finished = False  # whether all hooks of the iteration have run when it is saved

    @property
    def unfinished(self) -> bool:
        """Whether the run continues behind a checkpoint whose iteration has hooks left to run."""
        return bool(self._resumed) and not self._resumed["finished"]

    def due(self) -> bool:
        """Return whether a checkpoint is saved in this iteration."""
        done = self.trainer.iter + 1
        return done % self._period == 0 or done == self.trainer.max_iter

    def before_step(self) -> None:
        self.finished = False

    def after_step(self) -> None:
        if self.due():
            self.gather()

    def gather(self) -> None:
        """Collect what differs between ranks, for `state_dict`; every rank must call this."""
        self._ranks = comm.gather({"buffers": self._own_buffers(), "stream": self._stream_state()})

    def before_train(self) -> None:
        if self._resumed and comm.is_main_process():
            restore_scalars(self.trainer.storage, self._resumed["scalars"])
            self._restore_logs()
        elif self.trainer.start_iter == 0 and comm.is_main_process():
            self._take_back({})  # what a run logged that was stopped before its first checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {
            "finished": self.finished,
            "world_size": comm.get_world_size(),
            "ranks": self._ranks,
            "scalars": saved_scalars(getattr(self.trainer, "storage", EventStorage())),
            "logs": {name: os.path.getsize(path) for name, path in self._logs()},
            "last_writes": {
                type(writer).__name__: writer._last_write
                for writer in self._writers()
                if _counts_iterations(writer)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state
        before, now = state["world_size"], comm.get_world_size()
        if before != now:
            logger.warning(
                f"The run was saved by {before} processes and goes on with {now}. Weights, "
                "optimizer and state of the losses are those of the checkpoint, and the images "
                "of each iteration stay the same; how they are shared out and augmented does not, "
                "and numbers of single processes (running means of plain batch norms, the memory "
                "of LOCE) are those of the first one where there are none for a process."
            )
        if comm.get_rank() >= len(state["ranks"]):
            return
        own = state["ranks"][comm.get_rank()]
        buffers = dict(self._model.named_buffers())
        with torch.no_grad():
            for name, value in own["buffers"].items():
                buffers[name].copy_(value)
        stream = self.trainer.data_loader
        if hasattr(stream, "load_state_dict"):
            stream.load_state_dict(own["stream"])

    def _own_buffers(self) -> dict[str, Tensor]:
        """Buffers of this rank that are not the same on all ranks."""
        if comm.get_world_size() == 1:
            return {}
        own = {name: value for name, value in self._model.named_buffers()}
        digests = comm.all_gather({name: _digest(value) for name, value in own.items()})
        differing = {name for other in digests for name in own if other[name] != digests[0][name]}
        return {name: value.cpu().clone() for name, value in own.items() if name in differing}

    def _stream_state(self) -> dict[str, Any]:
        stream = self.trainer.data_loader
        return stream.state_dict() if hasattr(stream, "state_dict") else {}

    def _logs(self) -> list[tuple[str, str]]:
        paths = [(name, os.path.join(self._directory, name)) for name in LOGS]
        return [(name, path) for name, path in paths if os.path.isfile(path)]

    def _writers(self) -> list[EventWriter]:
        found = [h for h in self.trainer._hooks if isinstance(h, hooks.PeriodicWriter)]
        return [writer for hook in found for writer in hook._writers]

    def _restore_logs(self) -> None:
        """Take back what was logged after the checkpoint: these iterations run again."""
        self._take_back(self._resumed["logs"])
        for writer in self._writers():
            if _counts_iterations(writer):
                last = self._resumed["last_writes"].get(type(writer).__name__, -1)
                writer._last_write = last

    def _take_back(self, sizes: Mapping[str, int]) -> None:
        """Cut the log files to the sizes they had."""
        for name, path in self._logs():
            size = sizes.get(name, 0)
            if os.path.getsize(path) > size:
                os.truncate(path, size)
                logger.info(f"{path}: what follows iteration {self.trainer.iter - 1} is taken back")


class FinishIteration(HookBase):
    """Runs the hooks behind a checkpoint that a killed run did not get to, when it is resumed.

    A checkpoint is saved before the evaluation of its iteration, so that a failed evaluation loses
    nothing. Best model, early stopping and log come behind it. A resumed run therefore begins with
    these hooks, for the iteration of the checkpoint. After an evaluation the checkpoint is saved
    once more, so that it is not evaluated twice.

    Must be the last hook, on every rank.

    Args:
        state: stands in front of the hooks that are run.
        eval_period: TEST.EVAL_PERIOD.
    """

    def __init__(self, state: RunState, eval_period: int) -> None:
        self._state, self._eval_period = state, eval_period

    def before_train(self) -> None:
        if not self._state.unfinished:
            return
        trainer, start = self.trainer, self.trainer.iter
        trainer.iter = trainer.storage.iter = start - 1
        first, last = (trainer._hooks.index(hook) for hook in (self._state, self))
        for hook in trainer._hooks[first + 1 : last]:
            if not isinstance(hook, hooks.PeriodicCheckpointer):
                hook.after_step()
        self._state.gather()
        self._save_again()
        trainer.iter = trainer.storage.iter = start

    def after_step(self) -> None:
        if self._state.due():
            self._save_again()

    def _save_again(self) -> None:
        done = self.trainer.iter + 1
        evaluated = self._eval_period > 0 and done % self._eval_period == 0
        if not evaluated or done == self.trainer.max_iter:
            return
        self._state.finished = True
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                name = f"{hook.file_prefix}_{self.trainer.iter:07d}"
                hook.save(name, iteration=self.trainer.iter)


def saved_scalars(storage: EventStorage) -> dict[str, Any]:
    """Return the scalars of a storage as plain values, over the window of the writers.

    Those of `CLOCK` are left out.
    """
    found = {}
    for name, history in storage.histories().items():
        if name in CLOCK:
            continue
        values = history.values()
        since = values[-1][1] - WINDOW
        found[name] = {
            "values": [(float(v), int(i)) for v, i in values if i > since],
            "count": history._count,
            "mean": float(history.global_avg()),
            "smoothing": storage.smoothing_hints()[name],
        }
    return found


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Fill a new storage with what `saved_scalars` gave."""
    for name, saved in scalars.items():
        history = HistoryBuffer()
        history._data = [tuple(pair) for pair in saved["values"]]
        history._count, history._global_avg = saved["count"], saved["mean"]
        storage._history[name] = history
        storage._latest_scalars[name] = history._data[-1]
        storage._smoothing_hints[name] = saved["smoothing"]


def _counts_iterations(writer: EventWriter) -> bool:
    """Return whether a writer knows the last iteration it wrote; the console's knows a time."""
    return isinstance(getattr(writer, "_last_write", None), int)


def _digest(value: Tensor) -> bytes:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()
