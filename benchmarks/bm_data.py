#!/usr/bin/env python3
"""Time of what is done with annotations, on a file of the size of LVIS v1 train made here.

    python benchmarks/bm_data.py [--images N] [--objects M] [--classes K] [--repeats R]

The defaults have the size of LVIS v1 train: 100,000 pictures, 1.27 million objects with polygons,
1,203 classes. Every measurement runs in a process of its own, so that none finds a warm heap; each
is repeated and the fastest counts. `MEASUREMENTS` lists them: another one is a function and a line.
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

from d2_balance.files import atomic_path

WIDTH, HEIGHT = 640, 480


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
    from d2_balance.data.file_counts import file_counts

    with tempfile.TemporaryDirectory() as folder:
        os.environ["D2_BALANCE_CACHE"] = folder
        start = time.perf_counter()
        file_counts(path)
        return time.perf_counter() - start


def cached_statistics(path: str) -> float:
    """Class statistics of a file that was counted before, by the same path."""
    from d2_balance.data.file_counts import file_counts

    start = time.perf_counter()
    file_counts(path)
    return time.perf_counter() - start


def moved_statistics(path: str) -> float:
    """Class statistics of a file that was counted under another name: found by its hash."""
    from d2_balance.data.file_counts import file_counts

    link = f"{path}.moved"
    os.link(path, link)  # also changes the ctime, as a copy has another one
    try:
        start = time.perf_counter()
        file_counts(link)
        return time.perf_counter() - start
    finally:
        os.remove(link)


MEASUREMENTS: dict[str, Callable[[str], float]] = {
    "json.load": plain_load,
    "class statistics, first call": first_statistics,
    "class statistics, same file again": cached_statistics,
    "class statistics, file under another name": moved_statistics,
}


def measure(name: str, path: Path, folder: str, repeats: int) -> float:
    """Seconds of one measurement, the fastest of `repeats` processes."""
    environment = {**os.environ, "D2_BALANCE_CACHE": folder}
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
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(MEASUREMENTS[args.measure](args.file))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.file or os.path.join(folder, "train.json"))
        if not path.exists():
            make_file(path, args)
        from d2_balance.data.file_counts import file_counts

        cache = os.path.join(folder, "cache")
        os.environ["D2_BALANCE_CACHE"] = cache
        time.sleep(2.1)  # a file of this age is known by its times, see `file_state`
        file_counts(str(path))  # fills the cache for the measurements that need it
        seconds = {name: measure(name, path, cache, args.repeats) for name in MEASUREMENTS}
        size = path.stat().st_size / 1e6
    base = seconds["json.load"]
    rows = [[name, f"{value:.3f}", f"{value / base:.3f}"] for name, value in seconds.items()]
    print(f"{platform.machine()}, Python {platform.python_version()}, file of {size:.0f} MB")
    print(tabulate(rows, ["what", "seconds", "times json.load"], tablefmt="github"))


if __name__ == "__main__":
    main()
