#!/usr/bin/env python3
r"""Turns Open Images into one LVIS-style file: boxes, verified image-level labels, class hierarchy.

    prepare_openimages.py train-annotations-bbox.csv train.json --images train \\
        --labels train-annotations-human-imagelabels-boxable.csv \\
        --classes class-descriptions-boxable.csv --hierarchy bbox_labels_600_hierarchy.json
    prepare_openimages.py validation-annotations-bbox.csv val.json --train train.json ...

A box counts for its class and for every class above it. A verified positive label holds for the
classes above, a verified negative one for the classes below (neg_category_ids); positive wins. A
class goes into not_exhaustive_category_ids where the image shows it but has no box of it, or a
box of a group (IsGroupOf), which becomes `ignore` and `iscrowd`. Everything else is unknown.

Images are those of --images that the boxes or the labels name. Their sizes are read, because
the CSV files give boxes as fractions of them. Memory holds one line of boxes at a time.
"""

import argparse
import csv
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

from tqdm import tqdm

from d2_balance.data.catalog.label_hierarchy import LabelHierarchy
from d2_balance.data.checks.images import image_size
from d2_balance.data.preparing import add_output, counts_of_training, run_script, with_counts
from d2_balance.utils.files import atomic_path, read_json

EDGES = ("XMin", "XMax", "YMin", "YMax")
BOX_FIELDS = ("ImageID", "LabelName", *EDGES)
LABEL_FIELDS = ("ImageID", "LabelName", "Confidence")


