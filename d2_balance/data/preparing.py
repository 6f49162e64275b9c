"""What the scripts `datasets/prepare_*.py` share: class counts, and files that are whole."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2_balance.utils.files import atomic_path, check_new, read_json

from .columns import category_name
from .groups import LVIS_CUTS, groups_from_counts


def with_counts(
    categories: Sequence[Mapping[str, Any]],
    images: Mapping[int, int],
    instances: Mapping[int, int],
    cuts: tuple[int, int] = LVIS_CUTS,
) -> list[dict[str, Any]]:
    """Categories with `image_count`, `instance_count` and `frequency` as LVIS files have them.

    Args:
        categories: entries with `id`.
        images: training images that show a class, by category id; a class that is missing has 0.
        instances: its objects.
        cuts: highest image count of a rare and of a common class.
    """
    counts = [images.get(c["id"], 0) for c in categories]
    return [
        {
            **category,
            "image_count": count,
            "instance_count": instances.get(category["id"], 0),
            "frequency": group,
        }
        for category, count, group in zip(
            categories, counts, groups_from_counts(counts, cuts), strict=True
        )
    ]


def counts_of_training(
    categories: Sequence[Mapping[str, Any]], train_file: str
) -> list[dict[str, Any]]:
    """Categories with the counts that another file, the prepared training set, gives them.

    Raises:
        ValueError: the file has other categories, or no counts.
    """
    given = {c["id"]: c for c in read_json(train_file)["categories"]}
    for category in categories:
        other = given.get(category["id"])
        name = category_name(category)
        if other is None or category_name(other) != name:
            there = "missing" if other is None else repr(category_name(other))
            raise ValueError(
                f"{train_file}: category {category['id']} is {name!r} here and {there} there; "
                "prepare both files with the same classes"
            )
        if not {"image_count", "frequency"} <= set(other):
            raise ValueError(
                f"{train_file}: category {category['id']} has no image_count and frequency; "
                "prepare the training set first"
            )
    fields = ("image_count", "instance_count", "frequency")
    return [c | {f: given[c["id"]][f] for f in fields if f in given[c["id"]]} for c in categories]


def write_annotations(data: Mapping[str, Any], path: str) -> None:
    """Write an annotation file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, allow_nan=False)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds OUT and --overwrite."""
    parser.add_argument("output", metavar="OUT", help="annotation file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")


def run_script(work: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Run a preparation; prints what it returns, or one message to stderr and 2 as the status."""
    name = os.path.basename(sys.argv[0])
    try:
        check_new([getattr(args, "output", None)], args.overwrite)
        print(work(args))
    except (ValueError, FileExistsError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0
