"""Write annotation files that everything here reads: from YOLO's data.yaml, or a part of a file.

`convert data.yaml --output DIRECTORY` writes a COCO-style file per split. `convert FILE.json
--ids LIST --output NEW.json` keeps the images of a list of ids (minival of LVIS v1, for example)
and their annotations; counts and frequencies of the classes stay those of the file.
"""

from __future__ import annotations

import argparse

from .arguments import add_overwrite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("source", help="data.yaml of a YOLO dataset, or an annotation file")
    parser.add_argument("--output", required=True, help="directory for data.yaml, else a new file")
    parser.add_argument("--ids", metavar="FILE", help="image ids to keep: a JSON list, or lines")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files, and print what is in them."""
    from d2_balance.data.annotations import read_annotations
    from d2_balance.data.preparing import cut_images, read_ids
    from d2_balance.data.yolo import convert_yolo, image_root

    if args.source.endswith((".yaml", ".yml")):
        if args.ids:
            raise ValueError("--ids is for annotation files, not for data.yaml")
        paths = convert_yolo(args.source, args.output, args.overwrite)
        root = image_root(args.source)
    elif args.ids:
        paths = {"": args.output}
        cut_images(args.source, read_ids(args.ids), args.output, args.overwrite)
        root = "IMAGES"
    else:
        raise ValueError(f"{args.source}: must be a data.yaml, or --ids must name a list of ids")
    for split, path in paths.items():
        found = read_annotations(path)
        print(
            f"{path}: {len(found.image_id):,} images, {len(found.id):,} objects, "
            f"{found.num_classes:,} classes"
        )
        if found.report:
            print(found.report.describe())
        print(f"  DATASETS.REGISTER: [[{split or 'NAME'}, {path}, {root}]]")
    return 0
