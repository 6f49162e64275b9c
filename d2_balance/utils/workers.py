"""Processes that work for another one, such as those of data loaders."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TypeVar

Loader = TypeVar("Loader")
GRACE_SECONDS = 5  # that a loader's worker goes on after a SIGTERM


def leave_signals(*_: object) -> None:
    """Leave Ctrl-C and SIGTERM to the process that has started this one.

    Terminals and schedulers send them to the whole group, and a worker that ends by itself takes
    the work of the main process with it. A second SIGTERM ends the worker: PyTorch and
    `multiprocessing` stop one that hangs with it. Called in the worker, as `worker_init_fn` is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)


def leave_signals_for_a_while(*_: object) -> None:
    """`leave_signals` of the workers of a data loader, which end `GRACE_SECONDS` after a SIGTERM.

    A process that exits stops these workers by one SIGTERM and waits for them without an end. They
    end with status 0, because PyTorch raises in the main process where one was killed.
    """
    leave_signals()
    signal.signal(signal.SIGTERM, _once_and_end)


def _once(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)


def _once_and_end(number: int, frame: FrameType | None) -> None:
    _once(number, frame)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.alarm(GRACE_SECONDS)


def shielded(loader: Loader) -> Loader:
    """Return a data loader whose workers leave signals, if they have no start of their own."""
    if getattr(loader, "worker_init_fn", loader) is None:
        loader.worker_init_fn = leave_signals_for_a_while  # type: ignore[attr-defined]
    return loader
