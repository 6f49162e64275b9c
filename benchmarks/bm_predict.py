"""Time of `d2-balance predict` on a directory, beside Detectron2's DefaultPredictor in a loop.

All of them read the same images, detect, paste masks, and write COCO JSON, in turns in one run:

    stock            DefaultPredictor in a loop, as Detectron2's demo does it
    batch 1          predict_files, one image at a time in one process
    batches          predict_files, with --batch-size and --workers

Without --model an untrained Mask R-CNN of configs/quick_schedules and mini_lvis_val are taken: the
built-in set needs no download. A ratio above 1 is faster than stock. CPU seconds are those of the
process and of its workers; other work on the machine disturbs them less than the clock.
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
    cfg.TEST.DETECTIONS_PER_IMAGE = 25
    torch.manual_seed(0)
    model = build_model(cfg)
    # so that scores are not all the prior's, and images have detections to paste and to write
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    classes = ModelClasses.from_run(cfg, model)
    path = os.path.join(directory, "model_final.pth")
    torch.save({"model": model.state_dict(), CHECKPOINT_KEY: classes.as_dict()}, path)
    with open(os.path.join(directory, "config.yaml"), "w") as file:
        file.write(cfg.dump())
    return directory


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds; the latter with those of workers that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def stock(predictor: DefaultPredictor, paths: list[str], ids: list[int], output: str) -> int:
    """Loop over DefaultPredictor and return the number of detections."""
    detections = []
    for number, path in enumerate(paths, start=1):
        instances = predictor(read_image(path, format="BGR"))["instances"].to("cpu")
        detections += instances_to_coco_json(instances, number)
    for detection in detections:
        detection["category_id"] = ids[detection["category_id"]]
    with open(output, "w") as file:
        json.dump(detections, file)
    return len(detections)


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
        paths = [source.path for source in sources]
        default = DefaultPredictor(predictor.cfg.clone())
        settings = {"batch 1": (1, 0), "batches": (args.batch_size, args.workers)}
        names = ("stock", *settings)
        wall: dict[str, list[float]] = {name: [] for name in names}
        cpu: dict[str, list[float]] = {name: [] for name in names}
        for round_number in range(args.repeat + 1):  # the first one warms up
            detections = {}
            # the order turns round, so that nobody always follows the same one
            for name in names if round_number % 2 else reversed(names):
                output = f"{directory}/{name}-{round_number}"
                start = clocks()
                if name == "stock":
                    detections[name] = stock(default, paths, predictor.category_ids, output)
                else:
                    batch_size, workers = settings[name]
                    detections[name] = predict_files(
                        predictor,
                        sources,
                        output,
                        batch_size=batch_size,
                        num_workers=workers,
                        draw=False,
                        quiet=True,
                    ).detections
                end = clocks()
                if round_number:
                    wall[name].append(end[0] - start[0])
                    cpu[name].append(end[1] - start[1])
            if len(set(detections.values())) > 1 or not detections["stock"]:
                parser.error(f"not the same work: {detections} detections")

    rows = {}
    for name, values in wall.items():
        # rounds are compared with themselves, since the load of the machine changes
        ratios = [a / b for a, b in zip(wall["stock"], values, strict=True)]
        rows[name] = {
            "seconds": statistics.median(values),
            "images_per_second": len(paths) / statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "cpu_seconds": statistics.median(cpu[name]),
            "cpu_ratio": statistics.median(
                a / b for a, b in zip(cpu["stock"], cpu[name], strict=True)
            ),
        }
    print(f"{len(paths)} images, {detections['stock']} detections; {in_words(about())}\n")
    print("| | images per second | times stock (least to most) | CPU s | times stock, CPU |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        print(
            f"| {name} | {row['images_per_second']:.1f} | {row['ratio']:.2f} ({spread}) | "
            f"{row['cpu_seconds']:.1f} | {row['cpu_ratio']:.2f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": about(), "images": len(paths), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
