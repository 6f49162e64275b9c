#!/usr/bin/env python3
"""LVIS-style data with EQL: frequency groups, image-level labels, a lambda that fits the counts.

    python examples/lvis_with_eql.py --output output/lvis_eql [--iterations 40]

200 training and 40 validation images of the built-in dataset, which has the format of LVIS v1,
stand in for LVIS. The script chooses the lambda of the equalization loss (arXiv:2003.05176) by the
fraction of images that its tail has, trains a Faster R-CNN R-18 with image-level labels and repeat
factors, and prints AP by frequency group. Under a minute on a CPU; so short a training shows the
way, not the accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from d2_balance.analysis.tail import lambda_for_tail_ratio
from d2_balance.data import ClassCounts, register_from_config
from d2_balance.data.mini_lvis.dataset import build_mini_lvis
from d2_balance.engine import read_config
from d2_balance.losses.eql import tail_ratio, tail_weight

TAIL = 0.1  # tail ratio (TR): 2 to 10 % is the useful range (section 4.3 of the paper)

CONFIG = """\
_BASE_: quick_schedules/Base-RCNN-mini_lvis-smoke.yaml # Faster R-CNN R-18 from scratch
MODEL:
  META_ARCHITECTURE: BalancedRCNN
  ROI_HEADS: {{NAME: BalancedStandardROIHeads, SCORE_THRESH_TEST: 0.001}}
  BALANCE:
    CLS_LOSS: EQL
    EQL: {{USE_IMAGE_LEVEL_LABELS: always}}
DATASETS:
  REGISTER:
    - [lvis_example_train, {train}, {images}]
    - [lvis_example_val, {val}, {images}]
  TRAIN: ("lvis_example_train",)
  TEST: ("lvis_example_val",)
DATALOADER: {{SAMPLER_TRAIN: RepeatFactorTrainingSampler, REPEAT_THRESHOLD: 0.05}}
INPUT: {{MIN_SIZE_TRAIN: "(128,)", MIN_SIZE_TEST: 128}}
SOLVER:
  MAX_ITER: {iterations}
  STEPS: ()
OUTPUT_DIR: {output}/run
"""


def some_images(source: str, target: Path, count: int) -> Path:
    """Write the first images of an LVIS file as an LVIS file."""
    data = json.loads(Path(source).read_text())
    data["images"] = data["images"][:count]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    target.write_text(json.dumps(data))
    return target


def choose_lambda(config: Path) -> float:
    """Print and return the largest lambda whose tail has at most TAIL of the images."""
    cfg = read_config(str(config))
    register_from_config(cfg)
    counts = ClassCounts.from_config(cfg)
    threshold = lambda_for_tail_ratio(counts.frequency, counts.image_count, TAIL)
    tail = tail_weight(counts.frequency, threshold, "step")
    print(
        f"lambda {threshold:.4f} protects {int(tail.sum())} of {len(tail)} classes, with "
        f"{tail_ratio(tail, counts.image_count):.1%} of the images of all classes"
    )
    return threshold


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    output = args.output.resolve()
    if output.exists():
        parser.error(f"--output: {output} exists; name a new directory")
    output.mkdir(parents=True)
    root = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "mini_lvis")
    files = build_mini_lvis(root)  # rendered on first use
    train = some_images(files["mini_lvis_train"], output / "train.json", 200)
    val = some_images(files["mini_lvis_val"], output / "val.json", 40)
    config = output / "config.yaml"
    config.write_text(
        CONFIG.format(
            train=train,
            val=val,
            images=os.path.dirname(os.path.abspath(files["mini_lvis_train"])),
            iterations=args.iterations,
            output=output,
        )
    )

    command = [sys.executable, "-m", "d2_balance", "train", "--config-file", str(config)]
    command += ["MODEL.BALANCE.EQL.LAMBDA", f"{choose_lambda(config):.5f}"]
    subprocess.run(command, check=True)

    evaluation = json.loads((output / "run/inference/evaluation_lvis_example_val.json").read_text())
    for group in ("AP", "APr", "APc", "APf"):
        print(f"{group} {evaluation['results']['bbox'][group]}")


if __name__ == "__main__":
    main()
