#!/usr/bin/env python3
"""Time and memory of an LVIS evaluation: ours, hotcoco called directly, and the lvis package.

    python benchmarks/bm_evaluation.py [--images N] [--per-image D] [--without lvis]
    python benchmarks/bm_evaluation.py --images 1000 --per-image 607 --cases fixed
    python benchmarks/bm_evaluation.py --images 1250 --per-image 400 --cases rescore
    python benchmarks/bm_evaluation.py --images 5000 --per-image 300 --cases bootstrap

The defaults have the size of LVIS v1 val: 20,000 images, 1,203 classes, 250,000 objects, and 100
detections an image, for which lvis needs 17 GiB. Each evaluator runs in a process of its own, one
after the other, from reading the two files to the nine metrics; peak memory is that of the process.
Processor time tells them apart on a busy machine too; it includes starting Python and all threads.

With --cases ours is compared with more of ours, on the same files: "fixed" adds AP-fixed (10,000
detections of a class on 19,809 images are 607 an image: the limit is scaled so that it cuts as
much), "rescore" is `rescore fit`, "bootstrap" is 1,000 resamples of two runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from memory import peak_gib
from tabulate import tabulate
from tqdm import tqdm

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
HEIGHT, WIDTH = 480, 640


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) boxes x, y, width, height inside the image, most of them small."""
    size = np.exp(rng.uniform(2.3, 5.6, (count, 2))).clip(max=(WIDTH - 1, HEIGHT - 1))
    corner = rng.uniform(0, 1, (count, 2)) * ((WIDTH, HEIGHT) - size)
    return np.concatenate([corner, size], axis=1).round(2)


