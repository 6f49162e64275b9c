"""One run at a time writes into a directory."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

from d2_balance.engine.setup.run import on_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)

logger = logging.getLogger(__name__)


@contextmanager
def output_lock(directory: str) -> Iterator[None]:
    """Keeps other runs from writing into `directory` while the block runs; every rank enters it.

    The operating system takes the lock off when the process ends, a kill included. Where the file
    system has no locks there is none, and a warning.

    Args:
        directory: made where it is missing.

    Raises:
        ValueError: on all ranks, where another run holds the lock.
    """
    handles = []
    on_main_process(lambda: handles.append(_locked(directory)) if comm.is_main_process() else None)
    try:
        yield
    finally:
        for handle in handles:
            if handle is not None:
                os.close(handle)


def _locked(directory: str) -> int | None:
    """The open file that holds the lock; None where there are no locks."""
    os.makedirs(directory, exist_ok=True)
    if fcntl is None:
        return None
    path = os.path.join(directory, LOCK_FILE)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # of the process and not of the open file, so that workers, which live on for
        # some seconds after a kill, do not inherit it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        if error.errno not in _HELD:
            logger.warning(f"{path} cannot be locked ({error}): see to it that one run writes.")
            return None
        raise ValueError(
            f"OUTPUT_DIR {directory} is being written by another run ({owner or 'unknown'}); wait "
            "for its end or stop it, or set another OUTPUT_DIR."
        ) from error
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
    return handle
