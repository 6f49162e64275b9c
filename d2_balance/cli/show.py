"""Draw the images of a dataset with their objects, and with detections if a file of them is
given: rare classes first, coloured by frequency group, as PNG files in a directory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2_balance.evaluation.draw import Classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance show`."""
    parser.add_argument("dataset", help="a registered dataset, or an annotation file")
    parser.add_argument(
        "--images", help="directory of the images, where an annotation file is given"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="JSON list of detections to draw beside the objects"
    )
    parser.add_argument("--output", metavar="DIRECTORY", required=True, help="where the files go")
    parser.add_argument("--count", type=int, default=20, help="images to draw (default 20)")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="only images that show one of these classes"
    )
    parser.add_argument(
        "--min-score", type=float, default=0.3, help="detections to draw (default 0.3)"
    )
    parser.add_argument(
        "--train",
        help="training set whose images per class say which are rare: a registered name or "
        "annotation file; without it, what DATASET says, or its own counts",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the files and prints their names; 2 where the user has to change something."""
    try:
        for path in draw_all(args):
            print(path)
    except (ValueError, FileExistsError) as error:
        print(f"d2-balance show: error: {error}", file=sys.stderr)
        return 2
    return 0


def draw_all(args: argparse.Namespace) -> list[str]:
    """Draw the images that the command line asks for.

    Returns:
        Paths of the PNG files.

    Raises:
        ValueError: a dataset, a class, a number or a file that cannot be used.
        FileExistsError: a file of that name is there already.
    """
    from tqdm import tqdm

    from d2_balance.data.checks.images import check_image_sizes
    from d2_balance.evaluation.draw import draw, rarest_first
    from d2_balance.evaluation.predictions import read_predictions
    from d2_balance.evaluation.sources import Annotations
    from d2_balance.utils.files import atomic_path

    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if not 0 <= args.min_score <= 1:
        raise ValueError(f"--min-score is {args.min_score}; it must be in [0, 1]")
    name, dataset_dicts = _load(args.dataset, args.images)
    classes = _classes(name, dataset_dicts, args.train)
    wanted = _of_classes(dataset_dicts, classes, args.classes)
    chosen = rarest_first(wanted, classes.image_count, args.count)
    paths = [_path(args.output, n, record) for n, record in enumerate(chosen, start=1)]
    for path in paths:
        if os.path.exists(path):
            raise FileExistsError(
                f"{path} exists, and show replaces no file; give another --output"
            )
    check_image_sizes(chosen, args.dataset)
    found = None
    if args.predictions:
        truth = Annotations.load(args.dataset, "dataset")
        found = read_predictions(args.predictions, truth.data, truth.path)
    for path, record in zip(tqdm(paths, "drawing", delay=2, disable=None), chosen, strict=True):
        detections = None if found is None else found.get(record["image_id"], [])
        with atomic_path(path) as temporary:
            draw(record, classes, detections, args.min_score).savefig(temporary, format="png")
    return paths


def _load(source: str, images: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Name in the catalogs and records of a registered dataset, or of a file."""
    from detectron2.data import DatasetCatalog

    from d2_balance.data import register_json
    from d2_balance.engine.setup.validate import load_dataset

    if source not in DatasetCatalog and not os.path.isfile(source):
        raise ValueError(
            f"{source!r} is neither a registered dataset nor an annotation file "
            "(`d2-balance doctor` lists what is found)"
        )
    if os.path.isfile(source):
        if not images:
            raise ValueError(f"{source}: --images must name the directory of its images")
        register_json(source, source, images, "--images")
    elif images:
        raise ValueError(f"--images is for annotation files; {source!r} is registered with its own")
    dataset_dicts = load_dataset(source)
    if not isinstance(dataset_dicts, list) or not dataset_dicts:
        raise ValueError(f"{source!r} has no images to draw")
    return source, dataset_dicts


def _classes(name: str, dataset_dicts: Sequence[dict[str, Any]], train: str | None) -> Classes:
    """Names, counts and groups; counts of --train, else the file's, else of the set itself."""
    from detectron2.data import MetadataCatalog

    from d2_balance.data import category_names
    from d2_balance.data.groups import groups_from_counts
    from d2_balance.evaluation.draw import Classes, image_counts
    from d2_balance.evaluation.sources import Annotations

    by_id = category_names(name)
    index = {raw: k for k, raw in enumerate(by_id)}
    metadata = MetadataCatalog.get(name)
    groups = metadata.get("class_group")
    if train:
        given = Annotations.load(train, "--train").image_count()
        counts, groups = [given.get(class_name, 0) for class_name in by_id.values()], None
    elif metadata.get("class_image_count"):
        known = {c["id"]: c["image_count"] for c in metadata.class_image_count}
        counts = [known.get(raw, 0) for raw in by_id]
    else:
        counts = image_counts(dataset_dicts, len(by_id))
    return Classes(list(by_id.values()), counts, groups or groups_from_counts(counts), index)


def _of_classes(
    dataset_dicts: Sequence[dict[str, Any]], classes: Classes, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Records that show one of the classes; all where none is named."""
    if not names:
        return list(dataset_dicts)
    unknown = [n for n in names if n not in classes.names]
    if unknown:
        from d2_balance.utils.names import closest

        hint = closest(unknown[0], classes.names)
        raise ValueError(f"--classes: the dataset has no class {unknown[0]!r}; {hint}")
    wanted = {list(classes.names).index(n) for n in names}
    found = [
        record
        for record in dataset_dicts
        if any(a["category_id"] in wanted for a in record.get("annotations", ()))
    ]
    if not found:
        raise ValueError(f"--classes: no image shows {', '.join(names)}; name other classes")
    return found


def _path(directory: str, number: int, record: dict[str, Any]) -> str:
    stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
    return os.path.join(directory, f"{number:03d}_{stem}.png")
