"""Make COCO-style files and smaller images from hdBPMN, photographs of hand-drawn process diagrams.

    git clone https://github.com/dwslab/hdBPMN
    prepare_hdbpmn.py hdBPMN datasets/hdbpmn

The shapes of the BPMN files become boxes of 22 classes; events carry their kind (message, timer,
terminate). The splits are the authors', by writer. A fifth of the training images, whole writers,
is split off as well, so that settings can be chosen without a look at the authors' val and test:

    train, val, test     the authors' splits
    fit, select          train without, and only, every fifth writer
    valtest              val and test together, for a final report

Images and annotations are by Schaefer et al. (Sketch2BPMN, CAiSE 2021; Sketch2Process, IEEE TSE
2022), licensed CC BY 4.0: name them where you show an image.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from d2_balance.data.preparing import run_script, with_counts
from d2_balance.utils.files import atomic_path, write_json

SHAPE = "{http://www.omg.org/spec/BPMN/20100524/DI}BPMNShape"
BOUNDS = "{http://www.omg.org/spec/DD/20100524/DC}Bounds"
EVENT = "EventDefinition"
SPLITS = ("train", "val", "test")
CUTS = (40, 120)  # training images that divide rare, common and frequent classes
SIZE = re.compile(r'"backgroundSize":\s*(\d+)')
INFO = {"description": "hdBPMN, shapes", "license": "CC BY 4.0", "source": "dwslab/hdBPMN"}


def read_writers(root: str) -> dict[str, str]:
    """Return the split of each writer.

    Raises:
        ValueError: the file is missing or names another split.
    """
    path = os.path.join(root, "data", "writer_split.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = {row["writer"]: row["split"] for row in csv.DictReader(file)}
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: must be the writer_split.csv of hdBPMN ({error})") from error
    for writer, split in rows.items():
        if split not in SPLITS:
            raise ValueError(
                f"{path}: {writer} has the split {split!r}; must be train, val or test"
            )
    return rows


def read_shapes(path: str) -> tuple[float, list[tuple[str, list[float]]]]:
    """Return the width of an image in the units of a BPMN file, and its shapes.

    Returns:
        Width of the image in the units of the boxes, and class and [x, y, width, height] of each
        shape.

    Raises:
        ValueError: the file is no BPMN file, or misses the size or an element.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    size = SIZE.search(text)
    if size is None:
        raise ValueError(f"{path}: the comment with backgroundSize is missing")
    try:
        root = ElementTree.fromstring(text.encode("utf-8"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: {error}") from error
    elements = {e.get("id"): e for e in root.iter() if e.get("id")}
    shapes = []
    for shape in root.iter(SHAPE):
        element, bounds = elements.get(shape.get("bpmnElement")), shape.find(BOUNDS)
        if element is None or bounds is None:
            raise ValueError(f"{path}: shape {shape.get('id')} has no element or no bounds")
        name = _local(element)
        events = [_local(e).removesuffix(EVENT) for e in element if _local(e).endswith(EVENT)]
        name += f"_{events[0]}" if events else ""
        box = [float(bounds.get(key)) for key in ("x", "y", "width", "height")]
        shapes.append((name, box))
    return float(size.group(1)), shapes


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def clipped(box: list[float], scale: float, width: int, height: int) -> list[float] | None:
    """Return a box in pixels, cut off at the border of the image; None if nothing is left."""
    x0, y0 = max(box[0] * scale, 0), max(box[1] * scale, 0)
    x1 = min((box[0] + box[2]) * scale, width)
    y1 = min((box[1] + box[3]) * scale, height)
    if x1 <= x0 or y1 <= y0:
        return None
    return [round(v, 1) for v in (x0, y0, x1 - x0, y1 - y0)]


def save_image(source: str, target: str, size: int) -> tuple[int, int]:
    """Save an image upright, with a longer side of `size` pixels at most; return its new size."""
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((size, size), Image.Resampling.LANCZOS)
    with atomic_path(target) as temporary:
        upright.save(temporary, format="JPEG", quality=90)
    return upright.size


def convert(args: argparse.Namespace) -> str:
    """Write images and annotation files; return a line for each file."""
    writers = read_writers(args.root)
    images: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    shapes: dict[str, list[tuple[str, list[float]]]] = {}
    for source in tqdm(_sources(args.root), "resizing", delay=2, disable=None):
        stem = os.path.splitext(os.path.basename(source))[0]
        split = writers.get(stem.partition("_")[2])
        if split is None:
            raise ValueError(f"{source}: its writer is not in writer_split.csv")
        annotation = os.path.join(args.root, "data", "annotations", stem[:4], f"{stem}.bpmn")
        if not os.path.exists(annotation):
            continue  # some images of the repository were never annotated
        target = os.path.join(args.output, "images", split, f"{stem}.jpg")
        width, height = save_image(source, target, args.size)
        units, found = read_shapes(annotation)
        scale = width / units
        boxes = [(name, clipped(box, scale, width, height)) for name, box in found]
        shapes[stem] = [(name, box) for name, box in boxes if box is not None]
        images[split].append({"file_name": f"{split}/{stem}.jpg", "width": width, "height": height})
    return _write_all(images, shapes, args.output)


def _sources(root: str) -> list[str]:
    """Return the images, by name.

    Raises:
        ValueError: the directory holds none.
    """
    directory = os.path.join(root, "data", "images")
    found = [
        os.path.join(place, name)
        for place, _, names in os.walk(directory)
        for name in names
        if name.lower().endswith((".jpg", ".jpeg", ".png"))
    ]
    if not found:
        raise ValueError(f"{directory} holds no image; ROOT must be a clone of dwslab/hdBPMN")
    return sorted(found, key=os.path.basename)


def _write_all(
    images: dict[str, list[dict[str, Any]]],
    shapes: dict[str, list[tuple[str, list[float]]]],
    output: str,
) -> str:
    writers = sorted({_writer(image) for image in images["train"]})
    chosen = set(writers[::5])
    sets = {
        **images,
        "valtest": images["val"] + images["test"],
        "fit": [i for i in images["train"] if _writer(i) not in chosen],
        "select": [i for i in images["train"] if _writer(i) in chosen],
    }
    counted: list[dict[str, Any]] = []  # of the training set before
    names = sorted({name for found in shapes.values() for name, _ in found})
    category = {name: k for k, name in enumerate(names, start=1)}
    lines = []
    for split, entries in sets.items():
        entries = [{"id": k, **image} for k, image in enumerate(entries, start=1)]
        annotations = [
            {
                "image_id": image["id"],
                "category_id": category[name],
                "bbox": box,
                "area": round(box[2] * box[3], 1),
                "iscrowd": 0,
            }
            for image in entries
            for name, box in shapes[_stem(image)]
        ]
        numbered = [{"id": k, **a} for k, a in enumerate(annotations, start=1)]
        shown = Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in numbered})
        objects = Counter(a["category_id"] for a in numbered)
        if split in ("train", "fit"):  # the sets behind it are evaluated with its frequencies
            counted = with_counts(
                [{"id": k, "name": n} for n, k in category.items()], shown, objects, CUTS
            )
        path = os.path.join(output, f"instances_{split}.json")
        data = {"info": INFO, "images": entries, "annotations": numbered, "categories": counted}
        write_json(path, data)
        lines.append(f"{path}: {len(entries):,} images, {len(numbered):,} boxes")
    return "\n".join(lines)


def _stem(image: dict[str, Any]) -> str:
    return os.path.splitext(os.path.basename(image["file_name"]))[0]


def _writer(image: dict[str, Any]) -> str:
    return _stem(image).partition("_")[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="ROOT", help="clone of dwslab/hdBPMN")
    parser.add_argument("output", metavar="OUT", help="directory to write")
    parser.add_argument("--size", type=int, default=512, help="longer side in pixels (default 512)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    sys.exit(run_script(convert, parser.parse_args()))
