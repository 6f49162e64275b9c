"""YOLO layouts as COCO-style files: one per split of a `data.yaml`.

A split is a directory of images, a text file that lists them, or a list of both. Labels lie under
`labels/` where images lie under `images/`, else beside them; a line is a class and a box (centre,
width, height) or a polygon, in fractions of the image. An image without labels is one without
objects. Source: Ultralytics, documentation of detection and segmentation datasets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from d2_balance.utils.files import check_new, read_yaml, write_json
from d2_balance.utils.progress import progress

from .checks.images import image_size

SPLITS = ("train", "val", "test")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_BORDER = 0.01  # fractions that tools round past the border


def convert_yolo(data_yaml: str, output: str, overwrite: bool = False) -> dict[str, str]:
    """Write COCO-style files for the splits of a YOLO dataset.

    Class k of `names` becomes category k + 1. Polygons become masks, boxes have none.

    Args:
        data_yaml: the file of the dataset.
        output: directory for `train.json`, `val.json` and `test.json`, as far as there are splits.
        overwrite: True replaces files.

    Returns:
        The files by split. Names of images in them are relative to `image_root(data_yaml)`.

    Raises:
        ValueError: naming the file and line, if a class is unknown, a number is missing or outside
            the image, or an image cannot be read.
        FileExistsError: a file is there already.
    """
    content = _read(data_yaml)
    names = _class_names(content, data_yaml)
    root = image_root(data_yaml)
    paths = {s: os.path.join(output, f"{s}.json") for s in SPLITS if content.get(s)}
    if not paths:
        raise ValueError(f"{data_yaml}: none of {', '.join(SPLITS)} names images")
    check_new(list(paths.values()), overwrite)
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    points = "kpt_shape" in content  # a pose: the box, and then its points
    for split, path in paths.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        files = list(_images(content[split], root, f"{data_yaml}: {split}"))
        for n, file in enumerate(progress(files, f"reading {split}"), start=1):
            height, width = image_size(file)
            name = os.path.relpath(file, root)
            name = file if name.startswith("..") else name
            images.append({"id": n, "file_name": name, "height": height, "width": width})
            for label in _labels(file, len(names), points):
                number = {"id": len(annotations) + 1, "image_id": n}
                annotations.append(number | _annotation(label, width, height))
        data = {"images": images, "annotations": annotations, "categories": categories}
        write_json(path, data)
    return paths


def image_root(data_yaml: str) -> str:
    """Directory that paths of a `data.yaml` are relative to: its `path`, else where it lies."""
    beside = os.path.dirname(os.path.abspath(data_yaml))
    path = os.path.join(beside, _read(data_yaml).get("path") or "")
    return os.path.normpath(path) if os.path.isdir(path) else beside


def _read(data_yaml: str) -> dict[str, Any]:
    content = read_yaml(data_yaml)
    if not isinstance(content, dict):
        raise ValueError(f"{data_yaml}: must be a mapping with 'names', 'train' and 'val'")
    return content


def _class_names(content: dict[str, Any], data_yaml: str) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(
            f"{data_yaml}: 'names' must be a list of class names, or a mapping from 0, 1, ... to "
            "them"
        )
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(
            f"{data_yaml}: the class name {twice!r} occurs twice; names must be unique"
        )
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"{data_yaml}: nc is {content['nc']!r}, but there are {len(names)} names")
    return names


def _images(split: str | Sequence[str], root: str, where: str) -> Iterator[str]:
    """Paths of the images of a split, in the order of their names."""
    if not isinstance(split, str):
        for part in split:
            yield from _images(part, root, where)
        return
    # Roboflow writes ../train/images for a directory beside the file
    places = [os.path.join(root, split), os.path.join(root, split.removeprefix("../"))]
    place = next((p for p in map(os.path.normpath, places) if os.path.exists(p)), None)
    if place is None:
        raise ValueError(f"{where}: {split!r} does not exist below {root}")
    if os.path.isdir(place):
        found = [
            os.path.join(directory, name)
            for directory, _, names in os.walk(place)
            for name in names
            if name.lower().endswith(_IMAGES)
        ]
        if not found:
            raise ValueError(f"{where}: {place} has no image")
        yield from sorted(found)
        return
    with open(place, encoding="utf-8") as file:
        for line in file.read().split("\n"):
            if line.strip():
                yield os.path.normpath(os.path.join(os.path.dirname(place), line.strip()))


def _labels(image: str, classes: int, points: bool) -> Iterator[tuple[int, list[float]]]:
    """Class index, and a box (4) or a polygon (6 or more), of each line of an image's labels."""
    head, separator, tail = image.rpartition(f"{os.sep}images{os.sep}")
    path = f"{head}{os.sep}labels{os.sep}{tail}" if separator else image
    path = os.path.splitext(path)[0] + ".txt"
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file.read().split("\n"), start=1):
            if not line.strip():
                continue
            try:
                label, *values = map(float, line.split())
            except ValueError:
                raise ValueError(f"{path}: line {number}: {line!r} must be numbers") from None
            if not (label.is_integer() and 0 <= label < classes):
                raise ValueError(
                    f"{path}: line {number}: the class is {label:g}; it must be an integer in "
                    f"[0, {classes}), a place in 'names'"
                )
            if points or len(values) == 5:  # a box, and its points or its confidence
                values = values[:4]
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise ValueError(
                    f"{path}: line {number}: {len(values)} numbers after the class; must be 4 (a "
                    "box) or at least 3 pairs (a polygon)"
                )
            if not all(-_BORDER <= v <= 1 + _BORDER for v in values):
                raise ValueError(
                    f"{path}: line {number}: {line!r} must be fractions of the image, in [0, 1]"
                )
            yield int(label), values


def _annotation(label: tuple[int, list[float]], width: int, height: int) -> dict[str, Any]:
    index, values = label
    found: dict[str, Any] = {"category_id": index + 1, "iscrowd": 0}
    if len(values) == 4:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return found | {"bbox": box, "area": box[2] * box[3]}
    xs, ys = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    polygon = [v for point in zip(xs, ys, strict=True) for v in point]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    turns = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    area = abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in turns)) / 2
    return found | {"bbox": box, "area": area, "segmentation": [polygon]}
