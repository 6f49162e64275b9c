"""What the scripts `datasets/prepare_*.py` share: class counts, and files that are whole."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2_balance.utils.files import check_new, parse_json, read_bytes, read_json, write_json
from d2_balance.utils.names import listed

from .columns import category_name, check_structure
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
    return [
        {**c, **{f: given[c["id"]][f] for f in fields if f in given[c["id"]]}} for c in categories
    ]


def read_ids(path: str) -> list[int | str]:
    """Image ids of a file: a JSON list, or one id a line.

    Raises:
        ValueError: naming the file.
    """
    text = read_bytes(path).decode("utf-8", "replace").strip()
    ids = parse_json(text.encode(), path) if text.startswith("[") else text.split()
    if not ids or not all(isinstance(i, int | str) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path}: must be a JSON list of image ids, or one id a line")
    return [int(i) if isinstance(i, str) and i.lstrip("-").isdigit() else i for i in ids]


def cut_images(path: str, ids: Sequence[int | str], output: str, overwrite: bool = False) -> None:
    """Write the images of a list of ids and their annotations; the rest of the file stays.

    Args:
        path: annotation file.
        ids: of the images to keep; minival of LVIS v1, for example.
        output: file to write.
        overwrite: True replaces it.

    Raises:
        ValueError: the file cannot be used, or lacks an image of the list.
        FileExistsError: the output is there already.
    """
    check_new([output], overwrite)
    data = read_json(path)
    check_structure(data, path)
    wanted = set(ids)
    lacking = wanted - {image["id"] for image in data["images"]}
    if lacking:
        shown = listed(sorted(lacking, key=str))
        raise ValueError(
            f"{path}: {len(lacking)} of {len(wanted)} ids are no images of it: {shown}"
        )
    kept = {
        "images": [image for image in data["images"] if image["id"] in wanted],
        "annotations": [a for a in data["annotations"] if a["image_id"] in wanted],
    }
    write_json(output, {**data, **kept})


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
