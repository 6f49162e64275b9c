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

from d2_balance.data import ClassCounts, check_structure, read_json
from d2_balance.data.annotations import find_images
from d2_balance.data.checks.annotations import find_bad_annotations
from d2_balance.data.checks.structure import category_name
from d2_balance.data.groups import GROUPS, groups_from_counts
from d2_balance.data.preparing import run_script
from d2_balance.utils.files import check_new

SHOWN = 5


def some(lines: list[str]) -> str:
    """Up to five lines, and how many more."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join(lines[:SHOWN] + more)


def load(path: str, images: str | None) -> tuple[dict, set[int], list[str]]:
    """Content of a file, positions of its bad annotations, and what is to be said about it.

    Raises:
        ValueError: structure that cannot be trained on, or missing images.
    """
    data = read_json(path)
    check_structure(data, path)
    sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in data["images"]}
    findings = find_bad_annotations(data["annotations"], sizes, path)
    negatives = sum(bool(i.get("neg_category_ids")) for i in data["images"])
    partly = sum(bool(i.get("not_exhaustive_category_ids")) for i in data["images"])
    said = [
        f"{path}: {len(data['images']):,} images, {len(data['annotations']):,} annotations, "
        f"{len(data['categories']):,} classes; {negatives:,} images list absent classes, "
        f"{partly:,} have classes that are not marked completely"
    ]
    if findings.report:
        said.append(findings.report.describe())
    if not negatives:
        said.append(f"  no image has neg_category_ids: {path} is not federated")
    if images:
        find_images(data["images"], images, path)
        said.append(f"  all images lie below {images}")
    return data, findings.skip, said


def count(data: dict, skip: set[int], path: str) -> ClassCounts:
    """Counts over the images that have an object.

    Raises:
        ValueError: no annotation.
    """
    categories = sorted(data["categories"], key=lambda c: c["id"])
    index = {c["id"]: k for k, c in enumerate(categories)}
    per_image: dict = {}
    for position, annotation in enumerate(data["annotations"]):
        if position not in skip and not annotation.get("ignore"):
            entry = {"category_id": index[annotation["category_id"]]}
            per_image.setdefault(annotation["image_id"], []).append(entry)
    if not per_image:
        raise ValueError(f"{path}: no annotation; the first file must be the training set")
    groups = [c.get("frequency") for c in categories]
    return ClassCounts.from_dataset_dicts(
        [{"annotations": a} for a in per_image.values()],
        len(categories),
        [category_name(c) for c in categories],
        groups if all(g in GROUPS for g in groups) else None,
    )


def compare_counts(categories: list[dict], counts: ClassCounts) -> list[str]:
    """Classes whose entry in the file is not what the annotations show."""
    found = counts.image_count.tolist()
    rows = list(zip(sorted(categories, key=lambda c: c["id"]), found, strict=True))
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


def same_categories(first: dict, other: dict, names: tuple[str, str]) -> None:
    """Check that two files number the same classes alike.

    Raises:
        ValueError: naming the first categories that differ.
    """
    ours, theirs = ({c["id"]: category_name(c) for c in d["categories"]} for d in (first, other))
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
        data, skip, said = load(path, args.images)
        lines += said
        if first is None:
            first, counts = data, count(data, skip, path)
            lines += compare_counts(data["categories"], counts)
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
