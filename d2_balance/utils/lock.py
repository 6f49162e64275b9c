"""One run at a time writes into a directory."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)

logger = logging.getLogger(__name__)


@contextmanager
def directory_lock(directory: str) -> Iterator[None]:
    """Keep other processes from writing into `directory` while the block runs.

    The operating system takes the lock off when the process ends, a kill included. If the file
    system has no locks there is none, and a warning.

    Args:
        directory: made if it is missing.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    handle = _locked(directory)
    try:
        yield
    finally:
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
