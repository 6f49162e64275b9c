"""Processes that work for another one, such as those of data loaders."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TypeVar

Loader = TypeVar("Loader")


def leave_signals(*_: object) -> None:
    """Leave Ctrl-C and SIGTERM to the process that has started this one.

    Terminals and schedulers send them to the whole group, and a worker that ends by itself takes
    the work of the main process with it. A second SIGTERM ends the worker: PyTorch and
    `multiprocessing` stop one that hangs with it. Called in the worker, as `worker_init_fn` is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)


def _once(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)


def shielded(loader: Loader) -> Loader:
    """Return a data loader whose workers call `leave_signals`, if they call nothing else."""
    if getattr(loader, "worker_init_fn", loader) is None:
        loader.worker_init_fn = leave_signals  # type: ignore[attr-defined]
    return loader