def read_rows(path: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file with a head.

    Raises:
        ValueError: a file that cannot be read, a column that is missing, or a line that is cut off.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lacking = [field for field in needed if field not in (reader.fieldnames or ())]
            if lacking:
                raise ValueError(f"{path}: lacks the column(s) {', '.join(lacking)}")
            for row in tqdm(reader, f"reading {os.path.basename(path)}", delay=2, disable=None):
                if any(row[field] is None for field in needed):
                    raise ValueError(f"{path}: line {reader.line_num} is cut off; copy it again")
                yield reader.line_num, row
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def read_classes(path: str) -> dict[str, str]:
    """Class name by label, from class-descriptions-boxable.csv, which has no head.

    Raises:
        ValueError: no class, or a label or name that comes twice.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError(f"{path}: every line must be a label and its name, parted by a comma")
    for column, what in ((0, "label"), (1, "name")):
        twice = [value for value, n in Counter(row[column] for row in rows).items() if n > 1]
        if twice:
            raise ValueError(f"{path}: the {what} {twice[0]!r} comes twice; it must be unique")
    return {row[0]: row[1] for row in rows}


def read_labels(path: str, classes: dict[str, str]) -> dict[str, tuple[set[str], set[str]]]:
    """Verified positive and negative labels by image; labels that are no class are left out.

    Raises:
        ValueError: a confidence other than 0 and 1: a machine's guess is not verified.
    """
    found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for line, row in read_rows(path, LABEL_FIELDS):
        if row["Confidence"] not in ("0", "1", "0.0", "1.0"):
            raise ValueError(
                f"{path}: line {line}: Confidence is {row['Confidence']!r}; verified labels have 0 "
                "or 1, so give the file of human-verified labels"
            )
        if row["LabelName"] in classes:
            positive = row["Confidence"].startswith("1")
            found[row["ImageID"]][0 if positive else 1].add(row["LabelName"])
    return found


def box_of(
    row: dict[str, str], size: tuple[int, int], path: str, line: int
) -> tuple[float, float, float, float]:
    """(x, y, width, height) in pixels.

    Raises:
        ValueError: edges outside [0, 1] or in the wrong order.
    """
    try:
        x0, x1, y0, y1 = (float(row[edge]) for edge in EDGES)
    except ValueError:
        x0 = x1 = y0 = y1 = -1.0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        given = ", ".join(f"{edge} {row[edge]}" for edge in EDGES)
        raise ValueError(
            f"{path}: line {line}: image {row['ImageID']}: {given}; edges are fractions of the "
            "image in [0, 1], the smaller one first"
        )
    height, width = size
    return (
        round(x0 * width, 2),
        round(y0 * height, 2),
        round((x1 - x0) * width, 2),
        round((y1 - y0) * height, 2),
    )


class Converter:
    """Boxes to annotations, labels to image-level labels; counts both.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.path, self.directory = args.boxes, args.images
        self.classes = read_classes(args.classes)
        self.category = {label: k for k, label in enumerate(self.classes, start=1)}
        self.hierarchy = LabelHierarchy(read_json(args.hierarchy), args.hierarchy)
        self.labels = read_labels(args.labels, self.classes)
        self.images: list[dict] = []
        self.instances: Counter = Counter()
        self.shown: Counter = Counter()  # images that show a class
        self.annotations = self.groups = 0
        if not os.path.isdir(self.directory):
            raise ValueError(f"--images: {self.directory!r} is no directory")
        names = sorted(os.listdir(self.directory))
        self.files = {os.path.splitext(name)[0]: name for name in names}
        self.missing: list[str] = []

    def write(self, path: str, train: str | None) -> None:
        """Write the file; annotations go out as they are read."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write('{"annotations": [')
            for number, annotation in enumerate(self._annotations()):
                file.write(("," if number else "") + "\n" + json.dumps(annotation))
            self._check_missing()
            categories = [
                {"id": k, "name": self.classes[label], "label": label}
                for label, k in self.category.items()
            ]
            if train:
                categories = counts_of_training(categories, train)
            else:
                categories = with_counts(categories, self.shown, self.instances)
            file.write(f'\n],\n"images": {json.dumps(self.images)},\n')
            file.write(f'"categories": {json.dumps(categories)}}}\n')

    def _annotations(self) -> Iterator[dict]:
        """Annotations of all images; fills `images` on the way."""
        done: set[str] = set()
        rows = read_rows(self.path, BOX_FIELDS)
        for name, group in itertools.groupby(rows, key=lambda item: item[1]["ImageID"]):
            if name in done:
                raise ValueError(
                    f"{self.path}: image {name} comes back after others; sort the file by ImageID"
                )
            done.add(name)
            yield from self._sized(name, list(group))
        for name in sorted(set(self.labels) - done):  # verified, and without any box
            yield from self._sized(name, [])

    def _sized(self, name: str, rows: list[tuple[int, dict[str, str]]]) -> Iterator[dict]:
        if name not in self.files:
            self.missing.append(name)
            return
        size = image_size(os.path.join(self.directory, self.files[name]))
        boxed: dict[tuple, bool] = {}  # (category, box) to whether it is a group
        for line, row in rows:
            if row["LabelName"] not in self.classes:
                raise ValueError(
                    f"{self.path}: line {line}: the label {row['LabelName']!r} is not in the file "
                    "of classes"
                )
            box = box_of(row, size, self.path, line)
            for label in self.hierarchy.ancestors(row["LabelName"]):
                if label in self.category:  # the root is no class
                    boxed[self.category[label], box] = row.get("IsGroupOf") == "1"
        self.images.append(self._image(name, size, boxed))
        for (category, box), group in sorted(boxed.items()):
            self.annotations += 1
            self.groups += group
            self.instances[category] += not group
            annotation = {
                "id": self.annotations,
                "image_id": name,
                "category_id": category,
                "bbox": list(box),
                "area": round(box[2] * box[3], 2),
            }
            yield annotation | ({"iscrowd": 1, "ignore": 1} if group else {})

    def _image(self, name: str, size: tuple[int, int], boxed: dict[tuple, bool]) -> dict:
        """Entry of an image with its image-level labels, and counts the classes it shows."""
        positive, negative = self.hierarchy.expand(*self.labels.get(name, ((), ())))
        positive, negative = (
            {self.category[label] for label in labels if label in self.category}
            for labels in (positive, negative)
        )
        single = {category for (category, _), group in boxed.items() if not group}
        groups = {category for (category, _), group in boxed.items() if group}
        self.shown.update(single)
        return {
            "id": name,
            "file_name": self.files[name],
            "height": size[0],
            "width": size[1],
            "neg_category_ids": sorted(negative - single - groups),
            "not_exhaustive_category_ids": sorted(groups | (positive - single)),
        }

    def _check_missing(self) -> None:
        if not self.images:
            raise ValueError(
                f"none of {len(self.missing):,} images lies in {self.directory}, first "
                f"{', '.join(self.missing[:5])}; give the directory of this part of Open Images"
            )


def convert(args: argparse.Namespace) -> str:
    """Write the LVIS-style file; returns what it holds."""
    converter = Converter(args)
    converter.write(args.output, args.train)
    lines = [
        f"{args.output}: {len(converter.images):,} images, {converter.annotations:,} boxes with "
        f"those of classes above, {converter.groups:,} of them groups, "
        f"{len(converter.classes)} classes"
    ]
    if converter.missing:
        count, names = len(converter.missing), ", ".join(converter.missing[:5])
        lines.append(f"left out: {count:,} images that are not in {args.images}, first {names}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("boxes", metavar="BOXES", help="*-annotations-bbox.csv")
    add_output(parser)
    parser.add_argument("--images", required=True, help="directory of the images, <ImageID>.jpg")
    parser.add_argument("--labels", required=True, help="*-annotations-human-imagelabels*.csv")
    parser.add_argument("--classes", required=True, help="class-descriptions-boxable.csv")
    parser.add_argument("--hierarchy", required=True, help="bbox_labels_600_hierarchy.json")
    parser.add_argument("--train", help="prepared training file, whose counts OUT takes")
    return run_script(convert, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
