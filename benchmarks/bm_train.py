#!/usr/bin/env python3
"""Training step of RetinaNet and Mask R-CNN with each method against stock Detectron2.

    python benchmarks/bm_train.py [--repeat N] [--size PIXELS] [--batch N] [--classes K]
                                  [--only NAME ...] [--json FILE]

A step is forward, backward and SGD on images of noise, with a ResNet-18 and Detectron2's heads.
Both models live in one process and take turns (A B A B), so that other work on the machine meets
both. "more time" is the median over the pairs, and the two quartiles after it say what it is
worth: a difference within them is noise. In the rows "stock" Detectron2's own model is compared
with a second copy of itself, which shows the noise of the whole set-up.

Memory is the peak of a step beyond what is held before it. Waits are operations that make the host
of a GPU wait, counted by the profiler, beyond those of stock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from measuring import about, in_words, keep_memory, pairs, peak_memory, waits
from tabulate import tabulate
from tqdm import tqdm

from d2_balance import add_balance_config
from d2_balance.data.class_counts import ClassCounts
from d2_balance.losses import CLS_LOSSES
from d2_balance.modeling.compatibility import HEADS
from d2_balance.utils.files import atomic_path

STOCK = "stock"
# A stock architecture and ours.
MODELS = {
    "RetinaNet": ("RetinaNet", "BalancedRetinaNet"),
    "Mask R-CNN": ("GeneralizedRCNN", "BalancedRCNN"),
}
OTHERS = {"Mask R-CNN": {"ISR": ["REWEIGHTERS", ["ISR"]], "CARL": ["REWEIGHTERS", ["CARL"]]}}
"""Methods besides the losses: a key of MODEL.BALANCE and its value."""


def config(model: str, method: str, classes: int, counts_file: str, depth: int = 18) -> CfgNode:
    """A detector with a ResNet; method: a loss, one of `OTHERS`, or stock Detectron2."""
    cfg = get_cfg()
    add_balance_config(cfg)
    retina = model == "RetinaNet"
    kind = "retinanet_resnet" if retina else "resnet"
    cfg.MODEL.BACKBONE.NAME = f"build_{kind}_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"][retina:]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.MASK_ON = not retina
    if retina:
        octave = (1, 2 ** (1 / 3), 2 ** (2 / 3))
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
            [s * o for o in octave] for s in (32, 64, 128, 256, 512)
        ]
        cfg.MODEL.RETINANET.NUM_CLASSES = classes
    else:
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2_000
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4, 14
    cfg.DATASETS.TRAIN = ()
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.META_ARCHITECTURE = MODELS[model][method != STOCK]
    if method != STOCK:
        cfg.MODEL.ROI_HEADS.NAME = "BalancedStandardROIHeads"
        cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = counts_file
        key, value = OTHERS.get(model, {}).get(method, ["CLS_LOSS", method])
        cfg.MODEL.BALANCE[key] = value
    return cfg


def methods(model: str) -> Iterator[str]:
    """Stock, the losses that the head takes, and the methods besides."""
    yield STOCK
    allowed = HEADS["RetinaNet" if model == "RetinaNet" else "RoI heads"].cls_losses
    yield from sorted(name for name, cls in CLS_LOSSES if cls in allowed)
    yield from OTHERS.get(model, ())


def long_tail(classes: int, path: str) -> str:
    """Statistics of a training set with 10,000 images of the first class and 1 of the last."""
    count = torch.logspace(4, 0, classes).round().long()
    names = tuple(f"class_{number}" for number in range(classes))
    ClassCounts(count, 3 * count, 20_000, names).save(path)
    return path


def images(size: int, count: int, classes: int, objects: int = 6) -> list[dict]:
    """Noise with objects of 16 pixels to half the image on it."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(count):
        boxes = torch.rand(objects, 4, generator=generator) * (size / 2 - 16)
        boxes[:, 2:] += boxes[:, :2] + 16
        masks = torch.zeros(objects, size, size, dtype=torch.bool)
        for mask, box in zip(masks, boxes.long().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        target = Instances((size, size), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        target.gt_classes = torch.randint(0, classes, (objects,), generator=generator)
        image = (torch.rand(3, size, size, generator=generator) * 255).byte()
        batch.append({"image": image, "instances": target, "height": size, "width": size})
    return batch


def training_step(cfg: CfgNode, batch: list[dict]) -> Callable[[], None]:
    """Forward, backward and the optimizer's step, as a function."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    # So small a rate that the weights, and with them the work, stay as they are.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)

    def step() -> None:
        torch.manual_seed(1)  # both models draw the same proposals
        with EventStorage(0):
            sum(model(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def held_and_waited(step: Callable) -> tuple[int, int]:
    """Peak bytes and number of waits of a step that has run before."""
    return peak_memory(step, warm=True), sum(waits(step, warm=True).values())


def compare(step: Callable, stock: Callable, repeat: int, base: tuple[int, int]) -> dict:
    """Time, memory and waits of a step beside those of stock; base: `held_and_waited` of stock."""
    times = pairs(step, stock, repeat)
    more = [100 * (ours / theirs - 1) for ours, theirs in times]
    low, high = np.quantile(more, [0.25, 0.75])
    held, waited = held_and_waited(step)
    return {
        "s / step": statistics.median(ours for ours, _ in times),
        "stock": statistics.median(theirs for _, theirs in times),
        "more time, %": statistics.median(more),
        "quartiles": f"{low:.1f} to {high:.1f}",
        "peak, MB": held / 1e6,
        "more memory, %": 100 * (held / base[0] - 1),
        "waits beyond stock": waited - base[1],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7, help="timed pairs per line (7)")
    parser.add_argument("--size", type=int, default=256, help="side of the images (256)")
    parser.add_argument("--batch", type=int, default=1, help="images of a step (1)")
    parser.add_argument("--depth", type=int, default=18, help="of the ResNet (18)")
    parser.add_argument("--classes", type=int, default=80, help="classes (80)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods to time")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    keep_memory()
    batch, rows = images(args.size, args.batch, args.classes), []
    with tempfile.TemporaryDirectory() as directory:
        counts = long_tail(args.classes, str(Path(directory) / "statistics.json"))

        def step_of(model: str, method: str) -> Callable[[], None]:
            return training_step(config(model, method, args.classes, counts, args.depth), batch)

        for model in args.models:
            stock = step_of(model, STOCK)
            stock()
            base = held_and_waited(stock)
            names = [n for n in methods(model) if not args.only or n in args.only]
            for name in tqdm(names, model, leave=False):
                # both are new: where in memory a model lies can cost some percent
                stock = step_of(model, STOCK)
                step = step_of(model, name)
                found = compare(step, stock, args.repeat, base)
                rows.append({"model": model, "method": name, **found})
    machine = about() | {"images": args.batch, "pixels": args.size, "classes": args.classes}
    print(in_words(machine))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"about": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
