"""Time and memory of `d2-balance ensemble`: 3 models, 5,000 images, 300 detections an image.

    python benchmarks/bm_ensemble.py [--images N] [--method nms]

Detections are drawn: an image has 60 objects of 1,203 classes with frequencies by Zipf's law, a
model finds each with noise, and the rest of its 300 detections are spread over the image. Each
has a mask of about 100 bytes. Prints the wall time and the peak memory of the command.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import pycocotools.mask as mask_util
from tabulate import tabulate

CLASSES, OBJECTS, DETECTIONS, WIDTH, HEIGHT = 1203, 60, 300, 640, 480
LIMIT_SECONDS, LIMIT_GIB = 300, 4


def write_truth(path: str, images: int) -> None:
    """Write an LVIS-style file with `images` images and no objects."""
    categories = [{"id": i, "name": f"class {i}", "frequency": "c"} for i in range(1, CLASSES + 1)]
    records = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)]
    with open(path, "w") as file:
        json.dump({"images": records, "categories": categories, "annotations": []}, file)


def write_predictions(path: str, images: int, seed: int) -> None:
    """Write 300 random detections of each image."""
    noise = np.random.default_rng(seed)
    share = 1 / np.arange(1, CLASSES + 1)
    share /= share.sum()
    masks = [_mask(np.random.default_rng(n)) for n in range(50)]
    with open(path, "w") as file:
        file.write("[")
        for image in range(1, images + 1):
            scene = np.random.default_rng(image)  # the same objects for every model
            extra = DETECTIONS - OBJECTS
            box = np.concatenate([_boxes(scene, OBJECTS), _boxes(noise, extra)])
            box[:OBJECTS] += noise.normal(0, 3, (OBJECTS, 4))
            category = np.concatenate(
                [g.choice(CLASSES, n, p=share) + 1 for g, n in ((scene, OBJECTS), (noise, extra))]
            )
            score = noise.random(DETECTIONS) ** 3
            lines = [
                json.dumps(
                    {
                        "image_id": image,
                        "category_id": c,
                        "bbox": b,
                        "score": s,
                        "segmentation": masks[n % len(masks)],
                    }
                )
                for n, (c, b, s) in enumerate(
                    zip(category.tolist(), box.clip(1).tolist(), score.tolist(), strict=True)
                )
            ]
            file.write(("," if image > 1 else "") + "\n" + ", ".join(lines))
        file.write("\n]\n")


def _boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    corner = generator.random((count, 2)) * (WIDTH - 200, HEIGHT - 200)
    return np.concatenate([corner, generator.random((count, 2)) * 180 + 10], axis=1)


def _mask(generator: np.random.Generator) -> dict:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    cy, cx, radius = generator.random(3) * (300, 400, 30) + (80, 100, 10)
    rle = mask_util.encode(np.asfortranarray((x - cx) ** 2 + (y - cy) ** 2 < radius**2, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def main() -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--method", default="wbf", help="nms, soft-nms or wbf")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        truth = os.path.join(directory, "truth.json")
        write_truth(truth, args.images)
        files = [os.path.join(directory, f"{name}.json") for name in "abc"]
        for seed, path in enumerate(files):
            write_predictions(path, args.images, 10**6 + seed)
        size = sum(map(os.path.getsize, files)) / 2**20
        start = time.perf_counter()
        output = os.path.join(directory, "merged.json")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "d2_balance.cli.main",
                "ensemble",
                *files,
                "--dataset",
                truth,
                "--output",
                output,
                "--method",
                args.method,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, numpy {np.__version__}; {size:,.0f} MiB of input"
    )
    row = [args.method, args.images, f"{seconds:.0f}", f"{cpu:.0f}", f"{memory:.2f}"]
    head = ["method", "images", "seconds", "CPU seconds", "peak GiB"]
    print(tabulate([row], head, tablefmt="github"))
    full = args.images >= 5000
    return int(full and (seconds > LIMIT_SECONDS or memory > LIMIT_GIB))


if __name__ == "__main__":
    sys.exit(main())
