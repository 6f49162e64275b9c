"""Class counts of an annotation file, kept in a cache by the file's content.

Two kinds of entries lie in the cache directory ($D2_BALANCE_CACHE, else ~/.cache/d2_balance):

    counts/<hash of the content>.json    what was counted; true for ever
    places/<hash of the path>.json       size and times of a file, and the hash of its content

A file whose size, times and inode are those of its place is not read again. Any other file is read
and hashed, which finds the counts of a file that was moved, copied or touched; what is not found is
counted. An entry of another version is another name. Entries are written whole, so that processes
may share the directory; one that cannot be written or read costs time and nothing else.

Shapes: K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import numpy as np

from d2_balance.utils.files import atomic_path

from .checks.annotations import find_bad_annotations
from .checks.structure import category_name, check_structure
from .groups import GROUPS
from .json_files import parse_json, read_content

VERSION = 1  # of what is counted, and of the form of the entries
# A file written in the same tick of the clock as the look at it could change unseen.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class FileCounts:
    """Counts of one COCO- or LVIS-style file; crowds and bad annotations are left out.

    Attributes:
        image_count: K, images that show the class.
        instance_count: K, objects of the class.
        images: number of images.
        images_with_objects: of them, those with an object to train on.
        class_names: K names.
        file_groups: K letters "r", "c", "f" that the file itself gives, or None.
    """

    image_count: tuple[int, ...]
    instance_count: tuple[int, ...]
    images: int
    images_with_objects: int
    class_names: tuple[str, ...]
    file_groups: tuple[str, ...] | None


def file_counts(path: str) -> FileCounts:
    """Counts of a file, from the cache where its content was counted before.

    Raises:
        ValueError: the file cannot be read or cannot be trained on; names the file and the place.
    """
    state = file_state(path)
    known = _read(_place_file(path))
    if known is not None and state is not None and known.get("state") == state:
        found = known_content(known.get("content"))
        if found is not None:
            return found
    content = read_content(path)
    key = content_key(content)
    found = known_content(key)
    if found is None:
        data = parse_json(content, path)
        del content
        check_structure(data, path)
        sizes = {
            image["id"]: (int(image["height"]), int(image["width"])) for image in data["images"]
        }
        found = count(data, find_bad_annotations(data["annotations"], sizes, path).skip)
    keep(path, state, key, found)
    return found


def count(data: dict[str, Any], skip: Collection[int]) -> FileCounts:
    """Counts of a file's content.

    Args:
        data: what `check_structure` has passed.
        skip: positions of annotations to leave out.
    """
    categories = sorted(data["categories"], key=lambda category: category["id"])
    class_index = {category["id"]: k for k, category in enumerate(categories)}
    image_index = {image["id"]: n for n, image in enumerate(data["images"])}
    annotations = data["annotations"]
    trained = np.fromiter(
        (not (a.get("iscrowd") or a.get("ignore")) for a in annotations), bool, len(annotations)
    )
    trained[list(skip)] = False
    kept = list(compress(annotations, trained))
    label = np.fromiter((class_index[a["category_id"]] for a in kept), np.int64, len(kept))
    image = np.fromiter((image_index[a["image_id"]] for a in kept), np.int64, len(kept))
    pairs = np.unique(image * len(categories) + label)
    groups = tuple(category.get("frequency") for category in categories)
    return FileCounts(
        tuple(np.bincount(pairs % len(categories), minlength=len(categories)).tolist()),
        tuple(np.bincount(label, minlength=len(categories)).tolist()),
        len(image_index),
        len(np.unique(image)),
        tuple(category_name(category) for category in categories),
        groups if all(group in tuple(GROUPS) for group in groups) else None,
    )


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


def known_content(key: Any) -> FileCounts | None:
    """Counts of a content by its `content_key`, or None."""
    entry = _read(_counts_file(key)) if isinstance(key, str) else None
    try:
        return FileCounts(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in (entry or {}).items()}
        )
    except TypeError:  # no entry, or one that something else wrote
        return None


def keep(path: str, state: list[int] | None, key: str, found: FileCounts) -> None:
    """Stores counts.

    Args:
        path: the file.
        state: its `file_state` before it was read.
        key: `content_key` of what was read.
        found: its counts.
    """
    _write(_counts_file(key), asdict(found))
    # unchanged since before it was read, so that this state has this content
    if state is not None and state == file_state(path):
        _write(_place_file(path), {"path": os.path.abspath(path), "state": state, "content": key})


def cache_directory() -> str:
    """Where counts are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("D2_BALANCE_CACHE") or os.path.join(root, "d2_balance")


def _place_file(path: str) -> str:
    name = content_key(os.path.abspath(path).encode("utf-8", "surrogateescape"))
    return os.path.join(cache_directory(), f"places-{VERSION}", f"{name}.json")


def _counts_file(key: str) -> str:
    return os.path.join(cache_directory(), f"counts-{VERSION}", f"{key}.json")


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            entry = json.load(file)
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def _write(path: str, entry: dict[str, Any]) -> None:
    try:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(entry, file)
    except OSError:
        pass  # a directory without room or rights: counted again next time
