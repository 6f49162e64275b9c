#!/usr/bin/env python3
"""Time of what is done with annotations, on a file of the size of LVIS v1 train made here.

    python benchmarks/bm_data.py [--images N] [--objects M] [--classes K] [--repeats R]
                                 [--json FILE]

The defaults have the size of LVIS v1 train: 100,000 images, 1.27 million objects with polygons,
1,203 classes. Every measurement runs in a process of its own, so that none finds a warm heap; each
is repeated and the fastest counts. `MEASUREMENTS` lists them: another one is a function and a line.

An epoch of repeat-factor sampling is the factors of all images and the indices of one pass. Masks
are those of image-level labels, for every image once, in batches of 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from d2_balance.utils.files import atomic_path

WIDTH, HEIGHT = 640, 480
LABELS = ("neg_category_ids", "not_exhaustive_category_ids")
BATCH = 16  # images whose masks are made at once


def make_file(path: Path, args: argparse.Namespace) -> None:
    """LVIS-like training file: Zipf's classes, polygons of 4 to 20 points, image-level labels."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, args.classes + 1) ** 1.1
    label = rng.choice(args.classes, args.objects, p=share / share.sum())
    image = np.sort(rng.integers(0, args.images, args.objects))
    size = np.exp(rng.uniform(2.3, 5.0, (args.objects, 2)))
    corner = rng.uniform(0, 1, (args.objects, 2)) * ((WIDTH, HEIGHT) - size)
    points = rng.integers(4, 21, args.objects)
    circles = {n: _circle(n) for n in range(4, 21)}
    categories = [
        {"id": k + 1, "name": f"class_{k + 1}", "synset": f"class_{k + 1}.n.01", "frequency": "f"}
        for k in range(args.classes)
    ]
    with atomic_path(str(path)) as temporary, open(temporary, "w", encoding="utf-8") as out:
        out.write('{"categories": ' + json.dumps(categories) + ', "images": [')
        for n in range(args.images):
            negative = rng.integers(1, args.classes + 1, 8).tolist()
            record = {"id": n + 1, "width": WIDTH, "height": HEIGHT, "neg_category_ids": negative}
            record |= {"not_exhaustive_category_ids": [], "file_name": f"{n + 1:012d}.jpg"}
            out.write(", " * (n > 0) + json.dumps(record))
        out.write('], "annotations": [')
        for n in tqdm(range(args.objects), "making the file", delay=2, disable=None):
            (x, y), (w, h) = corner[n].tolist(), size[n].tolist()
            shape = circles[points[n]] * (w, h) + (x, y)
            record = {
                "id": n + 1,
                "image_id": int(image[n]) + 1,
                "category_id": int(label[n]) + 1,
                "bbox": [round(v, 2) for v in (x, y, w, h)],
                "area": round(w * h, 2),
                "segmentation": [shape.round(2).ravel().tolist()],
            }
            out.write(", " * (n > 0) + json.dumps(record))
        out.write("]}\n")


def _circle(points: int) -> np.ndarray:
    """(points, 2) on a circle that fills the unit square."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return 0.5 + 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def plain_load(path: str) -> float:
    """json.load of the file."""
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    elapsed = time.perf_counter() - start
    del data
    return elapsed


def first_statistics(path: str) -> float:
    """Class statistics of a file that was never counted."""
    from d2_balance.data.annotations import read_annotations

    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2_BALANCE_CACHE"] = directory
        start = time.perf_counter()
        read_annotations(path).class_counts()
        return time.perf_counter() - start


def cached_statistics(path: str) -> float:
    """Class statistics of a file that was counted before, by the same path."""
    from d2_balance.data.annotations import read_annotations

    start = time.perf_counter()
    read_annotations(path).class_counts()
    return time.perf_counter() - start


def moved_statistics(path: str) -> float:
    """Class statistics of a file that was counted under another name: found by its hash."""
    from d2_balance.data.annotations import read_annotations

    link = f"{path}.moved"
    os.link(path, link)  # also changes the ctime, as a copy has another one
    try:
        start = time.perf_counter()
        read_annotations(link).class_counts()
        return time.perf_counter() - start
    finally:
        os.remove(link)


def _records(path: str) -> list[dict]:
    """The images of the file with what samplers and masks read of Detectron2's dicts."""
    from d2_balance.utils.files import read_json

    data = read_json(path)
    records = [
        {"file_name": image["file_name"], "annotations": [], **{key: image[key] for key in LABELS}}
        for image in data["images"]
    ]
    for annotation in data["annotations"]:
        records[annotation["image_id"] - 1]["annotations"].append(
            {"category_id": annotation["category_id"] - 1}
        )
    return records


