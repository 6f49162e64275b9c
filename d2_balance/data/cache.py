"""Columns of annotation files, kept on disk by the file's content and mapped into memory.

The cache directory ($D2_BALANCE_CACHE, else ~/.cache/d2_balance) holds

    columns-V/<hash of the content>/   header.json, one .npy file per column, masks.bin
    places-V/<hash of the path>.json   size and times of a file, and the hash of its content

A file whose size, times and inode are those of its place is not read again. Any other file is read
and hashed, which finds the columns of a file that was moved, copied or touched. V is the version of
what is read, so that an entry of another version is another name.

An entry is written beside its place and moved there when it is complete; it is taken only if every
file has the size and the checksum of the header. Where the directory is missing, read-only or full,
the columns stay in memory, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from d2_balance.utils.files import atomic_path

VERSION = 3  # of what is read, and of the form of the entries
_MASKS = "masks.bin"
_HEADER = "header.json"
_BLOCK = 1 << 22  # bytes that are summed at once
# A file written in the same tick of the clock as the look at it could change unseen.
_RACY_NS = 2_000_000_000

Columns = dict[str, np.ndarray]
Build = Callable[[BinaryIO], tuple[Columns, dict[str, Any]]]

logger = logging.getLogger(__name__)
_told: set[str] = set()


def directory() -> str:
    """Where columns are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("D2_BALANCE_CACHE") or os.path.join(root, "d2_balance")


def file_state(path: str) -> list[int] | None:
    """What tells a file from itself after a change; None where that cannot be told.

    Among it is ctime, which no program can set back. A file that has just been written may change
    within the same tick of the clock, and a remote one has no such state.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    if abs(time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)) < _RACY_NS:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def content_key(content: bytes) -> str:
    """Name of a content."""
    return hashlib.blake2b(content, digest_size=24).hexdigest()


def known_key(path: str, state: list[int] | None) -> str | None:
    """`content_key` of a file of which nothing has changed since it was read, else None."""
    entry = _read_json(_place_file(path))
    if state is None or entry is None or entry.get("state") != state:
        return None
    key = entry.get("content")
    return key if isinstance(key, str) else None


def keep_place(path: str, state: list[int] | None, key: str) -> None:
    """Remember the content of a file.

    Args:
        path: the file.
        state: its `file_state` before it was read.
        key: `content_key` of what was read.
    """
    if state is None or state != file_state(path):
        return
    with (
        contextlib.suppress(OSError),
        atomic_path(_place_file(path)) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        json.dump({"path": os.path.abspath(path), "state": state, "content": key}, file)


def load(key: str) -> tuple[Columns, dict[str, Any]] | None:
    """Columns and header of a content, mapped from the disk; None where there is no whole entry."""
    entry = _entry(key)
    header = _read_json(os.path.join(entry, _HEADER))
    if header is None or not isinstance(header.get("files"), dict):
        return None
    try:
        for name, (size, checksum) in header["files"].items():
            path = os.path.join(entry, name)
            if os.path.getsize(path) != size or _checksum(path) != checksum:
                return None
        columns = {}
        for name in header["files"]:
            path = os.path.join(entry, name)
            if name == _MASKS:
                columns["masks"] = _mapped(path)
            else:
                mapped = np.load(path, mmap_mode="r")
                columns[name.removesuffix(".npy")] = np.asarray(mapped)  # np.memmap slices slowly
    except (OSError, ValueError, TypeError):
        return None
    return columns, header["data"]


def store(key: str, build: Build) -> tuple[Columns, dict[str, Any]]:
    """Build the columns of a content once, also where several processes ask for them.

    Args:
        key: `content_key`.
        build: writes the text of the masks to a file and returns the other columns and the header.

    Returns:
        As `load`; in memory where nothing can be written.

    Raises:
        ValueError: of `build`.
    """
    try:
        root = os.path.dirname(_entry(key))
        os.makedirs(root, exist_ok=True)
        lock = _lock(os.path.join(root, f"{key}.lock"))
    except OSError as error:
        return _in_memory(build, error)
    with lock:
        found = load(key)  # of another process that was quicker
        if found is not None:
            return found
        temporary = None
        try:
            temporary = tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=root)
            _remove_leftovers(root, key, temporary)
            _write(temporary, build)
            shutil.rmtree(_entry(key), ignore_errors=True)  # one that is torn
            os.rename(temporary, _entry(key))
        except OSError as error:
            return _in_memory(build, error)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    found = load(key)
    return found if found is not None else _in_memory(build, OSError("the entry is not readable"))


def _write(entry: str, build: Build) -> None:
    masks = os.path.join(entry, _MASKS)
    with open(masks, "wb") as file:
        columns, data = build(file)
    for name, column in columns.items():
        with open(os.path.join(entry, f"{name}.npy"), "wb") as file:
            np.save(file, column, allow_pickle=False)
    files = {}
    for name in os.listdir(entry):
        path = os.path.join(entry, name)
        files[name] = os.path.getsize(path), _checksum(path)
        _sync(path)
    header = os.path.join(entry, _HEADER)
    with open(header, "w", encoding="utf-8") as file:
        json.dump({"files": files, "data": data}, file)
    _sync(header)


def _in_memory(build: Build, error: OSError) -> tuple[Columns, dict[str, Any]]:
    place = directory()
    if place not in _told:
        _told.add(place)
        logger.warning(
            f"Annotations are not kept in {place} ({error.strerror or error}): every start reads "
            "them again. $D2_BALANCE_CACHE names another directory."
        )
    masks = io.BytesIO()
    columns, data = build(masks)
    return columns | {"masks": np.frombuffer(masks.getbuffer(), dtype=np.uint8)}, data


def _mapped(path: str) -> np.ndarray:
    if not os.path.getsize(path):
        return np.zeros(0, dtype=np.uint8)
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _checksum(path: str) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: str) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock while the block runs; without one where the file system has none."""
    from iopath.common.file_io import file_lock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Exception):  # portalocker's own, which is no OSError
            stack.enter_context(file_lock(path))
        yield


def _remove_leftovers(root: str, key: str, own: str) -> None:
    """Remove what a process that was killed has left of an entry; its lock is free now."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if name.startswith(f"{key}.") and name.endswith(".tmp") and path != own:
            shutil.rmtree(path, ignore_errors=True)


def _entry(key: str) -> str:
    return os.path.join(directory(), f"columns-{VERSION}", key)


def _place_file(path: str) -> str:
    name = content_key(os.path.abspath(path).encode("utf-8", "surrogateescape"))
    return os.path.join(directory(), f"places-{VERSION}", f"{name}.json")


def _read_json(path: str) -> Mapping[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            entry = json.load(file)
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None
