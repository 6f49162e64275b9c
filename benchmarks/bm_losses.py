#!/usr/bin/env python3
"""Forward and backward time of every loss, as a multiple of cross-entropy on the same logits.

    python benchmarks/bm_losses.py [--repeat N] [--json FILE]

Each loss is timed in turn with the plain loss, in one run, and the medians are compared, so that
other work on the machine meets both. Dense heads are compared with
`binary_cross_entropy_with_logits`, softmax heads with `cross_entropy`. ISR is the time of its
weights alone over that of the loss that they weight.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from tabulate import tabulate
from torch.nn import functional as F
from tqdm import tqdm

from d2_balance.files import atomic_path
from d2_balance.losses import CLS_LOSSES, ClassificationLoss, Samples
from d2_balance.modeling.compatibility import has_class_columns_only
from d2_balance.reweight import ISR

DENSE = [(100_000, 80, 300), (100_000, 80, 3_000)]  # rows, classes, positives
ROI = [(1_024, 80, 256), (1_024, 1_203, 256), (8_192, 1_203, 2_048)]
ISR_IMAGES, ISR_ROIS = 20, 512


def build(name: str, classes: int) -> ClassificationLoss:
    """A loss with its defaults and counts of a long tail."""
    cls = CLS_LOSSES.get(name)
    count = torch.logspace(4, 0, classes).round()
    data = {
        "class_frequency": count / 20_000,
        "class_count": count,
        "instance_count": 3 * count,
        "num_classes": classes,
    }
    wanted = inspect.signature(cls).parameters.values()
    return cls(**{p.name: data[p.name] for p in wanted if p.default is p.empty})


def make_samples(
    rows: int, columns: int, classes: int, positives: int, device: str, images: int = 2
) -> Samples:
    """Rows as a head gives them in the middle of training: most of them easy background."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=generator) - 4
    labels = torch.full((rows,), classes)
    chosen = torch.randperm(rows, generator=generator)[:positives].sort().values
    labels[chosen] = torch.randint(0, classes, (positives,), generator=generator)
    logits[chosen, labels[chosen]] += 4
    boxes = torch.rand(positives, 4, generator=generator) * 200
    boxes[:, 2:] += boxes[:, :2] + 16
    samples = Samples(
        logits=logits.to(device).requires_grad_(),
        labels=labels.to(device),
        num_classes=classes,
        image=(torch.arange(rows) * images // rows).to(device),
        num_images=images,
        listed=(torch.rand(images, classes, generator=generator) > 0.9).to(device),
        pred_deltas=(torch.randn(positives, 4, generator=generator) * 0.1).to(device),
        boxes=boxes.to(device),
        gt_boxes=(boxes + 2).to(device),
        gt_index=(torch.arange(positives) // 6).to(device),
        box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
    )
    return samples


def plain_loss(samples: Samples, softmax: bool) -> Callable[[], None]:
    """Cross-entropy with backward on the logits of the samples."""
    logits, labels = samples.logits, samples.labels
    if softmax:
        columns = samples.num_classes + 1
        return lambda: F.cross_entropy(logits[:, :columns], labels, reduction="sum").backward()
    target, columns = samples.onehot, samples.num_classes
    return lambda: F.binary_cross_entropy_with_logits(
        logits[:, :columns], target, reduction="sum"
    ).backward()


def fresh(samples: Samples) -> Samples:
    """The samples without what they have computed for themselves."""
    return Samples(**{name: getattr(samples, name) for name in samples.__dataclass_fields__})


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratio(
    run: Callable[[], object], plain: Callable[[], object], repeat: int, device: str
) -> tuple[float, float]:
    """Median seconds of `run`, and as a multiple of the median of `plain`; they take turns."""
    run(), plain()
    pairs = [(seconds(run, device), seconds(plain, device)) for _ in range(repeat)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return ours, ours / theirs


def loss_cases(
    device: str, only: list[str] | None = None
) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Shape, name, the loss and the plain loss, for every loss and every shape of its heads.

    One case at a time is built: all of them together take many GB.
    """
    for name, cls in sorted(CLS_LOSSES):
        if only and name not in only:
            continue
        softmax = cls.activation == "softmax"
        for shapes, kind in ((DENSE, "dense"), (ROI, "RoI")):
            if kind == "dense" and not has_class_columns_only(cls):
                continue
            for rows, classes, positives in shapes:
                loss = build(name, classes).to(device)
                columns = loss.num_outputs(classes)
                samples = make_samples(rows, columns, classes, positives, device)

                def run(loss=loss, samples=samples) -> None:
                    samples.logits.grad = None
                    loss(fresh(samples)).sum().backward()

                shape = f"{kind} {rows:,} x {classes:,}, {positives:,} positive"
                yield shape, name, run, plain_loss(samples, softmax)


def isr_case(device: str) -> tuple[str, str, Callable, Callable]:
    """The weights of ISR on the RoIs of a large batch, and the loss that they weight."""
    rows = ISR_IMAGES * ISR_ROIS
    samples = make_samples(rows, 81, 80, rows // 4, device, ISR_IMAGES)
    ce = F.cross_entropy(samples.logits.detach(), samples.labels, reduction="none")
    isr = ISR()

    def run() -> None:
        with torch.no_grad():
            isr(fresh(samples), ce, ce)

    shape = f"RoI {ISR_IMAGES} pictures x {ISR_ROIS}, {rows // 4:,} positive"
    return shape, "ISR", run, plain_loss(samples, softmax=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7, help="timed pairs per line (7)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="losses to time")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    about = f"torch {torch.__version__}, {device} {machine}, {torch.get_num_threads()} threads"
    cases = loss_cases(device, args.only)
    if not args.only or "ISR" in args.only:
        cases = itertools.chain(cases, [isr_case(device)])
    rows = []
    for shape, name, run, plain in tqdm(cases, desc="timing", leave=False):
        took, times = ratio(run, plain, args.repeat, device)
        rows.append({"shape": shape, "loss": name, "ms": 1000 * took, "times plain": times})
    rows.sort(key=lambda row: row["shape"])
    print(about)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
