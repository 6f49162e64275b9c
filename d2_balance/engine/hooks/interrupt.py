"""SIGINT and SIGTERM save a checkpoint at the iteration reached, and end the run.

In a step a signal is a note: the step is finished, all ranks learn of it with the all-reduce that
checks the losses, and stop together. In an evaluation nothing is lost by leaving it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..errors import Interrupted, StopTraining, signal_name
from ..resume.checkpoint import BalancedCheckpointer, resumable_files
from ..resume.run_state import RunState
from .nonfinite import FiniteLosses

KEY = "SOLVER.INTERRUPT_TIMEOUT"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 2.0  # seconds in which a signal comes twice: from the terminal, and from the parent

logger = logging.getLogger(__name__)


class SaveOnSignal(HookBase):
    """Saves a checkpoint and ends the run when the process gets SIGINT or SIGTERM.

    Stands behind all hooks but FinishIteration, on every rank.

    Args:
        state: part of the checkpoint.
        checkpointer: of the run.
        losses: brings the note of one rank to the others.
        timeout: seconds after the signal at which the process ends in any case.
    """

    def __init__(
        self,
        state: RunState,
        checkpointer: BalancedCheckpointer,
        losses: FiniteLosses,
        timeout: float,
    ) -> None:
        self._state, self._checkpointer, self._losses = state, checkpointer, losses
        self._timeout = timeout
        self._signal, self._when = 0, 0.0
        self._at_once = False  # whether a signal leaves what is running
        self._before: dict[int, Any] = {}
        losses.wants_to_stop = lambda: bool(self._signal)

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_train(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def after_step(self) -> None:
        stops = bool(self._signal) if comm.get_world_size() == 1 else self._losses.stop_everywhere
        if stops and self.trainer.iter + 1 < self.trainer.max_iter:
            self._gather()
            raise self._save(finished=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the block on a signal, with a checkpoint of the iteration that it stands in."""
        self._gather()  # so that the first rank can save without the others
        asked = any(comm.all_gather(bool(self._signal)))  # since the last backward pass
        self._at_once = True
        try:
            if asked or self._signal:
                raise StopTraining
            yield
        except BaseException:  # of another rank that has left, too
            self._at_once = False
            if not (asked or self._signal):
                raise
            raise self._save(finished=False) from None
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is a note, a second Ctrl-C ends the process.

        SIGTERM comes again from whoever started the process, when another rank has ended before.
        """
        del frame
        now = time.monotonic()
        if self._signal:
            if number == signal.SIGINT and now - self._when > _AGAIN:
                self._leave("A second Ctrl-C")
            return
        self._signal, self._when = number, now
        watchdog = threading.Timer(
            self._timeout, self._leave, (f"{KEY}: {self._timeout:g} seconds have passed",)
        )
        watchdog.daemon = True
        watchdog.start()
        if self._at_once:
            raise StopTraining

    def _leave(self, why: str) -> None:
        """End the process where it is; a resumed run removes a file that was being written."""
        if self._before:  # the run has not ended by itself meanwhile
            print(f"\n{why}. {self._how_to_go_on()}", file=sys.stderr, flush=True)
            os._exit(128 + self._signal)

    def _gather(self) -> None:
        """Collect what a checkpoint needs of the other ranks; every rank must call this."""
        for hook in self.trainer._hooks:
            if hasattr(hook, "gather"):
                hook.gather()

    def _save(self, *, finished: bool) -> Interrupted:
        """Save the state after the present iteration; the error then ends the run."""
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        name = f"model_{iteration:07d}"
        if iteration + 1 < self.trainer.max_iter:  # else model_final.pth is there already
            self._state.finished = finished
            self._checkpointer.save(name, iteration=iteration)
        # what is left to evaluate is done when the run is resumed
        self.trainer._hooks = [h for h in self.trainer._hooks if not isinstance(h, hooks.EvalHook)]
        signal_number = self._signal or signal.SIGTERM  # another rank got it
        return Interrupted(
            f"{signal_name(signal_number)} after iteration {iteration}. {self._how_to_go_on()}",
            signal_number,
        )

    def _how_to_go_on(self) -> str:
        kept = [p for p in resumable_files(self._checkpointer.save_dir) if os.path.exists(p)]
        if not kept:
            return "There is no checkpoint of this run yet."
        return f"{kept[0]} is saved: the same command with --resume goes on from there."