def _repeat_factors(records: list[dict]):  # -> Tensor; torch is imported where it is measured
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.001)


def repeat_factors(path: str) -> float:
    """Detectron2's factors, which the sampler's start needs once."""
    records = _records(path)
    start = time.perf_counter()
    _repeat_factors(records)
    return time.perf_counter() - start


def repeat_factor_epoch(path: str) -> float:
    """Indices of one epoch of repeat-factor sampling."""
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    factors = _repeat_factors(_records(path))
    indices = iter(RepeatFactorTrainingSampler(factors, seed=0))
    start = time.perf_counter()
    for _ in range(int(factors.sum())):
        next(indices)
    return time.perf_counter() - start


def class_aware_epoch(path: str) -> float:
    """Start of class-aware sampling, and as many indices as there are images."""
    from d2_balance.data.samplers import ClassAwareTrainingSampler

    records = _records(path)
    start = time.perf_counter()
    indices = iter(ClassAwareTrainingSampler(records, seed=0))
    for _ in range(len(records)):
        next(indices)
    return time.perf_counter() - start


def image_level_masks(path: str) -> float:
    """Masks of all images from their image-level labels and objects."""
    import torch
    from detectron2.structures import Instances

    from d2_balance.data.image_labels import ImageLabels

    records = _records(path)
    classes = 0
    for record in records:
        labels = [annotation["category_id"] for annotation in record["annotations"]]
        classes = max(classes, *record["neg_category_ids"], *(label + 1 for label in labels))
        record["instances"] = Instances((HEIGHT, WIDTH))
        record["instances"].gt_classes = torch.tensor(labels, dtype=torch.int64)
    labels = ImageLabels((), classes)
    start = time.perf_counter()
    for first in range(0, len(records), BATCH):
        labels.verified(records[first : first + BATCH], "cpu")
    return time.perf_counter() - start


MEASUREMENTS: dict[str, Callable[[str], float]] = {
    "json.load": plain_load,
    "class statistics, first call": first_statistics,
    "class statistics, same file again": cached_statistics,
    "class statistics, file under another name": moved_statistics,
    "repeat factors": repeat_factors,
    "repeat-factor epoch": repeat_factor_epoch,
    "class-aware epoch": class_aware_epoch,
    "image-level masks": image_level_masks,
}


def measure(name: str, path: Path, directory: str, repeats: int) -> float:
    """Seconds of one measurement, the fastest of `repeats` processes."""
    environment = {**os.environ, "D2_BALANCE_CACHE": directory}
    command = [sys.executable, __file__, "--measure", name, "--file", str(path)]
    runs = []
    for _ in range(repeats):
        out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        runs.append(float(out.stdout.split()[-1]))
    return min(runs)


def main() -> None:
    """Prints one table of seconds and ratios to json.load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--objects", type=int, default=1_270_000)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--file", help="made there if it does not exist, and kept")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(MEASUREMENTS[args.measure](args.file))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(args.file or os.path.join(directory, "train.json"))
        if not path.exists():
            make_file(path, args)
        from d2_balance.data.annotations import read_annotations

        cache = os.path.join(directory, "cache")
        os.environ["D2_BALANCE_CACHE"] = cache
        time.sleep(2.1)  # a file of this age is known by its times, see `file_state`
        read_annotations(
            str(path)
        ).class_counts()  # fills the cache for the measurements that need it
        seconds = {name: measure(name, path, cache, args.repeats) for name in MEASUREMENTS}
        size = path.stat().st_size / 1e6
    base = seconds["json.load"]
    rows = [[name, f"{value:.3f}", f"{value / base:.3f}"] for name, value in seconds.items()]
    machine = {"machine": platform.machine(), "python": platform.python_version(), "MB": size}
    print(f"{machine['machine']}, Python {machine['python']}, file of {size:.0f} MB")
    print(tabulate(rows, ["what", "seconds", "times json.load"], tablefmt="github"))
    if args.json:
        with atomic_path(args.json) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"about": machine, "seconds": seconds}, file, indent=1)


if __name__ == "__main__":
    main()
