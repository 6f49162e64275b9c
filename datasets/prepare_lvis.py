#!/usr/bin/env python3
"""Checks LVIS files (v0.5, v1, or of the same form) and counts the classes of the training set.

    prepare_lvis.py TRAIN.json [VAL.json ...] [--images DIRECTORY]

Next to TRAIN.json it writes TRAIN_counts.json, which MODEL.BALANCE.CLASS_COUNTS_FILE takes in place
of counting at the start of every run. Counted are the images with at least one object, which
DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves (56,740 of v0.5, 99,388 of v1). Reported are structure
that cannot be trained on, bad annotations, missing images, classes whose image_count or frequency
is not what the training file shows, and files whose categories differ.
"""

import argparse
import os
import sys
from collections import Counter

import numpy as np
import torch

from d2_balance.data import ClassCounts
from d2_balance.data.annotations import Annotations, count_classes, read_annotations
from d2_balance.data.columns import category_name
from d2_balance.data.groups import GROUPS, groups_from_counts
from d2_balance.data.preparing import run_script
from d2_balance.data.records import find_images
from d2_balance.utils.files import check_new

SHOWN = 5


def some(lines: list[str]) -> str:
    """Up to five lines, and how many more."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join(lines[:SHOWN] + more)


def load(path: str, images: str | None) -> tuple[Annotations, list[str]]:
    """Annotations of a file, and what is to be said about it.

    Raises:
        ValueError: structure that cannot be trained on, or missing images.
    """
    data = read_annotations(path)
    negatives, partly = (
        int((np.diff(labels.offsets) > 0).sum()) for labels in (data.negative, data.not_exhaustive)
    )
    said = [
        f"{path}: {len(data.image_id):,} images, {len(data.id):,} annotations, "
        f"{data.num_classes:,} classes; {negatives:,} images list absent classes, "
        f"{partly:,} have classes that are not marked completely"
    ]
    if data.report:
        said.append(data.report.describe())
    directories = Counter(url.decode().split("/")[-2] for url in data.coco_url if url.count(b"/"))
    if directories:
        shown = ", ".join(f"{name}: {count:,}" for name, count in sorted(directories.items()))
        said.append(f"  images by directory of their coco_url: {shown}")
    if not negatives:
        said.append(f"  no image has neg_category_ids: {path} is not federated")
    if images:
        find_images(data, images)
        said.append(f"  all images lie below {images}")
    return data, said


def count(data: Annotations) -> ClassCounts:
    """Counts over the images that have an object.

    Raises:
        ValueError: no annotation.
    """
    kept = data.usable & ~data.ignore
    if not kept.any():
        raise ValueError(f"{data.path}: no annotation; the first file must be the training set")
    counts = count_classes(
        data.image[kept], data.category[kept], data.num_classes, len(data.image_id)
    )
    return ClassCounts(
        torch.from_numpy(counts.image_count),
        torch.from_numpy(counts.instance_count),
        counts.images_with_objects,
        tuple(data.class_names.values()),
        data.file_groups,
    )


def compare_counts(categories: list[dict], counts: ClassCounts) -> list[str]:
    """Classes whose entry in the file is not what the annotations show."""
    found = counts.image_count.tolist()
    rows = list(zip(categories, found, strict=True))
    wrong = [
        f"{c['id']} {category_name(c)!r}: {c['image_count']}, counted {n}"
        for c, n in rows
        if c.get("image_count") not in (None, n)
    ]
    groups = groups_from_counts(found)
    moved = [
        f"{c['id']} {category_name(c)!r}: {c['frequency']}, by {n} images {g}"
        for (c, n), g in zip(rows, groups, strict=True)
        if c.get("frequency") not in (None, g)
    ]
    said = [f"  image_count differs for {len(wrong)} classes: {some(wrong)}"] if wrong else []
    return said + (
        [f"  frequency differs for {len(moved)} classes: {some(moved)}"] if moved else []
    )


def same_categories(first: Annotations, other: Annotations, names: tuple[str, str]) -> None:
    """Check that two files number the same classes alike.

    Raises:
        ValueError: naming the first categories that differ.
    """
    ours, theirs = first.class_names, other.class_names
    differing = [
        f"{i}: {ours.get(i)!r} and {theirs.get(i)!r}"
        for i in sorted({*ours, *theirs})
        if ours.get(i) != theirs.get(i)
    ]
    if differing:
        raise ValueError(
            f"{names[0]} and {names[1]} differ in {len(differing)} categories ({some(differing)}); "
            "training and validation need one list: take both files of one LVIS version"
        )


def check(args: argparse.Namespace) -> str:
    """Check all files and write the counts; returns the report."""
    output = f"{os.path.splitext(args.files[0])[0]}_counts.json"
    check_new([output], args.overwrite)
    first, lines = None, []
    for path in args.files:
        data, said = load(path, args.images)
        lines += said
        if first is None:
            first, counts = data, count(data)
            lines += compare_counts(data.categories, counts)
        else:
            same_categories(first, data, (args.files[0], path))
    counts.save(output, args.overwrite)
    sizes = Counter(counts.group())
    groups = ", ".join(f"{sizes[letter]:,} {name}" for letter, name in GROUPS.items())
    return "\n".join([*lines, f"{output}: {groups} classes on {counts.num_images:,} images"])


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="JSON", help="training file first")
    parser.add_argument("--images", help="directory that must hold every image, as coco/")
    parser.add_argument("--overwrite", action="store_true", help="replace TRAIN_counts.json")
    return run_script(check, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
