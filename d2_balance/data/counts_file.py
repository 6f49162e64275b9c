"""The file of class counts that `ClassCounts.save` writes, read without torch."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from d2_balance.utils.files import Count, convert, read_json

from .groups import GROUPS


class _Class(msgspec.Struct):
    image_count: Count
    instance_count: Count
    name: str | int | float | None = None
    frequency: str | None = None


class _Saved(msgspec.Struct):
    num_images: Count
    classes: list[_Class]


class SavedCounts(NamedTuple):
    """Counts of K classes.

    Attributes:
        image_count: images that show each class.
        instance_count: objects of each class.
        num_images: number of images.
        class_names: K names.
        file_groups: K letters r, c, f, or None.
    """

    image_count: list[int]
    instance_count: list[int]
    num_images: int
    class_names: tuple[str, ...]
    file_groups: tuple[str, ...] | None


def read_counts(path: str) -> SavedCounts:
    """Read a file of class counts; class k is the k-th entry of ``classes``.

    Raises:
        ValueError: naming the file and the field, if it cannot be read or lacks a count.
    """
    found = convert(read_json(path), _Saved, path)
    groups = tuple(c.frequency for c in found.classes if c.frequency)
    saved = SavedCounts(
        [c.image_count for c in found.classes],
        [c.instance_count for c in found.classes],
        found.num_images,
        tuple(str(k if c.name is None else c.name) for k, c in enumerate(found.classes)),
        groups if len(groups) == len(found.classes) else None,
    )
    try:
        check_ranges(saved.image_count, saved.num_images, saved.file_groups)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return saved


def check_ranges(
    image_count: Sequence[int], num_images: int, file_groups: Sequence[str] | None
) -> None:
    """Check counts of K classes.

    Raises:
        ValueError: naming what is wrong.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {num_images}")
    if max(image_count, default=0) > num_images:
        raise ValueError("image_count must not be above num_images")
    number = len(image_count)
    if file_groups is not None and (
        len(file_groups) != number or not set(file_groups) <= set(GROUPS)
    ):
        raise ValueError(f"file_groups must be {number} letters out of {tuple(GROUPS)}")