def make_files(directory: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """Ground truth in LVIS format, and detections: moved objects, look-alikes and noise."""
    rng = np.random.default_rng(0)
    classes = np.arange(1, args.classes + 1)
    share = 1 / classes**1.1
    categories = [
        {"id": int(c), "name": f"class{c}", "frequency": "fcr"[min(2, int(3 * n // len(classes)))]}
        for n, c in enumerate(classes)
    ]
    owner = np.sort(rng.integers(0, args.images, args.objects))
    kinds = rng.choice(classes, args.objects, p=share / share.sum())
    boxes = random_boxes(rng, args.objects)
    annotations = [
        {"id": n, "image_id": int(i) + 1, "category_id": int(c), "bbox": b, "area": b[2] * b[3]}
        for n, (i, c, b) in enumerate(zip(owner, kinds, boxes.tolist(), strict=True), start=1)
    ]
    starts = np.searchsorted(owner, np.arange(args.images + 1))
    images, found = [], []
    for i in tqdm(range(args.images), "making detections", disable=None):
        own = slice(starts[i], starts[i + 1])
        present = np.unique(kinds[own])
        absent = np.setdiff1d(rng.choice(classes, 12), present)
        images.append(
            {
                "id": i + 1,
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": absent.tolist(),
                "not_exhaustive_category_ids": present[rng.random(len(present)) < 0.1].tolist(),
            }
        )
        found += detections_of(rng, i + 1, boxes[own], kinds[own], classes, args.per_image)
    content = {"images": images, "annotations": annotations, "categories": categories}
    paths = directory / "truth.json", directory / "detections.json"
    for path, data in zip(paths, (content, found), strict=True):
        path.write_text(json.dumps(data))
    return paths


def detections_of(
    rng: np.random.Generator,
    image: int,
    boxes: np.ndarray,
    kinds: np.ndarray,
    classes: np.ndarray,
    count: int,
) -> list[dict]:
    """Detections of an image: up to half of them moved objects, most of the right class."""
    hits = min(len(boxes) * 2, count // 2)
    chosen = rng.integers(0, max(len(boxes), 1), hits)
    noise = random_boxes(rng, count - hits)
    moved = boxes[chosen] + rng.normal(0, 0.08, (hits, 4)) * np.tile(boxes[chosen, 2:], 2)
    every = np.concatenate([moved, noise]).round(2)
    every[:, 2:] = every[:, 2:].clip(min=1)
    kind = np.concatenate([kinds[chosen], rng.choice(classes, count - hits)])
    wrong = rng.random(count) < 0.2
    kind[wrong] = rng.choice(classes, wrong.sum())
    score = rng.random(count).round(4)
    return [
        {"image_id": image, "category_id": int(c), "bbox": b, "score": s}
        for c, b, s in zip(kind, every.tolist(), score.tolist(), strict=True)
    ]


def with_ours(truth: str, detections: str) -> dict[str, float]:
    """The metrics of `d2-balance eval`."""
    from d2_balance.data.resolve import load_annotations
    from d2_balance.evaluation.evaluate import evaluate_predictions
    from d2_balance.evaluation.predictions import read_predictions

    ground = load_annotations(truth)
    return evaluate_predictions(ground, read_predictions(detections, ground)).results["bbox"]


def with_hotcoco(truth: str, detections: str) -> dict[str, float]:
    """The metrics of hotcoco, called directly."""
    import hotcoco

    ground = hotcoco.COCO(truth)
    evaluator = hotcoco.LVISeval(ground, hotcoco.LVISResults(ground, detections), "bbox")
    evaluator.run()
    results = evaluator.get_results()
    return {metric: float(results[metric] * 100) for metric in METRICS}


def with_lvis(truth: str, detections: str) -> dict[str, float]:
    """The metrics of the lvis package."""
    np.float = float  # an alias that numpy dropped and lvis 0.5.3 still uses
    from lvis import LVIS, LVISEval, LVISResults

    ground = LVIS(truth)
    evaluator = LVISEval(ground, LVISResults(ground, detections), "bbox")
    evaluator.run()
    return {metric: float(evaluator.results[metric] * 100) for metric in METRICS}


def with_fixed(truth: str, detections: str) -> dict[str, float]:
    """The metrics of `d2-balance eval --ap fixed`; half of the detections are cut."""
    from d2_balance.data.resolve import load_annotations
    from d2_balance.evaluation.evaluate import evaluate_predictions
    from d2_balance.evaluation.predictions import read_predictions

    ground = load_annotations(truth)
    found = read_predictions(detections, ground)
    limit = max(len(found) // ground.num_classes, 1)
    results = evaluate_predictions(ground, found, ap=("fixed",), per_class=limit).results
    return results["bbox_fixed"]


def with_rescore(truth: str, detections: str) -> dict[str, float]:
    """The metrics after `d2-balance rescore fit`."""
    from d2_balance.evaluation.merge.rescore import fit_factors

    directory = Path(detections).parent
    other = directory / "other.json"  # images that factors are not fitted on
    content = json.loads(Path(truth).read_text())
    content["images"] = [i | {"id": -i["id"]} for i in content["images"][:1]]
    other.write_text(json.dumps(content | {"annotations": []}))
    fit_factors(detections, truth, str(directory / "factors.json"), tests=[str(other)])
    return json.loads((directory / "factors.json").read_text())["after"]


def with_bootstrap(truth: str, detections: str) -> dict[str, float]:
    """Seconds of 1,000 resamples of two runs, matched before."""
    from d2_balance.data.resolve import load_annotations
    from d2_balance.evaluation import bootstrap
    from d2_balance.evaluation.matching import GroundTruth, Matcher, select
    from d2_balance.evaluation.predictions import read_predictions

    ground = GroundTruth(load_annotations(truth), "bbox")
    matcher = Matcher(ground, select(ground, read_predictions(detections, ground.annotations), 300))
    groups = list(ground.annotations.file_groups)
    runs = [bootstrap.Resampled(matcher) for _ in range(2)]
    begin = time.process_time()
    names = [str(k) for k in ground.class_ids]
    strata = bootstrap.strata_of(matcher, groups)
    bootstrap.compare(runs[:1], runs[1:], groups, names, strata)
    return {"AP": float("nan"), "bootstrap": time.process_time() - begin}


CASES = {"fixed": with_fixed, "rescore": with_rescore, "bootstrap": with_bootstrap}
CHILDREN = {"d2_balance": with_ours, "hotcoco": with_hotcoco, "lvis": with_lvis}


def child(name: str, truth: str, detections: str) -> None:
    """Runs one evaluator and prints what it took as one line of JSON."""
    start = time.perf_counter()
    metrics = (CHILDREN | CASES)[name](truth, detections)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "metrics": metrics}
    print(json.dumps(figures | {"gib": peak_gib()}))


def measure(name: str, *paths: Path) -> dict:
    """Run one evaluation in a process of its own; return its time and memory."""
    command = [sys.executable, __file__, "--child", name, *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    # at once, because the slower one may take half an hour, or more memory than there is
    took = f"{found['seconds']:.1f} s ({found['cpu']:.1f} s of processor time)"
    print(f"{name}: {took}, {found['gib']:.2f} GiB", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=1_203)
    parser.add_argument("--objects", type=int, default=250_000)
    parser.add_argument("--per-image", type=int, default=100, help="detections of an image")
    parser.add_argument("--without", nargs="*", default=[], choices=CHILDREN, help="do not run")
    parser.add_argument("--cases", nargs="*", default=[], choices=CASES, help="ours against ours")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        paths = make_files(Path(directory), args)
        names = [n for n in CHILDREN if n not in args.without]
        if args.cases:
            names = ["d2_balance", *args.cases]
        figures = {n: measure(n, *paths) for n in names}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"{args.images:,} images, {args.classes:,} classes, {args.objects:,} objects, "
        f"{args.images * args.per_image:,} detections\n"
    )
    rows = [
        [
            name,
            f"{f['seconds']:.1f} s",
            f"{f['cpu']:.1f} s",
            f"{f['gib']:.2f} GiB",
            f"{f['metrics']['AP']:.6f}",
        ]
        for name, f in figures.items()
    ]
    print(
        tabulate(
            rows, headers=["", "time", "processor time", "peak memory", "AP"], tablefmt="github"
        )
    )
    ours = figures["d2_balance"]
    for name, theirs in figures.items():
        if name in CASES:
            print(
                f"\n{name} takes {theirs['cpu'] / ours['cpu']:.2f} of d2_balance's processor time"
            )
            if "bootstrap" in theirs["metrics"]:
                print(f"of these the resamples {theirs['metrics']['bootstrap']:.1f} s")
        elif theirs is not ours:
            gap = max(abs(ours["metrics"][m] - theirs["metrics"][m]) for m in METRICS)
            print(
                f"\nd2_balance takes {ours['cpu'] / theirs['cpu']:.2f} of the processor time and "
                f"{ours['gib'] / theirs['gib']:.2f} of the memory of {name}; largest difference of "
                f"a metric {gap:.1e}"
            )
    if args.json:
        # not above: the child that runs lvis would load torch too
        from d2_balance.utils.files import atomic_path

        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
