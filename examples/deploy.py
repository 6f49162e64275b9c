#!/usr/bin/env python3
"""From a training to a model in use without PyTorch: train, predict, export, run in ONNX Runtime.

    python examples/deploy.py --output output/deploy [--iterations 60]

The script trains Mask R-CNN R-18 with EQL on the built-in set mini_lvis, predicts on images of its
validation set, exports the model to ONNX, and runs the exported file with NumPy, Pillow and
ONNX Runtime alone. The detections must be the same. A few minutes on a CPU; so short a training
shows the way, not the accuracy. Needs `pip install "d2-balance[onnx]"`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

CONFIG = "quick_schedules/mask_rcnn_R_18_eql_mini_lvis_demo.yaml"
IMAGES = 6


def command(*arguments: str) -> None:
    """Run a command of the package as in a shell, where it is called `d2-balance`."""
    subprocess.run([sys.executable, "-m", "d2_balance", *arguments], check=True)


class OnnxDetector:
    """The exported model, its labels and its preprocessing; knows nothing of PyTorch.

    Args:
        path: the exported model; its labels lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.labels = json.loads(path.with_suffix(".json").read_text())

    def __call__(self, path: Path) -> list[dict]:
        """Detect in an image; boxes are x, y, width, height in its pixels, as in COCO JSON."""
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        width, height = image.size
        settings = self.labels["input"]
        scale = settings["min_size"] / min(width, height)
        scale = min(scale, settings["max_size"] / max(width, height))
        size = (int(width * scale + 0.5), int(height * scale + 0.5))
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
        if settings["channels"] == "BGR":
            pixels = pixels[:, :, ::-1]
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        boxes, scores, classes, *_ = self.session.run(None, {"image": pixels})
        boxes = boxes * np.tile([width / size[0], height / size[1]], 2)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"bbox": box.tolist(), "score": float(score), "name": self.labels["names"][k]}
            for box, score, k in zip(boxes, scores, classes, strict=True)
        ]


def compare(detector: OnnxDetector, images: Path, predictions: Path) -> int:
    """Count the detections that both give, and stop if one differs.

    Args:
        detector: the exported model.
        images: directory of the images.
        predictions: output of `d2-balance predict` on them.
    """
    dataset = json.loads((predictions / "images.json").read_text())
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    found = json.loads((predictions / "predictions.json").read_text())
    same = 0
    for record in dataset["images"]:
        ours = [d for d in found if d["image_id"] == record["id"]]
        theirs = detector(images / record["file_name"])
        assert [names[d["category_id"]] for d in ours] == [d["name"] for d in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a["score"] - b["score"]) < 1e-5, (a["score"], b["score"])
            assert np.abs(np.subtract(a["bbox"], b["bbox"])).max() < 1e-3, (a["bbox"], b["bbox"])
        same += len(ours)
    return same


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    parser.add_argument("--iterations", type=int, default=60)
    args = parser.parse_args()
    directory = args.output.resolve()
    if directory.exists():
        parser.error(f"--output: {directory} exists; name a new directory")
    run = str(directory / "run")

    command(
        "train", "--config-file", CONFIG,
        "OUTPUT_DIR", run,
        "SOLVER.MAX_ITER", str(args.iterations),
        "SOLVER.STEPS", "()",
        "SOLVER.WARMUP_ITERS", "10",
        "SOLVER.IMS_PER_BATCH", "4",
        "SOLVER.BASE_LR", "0.02",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01",  # scores are low after so few iterations
        "TEST.DETECTIONS_PER_IMAGE", "10",
    )  # fmt: skip

    # images that are not the training's; on another machine the run's directory is enough
    from detectron2.data import DatasetCatalog

    from d2_balance.data import register_mini_lvis

    register_mini_lvis()
    images = directory / "images"
    images.mkdir()
    for record in DatasetCatalog.get("mini_lvis_val")[:IMAGES]:
        shutil.copy(record["file_name"], images)

    predictions = directory / "predictions"
    command("predict", str(images), "--model", run, "--output", str(predictions))
    model = directory / "model.onnx"
    command(
        "export", "--model", run, "--format", "onnx", "--output", str(model),
        "--images", str(images),
    )  # fmt: skip
    same = compare(OnnxDetector(model), images, predictions)
    if not same:
        sys.exit("the model detects nothing; train for more iterations")
    print(f"ONNX Runtime gives the same {same} detections in {IMAGES} images.")


if __name__ == "__main__":
    main()
