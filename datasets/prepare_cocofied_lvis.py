#!/usr/bin/env python3
r"""Turns an LVIS file into one with the 80 classes of COCO, for models that were trained on COCO.

    prepare_cocofied_lvis.py lvis/lvis_v1_train.json lvis/lvis_v1_train_cocofied.json
    prepare_cocofied_lvis.py lvis/lvis_v1_val.json lvis/lvis_v1_val_cocofied.json \\
        --train lvis/lvis_v1_train_cocofied.json

Classes are matched by their WordNet synset (coco_synsets.json, which may be edited) and get COCO's
ids. All images stay. Image-level labels are translated with the classes, so the result keeps
LVIS's rules: where an image does not say whether it shows a class, nothing is claimed.
image_count and frequency are counted on the training file; --train gives them to a validation file.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from d2_balance.data.columns import IMAGE_LABEL_KEYS, check_structure
from d2_balance.data.preparing import (
    add_output,
    counts_of_training,
    run_script,
    with_counts,
)
from d2_balance.utils.files import read_json, write_json

SYNSETS = Path(__file__).with_name("coco_synsets.json")


def coco_classes(path: Path) -> dict[str, dict]:
    """Category of COCO (id, name) by synset.

    Raises:
        ValueError: a file of another form, or an id or a synset that comes twice.
    """
    rows = read_json(str(path))
    fields = {"synset", "id", "name"}
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and fields <= set(r) for r in rows
    ):
        raise ValueError(f"{path}: must be a list of objects with synset, id and name")
    for field in ("synset", "id"):
        twice = [value for value, n in Counter(r[field] for r in rows).items() if n > 1]
        if twice:
            raise ValueError(f"{path}: {field} {twice[0]!r} comes twice; each class stands once")
    return {r["synset"]: {"id": r["id"], "name": r["name"]} for r in rows}


def convert(args: argparse.Namespace) -> str:
    """Write the file with COCO's classes; returns what was matched."""
    data = read_json(args.lvis)
    check_structure(data, args.lvis)
    if not any("synset" in c for c in data["categories"]):
        raise ValueError(f"{args.lvis}: no category has a 'synset'; this is no LVIS file")
    coco = coco_classes(args.synsets)
    matched = {c["id"]: coco[c["synset"]] for c in data["categories"] if c.get("synset") in coco}
    new_id = {old: category["id"] for old, category in matched.items()}
    images = [image | _labels(image, new_id) for image in data["images"]]
    annotations = [
        a | {"category_id": new_id[a["category_id"]]}
        for a in tqdm(data["annotations"], "translating", delay=2, disable=None)
        if a["category_id"] in new_id
    ]
    categories = sorted(coco.values(), key=lambda c: c["id"])
    if args.train:
        categories = counts_of_training(categories, args.train)
    else:
        shown = {(a["image_id"], a["category_id"]) for a in annotations}
        instances = Counter(a["category_id"] for a in annotations)
        categories = with_counts(categories, Counter(c for _, c in shown), instances)
    result = {"images": images, "annotations": annotations, "categories": categories}
    write_json(args.output, {**data, **result})
    found = {category["id"] for category in matched.values()}
    lacking = [c["name"] for c in categories if c["id"] not in found]
    lines = [
        f"{args.output}: {len(images):,} images, {len(annotations):,} of "
        f"{len(data['annotations']):,} annotations, {len(found)} of {len(coco)} classes matched"
    ]
    return "\n".join(lines + ([f"without counterpart: {', '.join(lacking)}"] if lacking else []))


def _labels(image: dict, new_id: dict[int, int]) -> dict[str, list[int]]:
    return {
        key: [new_id[c] for c in image[key] if c in new_id]
        for key in IMAGE_LABEL_KEYS
        if key in image
    }


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lvis", metavar="LVIS", help="annotation file of LVIS v0.5 or v1")
    add_output(parser)
    parser.add_argument("--train", help="prepared training file, whose counts OUT takes")
    parser.add_argument("--synsets", type=Path, default=SYNSETS, help="table of COCO's synsets")
    return run_script(convert, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
