"""Time of `d2-balance predict` on a directory, beside Detectron2's DefaultPredictor in a loop.

All of them read the same images, detect, paste masks, and write COCO JSON, in turns in one run:

    stock            DefaultPredictor in a loop, as Detectron2's demo does it
    batch 1          predict_files, one image at a time in one process
    batches          predict_files, with --batch-size and --workers

Without --model an untrained Mask R-CNN of configs/quick_schedules and mini_lvis_val are taken: the
built-in set needs no download. A ratio above 1 is faster than stock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from measuring import about, in_words

from d2_balance import add_balance_config, get_config_file
from d2_balance.data.model_classes import CHECKPOINT_KEY, ModelClasses
from d2_balance.deploy import load
from d2_balance.deploy.predict import find_sources, predict_files

CONFIG = "quick_schedules/mask_rcnn_R_18_eql_mini_lvis_demo.yaml"


def untrained(directory: str) -> str:
    """Write a run's directory with random weights and return its path."""
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.merge_from_file(get_config_file(CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    # scores of random weights lie around the prior; a tenth of the boxes should pass
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.002
    cfg.TEST.DETECTIONS_PER_IMAGE = 25
    torch.manual_seed(0)
    model = build_model(cfg)
    classes = ModelClasses.from_run(cfg, model)
    path = os.path.join(directory, "model_final.pth")
    torch.save({"model": model.state_dict(), CHECKPOINT_KEY: classes.as_dict()}, path)
    with open(os.path.join(directory, "config.yaml"), "w") as file:
        file.write(cfg.dump())
    return directory


def stock(cfg, paths: list[str], ids: list[int], output: str) -> float:
    """Seconds of a loop over DefaultPredictor, which is built before."""
    predictor = DefaultPredictor(cfg)
    start = time.perf_counter()
    found = []
    for path, category in zip(paths, range(1, len(paths) + 1), strict=True):
        instances = predictor(read_image(path, format="BGR"))["instances"].to("cpu")
        found += instances_to_coco_json(instances, category)
    for detection in found:
        detection["category_id"] = ids[detection["category_id"]]
    with open(output, "w") as file:
        json.dump(found, file)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="output directory of a training")
    parser.add_argument("--images", help="directory of images; default mini_lvis_val")
    parser.add_argument("--limit", type=int, default=100, help="images (default 100)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        model = args.model or untrained(directory)
        predictor = load(model, device="cpu")
        if args.images:
            sources = find_sources([args.images])[: args.limit]
        else:
            records = DatasetCatalog.get("mini_lvis_val")
            sources = find_sources([r["file_name"] for r in records[: args.limit]])
        cfg = predictor.cfg.clone()
        paths = [source.path for source in sources]
        settings = {"batch 1": (1, 0), "batches": (args.batch_size, args.workers)}
        seconds: dict[str, list[float]] = {name: [] for name in ("stock", *settings)}
        for round_number in range(args.repeat + 1):  # the first one warms up
            times = {"stock": stock(cfg, paths, predictor.category_ids, f"{directory}/stock.json")}
            for name, (batch_size, workers) in settings.items():
                output = f"{directory}/{name}-{round_number}"
                start = time.perf_counter()
                report = predict_files(
                    predictor,
                    sources,
                    output,
                    batch_size=batch_size,
                    num_workers=workers,
                    draw=False,
                    quiet=True,
                )
                times[name] = time.perf_counter() - start
            if round_number:
                for name, value in times.items():
                    seconds[name].append(value)

    rows = {}
    for name, values in seconds.items():
        # rounds are compared with themselves, since the load of the machine changes
        ratios = [a / b for a, b in zip(seconds["stock"], values, strict=True)]
        rows[name] = {
            "seconds": statistics.median(values),
            "images_per_second": len(paths) / statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    print(f"{len(paths)} images, {report.detections} detections; {in_words(about())}\n")
    print("| | images per second | times stock (least to most) |\n|---|---|---|")
    for name, row in rows.items():
        spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        print(f"| {name} | {row['images_per_second']:.1f} | {row['ratio']:.2f} ({spread}) |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": about(), "images": len(paths), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
