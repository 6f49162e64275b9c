"""Prints which classes of one dataset are classes of another, and writes the map for editing.

SOURCE and TARGET are annotation files or names of registered datasets. Without --map classes go
by name and synset; --output writes a line for each class of SOURCE, null where nothing matched.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance classmap`."""
    parser.add_argument("source", help="dataset, or annotation file, whose classes are mapped")
    parser.add_argument("target", help="dataset, or annotation file, with the classes to map to")
    parser.add_argument("--map", metavar="FILE", help="class map to check, YAML or JSON")
    parser.add_argument("--output", metavar="FILE", help="YAML file to write, which must be new")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from d2_balance.data.class_map import load_class_map, write_class_map

    if args.map and args.output:
        raise ValueError("--map checks a file and --output writes one; give one of them")
    source, target = categories(args.source), categories(args.target)
    class_map = load_class_map(args.map, source, target, (args.source, args.target))
    if args.output:
        write_class_map(args.output, source, target)
    for title, names in (
        ("matched", [a if a == b else f"{a} -> {b}" for a, b in class_map.matched]),
        ("left out by null", class_map.left_out),
        (f"only in {args.source}", class_map.unmatched),
        (f"only in {args.target}", class_map.uncovered),
    ):
        if names:
            print(f"{len(names)} {title}:")
            print("\n".join(f"  {name}" for name in names))
    if args.output:
        print(f"Written to {args.output}; lines with null may be edited, or left.")
    return 0


def categories(name: str) -> list[dict[str, Any]]:
    """Categories of an annotation file or of a registered dataset.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    if os.path.isfile(name):
        from d2_balance.data.columns import check_categories
        from d2_balance.utils.files import read_json

        data = read_json(name)
        listed = data.get("categories") if isinstance(data, dict) else None
        if not isinstance(listed, list):
            raise ValueError(f"{name}: the list 'categories' is missing")
        return check_categories(listed, name)
    from detectron2.data import DatasetCatalog

    from d2_balance.data.catalog.metadata import target_categories

    if name in DatasetCatalog:
        return target_categories(name)
    raise ValueError(f"{name!r} is neither a file nor a registered dataset")
