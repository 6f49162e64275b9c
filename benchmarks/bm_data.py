#!/usr/bin/env python3
"""Time of what is done with annotations, on a file of the size of LVIS v1 train made here.

    python benchmarks/bm_data.py [--images N] [--objects M] [--classes K] [--repeats R]
                                 [--json FILE]

The defaults have the size of LVIS v1 train: 100,000 images, 1.27 million objects with polygons,
1,203 classes. Every measurement runs in a process of its own, so that none finds a warm heap; each
is repeated and the least counts. `MEASUREMENTS` lists them: another one is a function and a line.

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
from memory import peak_gib
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
    start = time.process_time()
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    elapsed = time.process_time() - start
    del data
    return elapsed


def first_read(path: str) -> float:
    """Columns of a file that was never read: parsed, checked, written to the cache."""
    from d2_balance.data.annotations import read_annotations

    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2_BALANCE_CACHE"] = directory
        start = time.process_time()
        read_annotations(path)
        return time.process_time() - start


def cached_read(path: str) -> float:
    """Columns of a file that was read before, by the same path."""
    from d2_balance.data.annotations import read_annotations

    start = time.process_time()
    read_annotations(path)
    return time.process_time() - start


def moved_read(path: str) -> float:
    """Columns of a file that was read under another name: found by its hash."""
    from d2_balance.data.annotations import read_annotations

    link = f"{path}.moved"
    os.link(path, link)  # also changes the ctime, as a copy has another one
    try:
        start = time.process_time()
        read_annotations(link)
        return time.process_time() - start
    finally:
        os.remove(link)


def cached_counts(path: str) -> float:
    """Class counts and the report of a file that was read before."""
    from d2_balance.data.annotations import read_annotations

    start = time.process_time()
    found = read_annotations(path)
    found.class_counts()
    assert not found.report.total
    return time.process_time() - start


def stock_records(path: str) -> float:
    """Detectron2's own start: load_lvis_json's kin, filter, and the list that workers share."""
    from detectron2.data import DatasetCatalog, DatasetFromList, get_detection_dataset_dicts
    from detectron2.data.datasets import load_coco_json

    start = time.process_time()
    DatasetCatalog.register("stock", lambda: load_coco_json(path, ".", "stock"))
    records = DatasetFromList(get_detection_dataset_dicts("stock"), copy=False)
    assert records[0]["annotations"]
    return time.process_time() - start


def lazy_records(path: str) -> tuple[float, object]:
    """CPU seconds of our training set's start (filter, factors, 16 records), and the records."""
    import numpy as np

    from d2_balance.data import records as module
    from d2_balance.data.annotations import read_annotations
    from d2_balance.data.samplers import repeat_factors

    # no images lie there; one listing of a directory is not what is measured
    module.find_images = lambda source, _: [name.decode() for name in source.file_name]
    start = time.process_time()
    records = module.file_records(read_annotations(path), ".")
    records = module.subset(records, np.flatnonzero(records.objects.with_objects()))
    repeat_factors(records, 0.001)
    for index in range(16):
        assert records[index]["annotations"]
    return time.process_time() - start, records


def first_start(path: str) -> float:
    """Start of a training on a file that was never read."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2_BALANCE_CACHE"] = directory
        return lazy_records(path)[0]


def second_start(path: str) -> float:
    """Start of a training on a file that was read before."""
    return lazy_records(path)[0]


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
    start = time.process_time()
    _repeat_factors(records)
    return time.process_time() - start


def repeat_factor_epoch(path: str) -> float:
    """Indices of one epoch of repeat-factor sampling."""
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    factors = _repeat_factors(_records(path))
    indices = iter(RepeatFactorTrainingSampler(factors, seed=0))
    start = time.process_time()
    for _ in range(int(factors.sum())):
        next(indices)
    return time.process_time() - start


def class_aware_epoch(path: str) -> float:
    """Start of class-aware sampling, and as many indices as there are images."""
    from d2_balance.data.samplers import ClassAwareTrainingSampler

    records = _records(path)
    start = time.process_time()
    indices = iter(ClassAwareTrainingSampler(records, seed=0))
    for _ in range(len(records)):
        next(indices)
    return time.process_time() - start


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
    start = time.process_time()
    for first in range(0, len(records), BATCH):
        labels.verified(records[first : first + BATCH], "cpu")
    return time.process_time() - start


MEASUREMENTS: dict[str, Callable[[str], float]] = {
    "json.load": plain_load,
    "stock Detectron2, start of a training": stock_records,
    "start of a training, file never read": first_start,
    "start of a training, file read before": second_start,
    "columns, file never read": first_read,
    "columns, same file again": cached_read,
    "columns, file under another name": moved_read,
    "class counts and report": cached_counts,
    "repeat factors": repeat_factors,
    "repeat-factor epoch": repeat_factor_epoch,
    "class-aware epoch": class_aware_epoch,
    "image-level masks": image_level_masks,
}


def measure(name: str, path: Path, directory: str, repeats: int) -> tuple[float, float]:
    """CPU seconds and peak GiB of one measurement, the least of `repeats` processes."""
    environment = {**os.environ, "D2_BALANCE_CACHE": directory}
    command = [sys.executable, __file__, "--measure", name, "--file", str(path)]
    runs = []
    for _ in range(repeats):
        out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        runs.append(tuple(map(float, out.stdout.split()[-2:])))
    return min(run[0] for run in runs), min(run[1] for run in runs)


def main() -> None:
    """Print one table of CPU seconds, ratios to stock Detectron2, and peak memory."""
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
        seconds = MEASUREMENTS[args.measure](args.file)
        print(seconds, peak_gib())
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(args.file or os.path.join(directory, "train.json"))
        if not path.exists():
            make_file(path, args)
        from d2_balance.data.annotations import read_annotations

        cache = os.path.join(directory, "cache")
        os.environ["D2_BALANCE_CACHE"] = cache
        time.sleep(2.1)  # a file of this age is known by its times, see `cache.file_state`
        read_annotations(
            str(path)
        ).class_counts()  # fills the cache for the measurements that need it
        figures = {name: measure(name, path, cache, args.repeats) for name in MEASUREMENTS}
        size = path.stat().st_size / 1e6
    stock = figures["stock Detectron2, start of a training"][0]
    rows = [
        [name, f"{cpu:.3f}", f"{cpu / stock:.3f}", f"{memory:.2f}"]
        for name, (cpu, memory) in figures.items()
    ]
    machine = {"machine": platform.machine(), "python": platform.python_version(), "MB": size}
    load = os.getloadavg()[0]
    print(
        f"{machine['machine']}, Python {machine['python']}, load {load:.1f}, file of {size:.0f} MB"
    )
    print(tabulate(rows, ["what", "CPU seconds", "times stock", "GiB"], tablefmt="github"))
    if args.json:
        with atomic_path(args.json) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"about": machine, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
