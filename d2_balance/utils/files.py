"""Output that is whole or not there at all."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def atomic_path(path: str, *, sync: bool = False) -> Iterator[str]:
    """Yield a temporary path in the directory of `path`; move it to `path` when the block succeeds.

    The directory is made where it is missing. On an exception the temporary file is removed and
    whatever was at `path` stays as it was.

    Args:
        path: where the file goes.
        sync: True waits until the file is on the disk before it is moved, and the directory
            afterwards, so that a power cut leaves the old file or the new one.
    """
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(directory)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync(path: str) -> None:
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def check_new(paths: Iterable[str | None], overwrite: bool) -> None:
    """Refuse to replace files; called before the work that they are the result of.

    Args:
        paths: files to be written; None and "" are left out.
        overwrite: True allows it.

    Raises:
        FileExistsError: naming the first file that exists.
    """
    for path in paths:
        if path and os.path.exists(path) and not overwrite:
            raise FileExistsError(f"{path} exists; --overwrite replaces it")
