"""Merge prediction files of several models, which may know different classes, into one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2_balance.evaluation.merge.ensemble import Ensemble, Member
    from d2_balance.evaluation.sources import Annotations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance ensemble`."""
    parser.add_argument(
        "predictions",
        nargs="*",
        help="prediction files with the classes of --dataset (JSON, result format of COCO, LVIS)",
    )
    parser.add_argument(
        "--expert",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE CLASSES", "MAP"),
        help="a prediction file on the same images with the classes of another dataset (its "
        "name or annotation file), and a class map file; without one classes of equal name or "
        "synset are shared. Only shared classes count. May be given several times",
    )
    parser.add_argument(
        "--dataset", required=True, help="the images and classes: a name or annotation file"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the merged file, new")
    parser.add_argument(
        "--method", default="nms", choices=("nms", "soft-nms", "wbf"), help="default nms"
    )
    parser.add_argument(
        "--iou", type=float, default=0.5, help="more makes two detections the same (default 0.5)"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        default=300,
        help="best detections of an image that are kept (default 300, LVIS's limit; 0: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the merged file and prints what went in; 2 where the user has to change something."""
    try:
        for expert in args.expert:
            if not 2 <= len(expert) <= 3:
                raise ValueError("--expert takes FILE CLASSES, or FILE CLASSES MAP")
        inputs = [(path, None, None) for path in args.predictions]
        inputs += [(*expert, None)[:3] for expert in args.expert]
        merge_files(
            inputs,
            args.dataset,
            args.output,
            method=args.method,
            iou=args.iou,
            max_dets=args.max_dets,
        )
    except (ValueError, FileExistsError) as error:
        print(f"d2-balance ensemble: error: {error}", file=sys.stderr)
        return 2
    return 0


def merge_files(
    inputs: Sequence[tuple[str, str | None, str | None]],
    dataset: str,
    output: str,
    *,
    method: str = "nms",
    iou: float = 0.5,
    max_dets: int = 300,
) -> int:
    """Merge prediction files, and print what each gave and what came out.

    Args:
        inputs: (file, dataset whose classes it has or None for those of `dataset`, class map file
            or None for names and synsets).
        dataset: name or annotation file of the images and of the result's classes.
        output: file to write, atomically; it must be new.
        method, iou, max_dets: see `Ensemble`.

    Returns:
        Number of detections written.

    Raises:
        ValueError: files that do not fit the dataset, an expert without shared classes, or an
            argument out of range.
        FileExistsError: the output is there.
    """
    from d2_balance.evaluation.merge.ensemble import Ensemble
    from d2_balance.evaluation.sources import Annotations

    if os.path.exists(output):
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new file")
    if not inputs:
        raise ValueError("nothing to merge: give prediction files, or --expert")
    truth = Annotations.load(dataset, "--dataset")
    members = [_member(truth, *source) for source in inputs]
    ensemble = Ensemble(members, method, iou, max_dets)
    written = _write(ensemble, len(truth.data["images"]), output)
    print(f"{output}: {written:,} detections on {len(truth.data['images']):,} images, {method}")
    return written


def _member(truth: Annotations, path: str, classes: str | None, map_file: str | None) -> Member:
    from d2_balance.data.catalog.class_map import load_class_map
    from d2_balance.evaluation.columns import read_columns
    from d2_balance.evaluation.merge.ensemble import Member
    from d2_balance.evaluation.sources import Annotations

    images, categories = truth.data["images"], truth.data["categories"]
    ids = [c["id"] for c in categories]
    if classes is None:
        columns = read_columns(path, images, categories, truth.path)
        print(f"{path}: {len(columns):,} detections")
        return Member(columns, None, ids)
    source = Annotations.load(classes, f"classes of {path}").data["categories"]
    found = load_class_map(map_file, source, categories, (classes, truth.name))
    columns = read_columns(path, images, source, truth.path, classes)
    member = Member(columns, found, ids)
    kept = len(member.kept()[0])
    print(f"{path}: {kept:,} of {len(columns):,} detections are of shared classes")
    print(found.report())
    return member


def _write(ensemble: Ensemble, images: int, output: str) -> int:
    from tqdm import tqdm

    from d2_balance.evaluation.columns import DetectionTexts
    from d2_balance.utils.files import atomic_path

    count = 0
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(output))
        texts = [stack.enter_context(DetectionTexts(member.columns)) for member in ensemble.members]
        file = stack.enter_context(open(temporary, "w", encoding="utf-8"))
        file.write("[")
        merged = tqdm(ensemble.merge(images), "merging", images, delay=2, disable=None)
        for found in merged:
            if found:
                # a line for each image
                file.write(("," if count else "") + "\n" + ", ".join(ensemble.texts(found, texts)))
                count += len(found)
        file.write("\n]\n")
    return count
