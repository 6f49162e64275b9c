#!/usr/bin/env python3
"""From your own COCO file to a trained detector: check, train, measure, use.

    python examples/own_coco_data.py --output output/own_coco [--iterations 40]

The script draws a small dataset first (many circles, some squares, few triangles) and writes it
as COCO files; put your own in their place. Then it trains a RetinaNet R-18 whose anchors are
weighted by GHM (arXiv:1811.05181), prints AP by class, and loads the trained model to detect
objects in an image. Under a minute on a CPU; so short a training shows the way, not the accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")
SIZE = 128  # pixels of an image's side

CONFIG = """\
_BASE_: bccd/Base-RetinaNet-bccd.yaml # RetinaNet R-18 from scratch at small sizes
MODEL:
  META_ARCHITECTURE: BalancedRetinaNet
  RETINANET: {{NUM_CLASSES: {classes}}}
  BALANCE: {{CLS_LOSS: GHMC, BOX_LOSS: GHMR, BOX_LOSS_WEIGHT: 10.0, GHMR: {{MU: 0.1}}}}
DATASETS:
  REGISTER:
    - [shapes_train, {directory}/train.json, {directory}/images]
    - [shapes_val, {directory}/val.json, {directory}/images]
  TRAIN: ("shapes_train",)
  TEST: ("shapes_val",)
INPUT: {{MIN_SIZE_TRAIN: "({size},)", MIN_SIZE_TEST: {size}}}
SOLVER:
  MAX_ITER: {iterations}
  STEPS: ()
  WARMUP_ITERS: 10
OUTPUT_DIR: {directory}/run
"""


def draw_dataset(directory: Path, split: str, images: int, seed: int) -> None:
    """Draw images and write them as a COCO file.

    Args:
        directory: gets `images/` and `<split>.json`.
        split: "train" or "val".
        images: how many.
        seed: of the random shapes.
    """
    generator = random.Random(seed)
    data: dict[str, list] = {"images": [], "annotations": []}
    data["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for number in range(1, images + 1):
        name = f"{split}_{number:03d}.png"
        image = Image.new("RGB", (SIZE, SIZE), (90, 90, 90))
        draw = ImageDraw.Draw(image)
        for column in range(3):  # side by side, so that no object hides another
            shape = generator.choices(CLASSES, weights=(20, 5, 1))[0]
            side = generator.randint(20, 34)
            x, y = 4 + 42 * column, generator.randint(4, SIZE - 40)
            box = (x, y, x + side, y + side)
            colour = tuple(generator.randint(120, 255) for _ in range(3))
            if shape == "circle":
                draw.ellipse(box, fill=colour)
            elif shape == "square":
                draw.rectangle(box, fill=colour)
            else:
                draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=colour)
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": number,
                    "category_id": CLASSES.index(shape) + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        image.save(directory / "images" / name)
        data["images"].append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
    (directory / f"{split}.json").write_text(json.dumps(data))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    directory = args.output.resolve()
    if directory.exists():
        parser.error(f"--output: {directory} exists; name a new directory")
    draw_dataset(directory, "train", images=64, seed=0)
    draw_dataset(directory, "val", images=24, seed=1)
    config = directory / "config.yaml"
    config.write_text(
        CONFIG.format(
            directory=directory, classes=len(CLASSES), size=SIZE, iterations=args.iterations
        )
    )

    # Images and annotations are checked before the first iteration.
    command = [sys.executable, "-m", "d2_balance", "train", "--config-file", str(config)]
    subprocess.run(command, check=True)

    with open(directory / "run/inference/per_class_ap_shapes_val.csv", newline="") as file:
        for row in csv.DictReader(file):
            print(", ".join(f"{key} {value}" for key, value in row.items()))

    from d2_balance.deploy import load  # the run's directory is enough from here on

    predictor = load(str(directory / "run"), score_threshold=0.1)
    image = directory / "images/val_001.png"
    instances = next(iter(predictor.predict([str(image)]))).instances
    print(f"{image.name}: {len(instances)} detections, the best three:")
    for k, score in zip(
        instances.pred_classes[:3].tolist(), instances.scores[:3].tolist(), strict=True
    ):
        print(f"  {predictor.names[k]} {score:.2f}")


if __name__ == "__main__":
    main()
