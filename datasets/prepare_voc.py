#!/usr/bin/env python3
"""Turns annotations in the XML format of Pascal VOC into one COCO-style file.

    prepare_voc.py ROOT OUT [--list ROOT/ImageSets/Main/train.txt] [--classes FILE]

ROOT holds Annotations/*.xml and JPEGImages/. Boxes of VOC count pixels from 1 and include the last
one, so [xmin, xmax] becomes x = xmin - 1 and width = xmax - xmin + 1. Objects marked `difficult`
become crowds: they are neither trained on nor counted, as in VOC's own evaluation. All files of a
dataset need the same classes, so give the same --classes (one name a line) for each; without it
the names found in ROOT/Annotations, sorted, whatever --list selects.
"""

import argparse
import os
import sys
import xml.etree.ElementTree as ElementTree

from tqdm import tqdm

from d2_balance.data.checks.images import image_size
from d2_balance.data.preparing import add_output, run_script
from d2_balance.utils.files import write_json

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def parse(path: str) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
        ValueError: a file that is missing or no XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML: {error}; the file may be cut off") from error


def number(element: ElementTree.Element, field: str, path: str) -> float:
    """A numeric child of an element.

    Raises:
        ValueError: naming file and field, where it is missing or no finite number.
    """
    text = element.findtext(field)
    try:
        value = float(text)
        if abs(value) < float("inf"):
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{path}: <{field}> is {text!r}; it must be a number of pixels")


def read_objects(root: ElementTree.Element, path: str) -> list[tuple[str, list[float], bool]]:
    """(class name, box x, y, width, height, difficult) of every object.

    Raises:
        ValueError: an object without name or box, or with a box of no area.
    """
    found = []
    for entry in root.iterfind("object"):
        name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        if not name or box is None:
            raise ValueError(f"{path}: object {len(found) + 1} lacks <name> or <bndbox>")
        x0, y0, x1, y1 = (number(box, corner, path) for corner in CORNERS)
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{path}: object {len(found) + 1} ({name}): xmax and ymax must not be below xmin "
                f"and ymin, but the box is {[x0, y0, x1, y1]}"
            )
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        found.append((name, [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1], difficult))
    return found


def read_size(root: ElementTree.Element, path: str, image: str) -> tuple[int, int]:
    """(height, width) of an image, which must agree with what the XML says, if it says it."""
    size = image_size(image)
    element = root.find("size")
    if element is not None:
        written = tuple(int(number(element, side, path)) for side in ("height", "width"))
        if written not in (size, (0, 0)):  # some tools write zeros
            raise ValueError(
                f"{path}: <size> is {written[1]} x {written[0]} pixels, but {image} has "
                f"{size[1]} x {size[0]}; the boxes were drawn on another image"
            )
    return size


def read_lines(path: str) -> list[str]:
    """Lines that are not empty, without spaces around them.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def stems_of(args: argparse.Namespace, directory: str) -> list[str]:
    """Names of the XML files to convert, without the ending."""
    if args.list:
        # lists of single classes have a second word
        return [line.split()[0] for line in read_lines(args.list)]
    if not os.path.isdir(directory):
        raise ValueError(
            f"{directory} is no directory; ROOT must hold Annotations/ and JPEGImages/"
        )
    return sorted(f[: -len(".xml")] for f in os.listdir(directory) if f.endswith(".xml"))


def classes_of(args: argparse.Namespace, directory: str) -> list[str]:
    """Class names in the order of their ids.

    Raises:
        ValueError: none, or a name that comes twice.
    """
    if args.classes:
        names = read_lines(args.classes)
    else:
        files = sorted(f for f in os.listdir(directory) if f.endswith(".xml"))
        every = tqdm(files, "reading class names", delay=2, disable=None)
        paths = (os.path.join(directory, file) for file in every)
        names = sorted({name for path in paths for name, *_ in read_objects(parse(path), path)})
    where = args.classes or directory
    if not names:
        raise ValueError(f"{where}: no class name found; at least one is needed")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: class name(s) {', '.join(twice)} come twice; list each once")
    return names


def image_of(root: ElementTree.Element, stem: str, directory: str) -> str:
    """Name of the image: <filename>, or that of the XML file where tools wrote another one."""
    written = (root.findtext("filename") or "").strip()
    beside = [f"{stem}{ending}" for ending in (".jpg", ".jpeg", ".png", ".JPG")]
    for name in (written, *beside):
        if name and os.path.isfile(os.path.join(directory, name)):
            return name
    return written or beside[0]


def convert(args: argparse.Namespace) -> str:
    """Write the COCO-style file; returns one line about it."""
    directory = os.path.join(args.root, "Annotations")
    image_directory = os.path.join(args.root, args.images)
    stems = stems_of(args, directory)
    names = classes_of(args, directory)
    class_id = {name: k for k, name in enumerate(names, start=1)}
    images, annotations = [], []
    for image_id, stem in enumerate(tqdm(stems, "reading XML", delay=2, disable=None), start=1):
        path = os.path.join(directory, f"{stem}.xml")
        root = parse(path)
        file_name = image_of(root, stem, image_directory)
        height, width = read_size(root, path, os.path.join(image_directory, file_name))
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for name, box, difficult in read_objects(root, path):
            if name not in class_id:
                raise ValueError(
                    f"{path}: the class {name!r} is not in {args.classes}; add it there"
                )
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": class_id[name],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(difficult),
            }
            annotations.append(annotation | ({"ignore": 1} if difficult else {}))
    categories = [{"id": k, "name": name} for name, k in class_id.items()]
    data = {"images": images, "annotations": annotations, "categories": categories}
    write_json(args.output, data)
    counts = f"{len(images):,} images, {len(annotations):,} objects, {len(names)} classes"
    return f"{args.output}: {counts}"


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", metavar="ROOT", help="directory with Annotations/ and JPEGImages/")
    add_output(parser)
    parser.add_argument("--list", help="file with the names to convert, as in ImageSets/Main")
    parser.add_argument("--classes", help="file with the class names, one a line")
    parser.add_argument("--images", default="JPEGImages", help="directory of the images in ROOT")
    return run_script(convert, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
