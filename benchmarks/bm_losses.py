#!/usr/bin/env python3
"""Forward and backward time of every loss, as a multiple of cross-entropy on the same logits.

    python benchmarks/bm_losses.py [--repeat N] [--only NAME ...] [--shapes PART ...] [--json FILE]

Each loss is timed in turn with the plain loss, in one run, and the medians are compared, so that
other work on the machine meets both. Dense heads are compared with
`binary_cross_entropy_with_logits`, softmax heads with `cross_entropy`. Memory is the peak beyond
the plain loss's, in tensors of the size of the logits. ISR is the time of its weights alone over
that of the loss that they weight. With mmdet 3.3 (`pip install --no-deps mmdet==3.3.0`) and fvcore
their losses are timed in turn with ours, too.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Iterator

import mmdet_losses
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import sigmoid_focal_loss
from measuring import about, in_turn, peak_memory
from tabulate import tabulate
from torch.nn import functional as F
from tqdm import tqdm

from d2_balance.files import atomic_path
from d2_balance.losses import CLS_LOSSES, ClassificationLoss, Samples
from d2_balance.modeling.compatibility import has_class_columns_only
from d2_balance.reweight import ISR

# rows, classes, positives
DENSE = [(10_000, 80, 100), (100_000, 80, 300), (100_000, 80, 3_000), (400_000, 80, 1_000)]
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


def loss_cases(
    device: str, wanted: Callable[[str, str], bool]
) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Shape, name, the loss and the plain loss, for every loss and every shape of its heads.

    One case at a time is built: all of them together take many GB.
    """
    for name, cls in sorted(CLS_LOSSES):
        softmax = cls.activation == "softmax"
        for shapes, kind in ((DENSE, "dense"), (ROI, "RoI")):
            if kind == "dense" and not has_class_columns_only(cls):
                continue
            for rows, classes, positives in shapes:
                shape = f"{kind} {rows:,} x {classes:,}, {positives:,} positive"
                if not wanted(shape, name):
                    continue
                loss = build(name, classes).to(device)
                columns = loss.num_outputs(classes)
                samples = make_samples(rows, columns, classes, positives, device)

                def run(loss=loss, samples=samples) -> None:
                    samples.logits.grad = None
                    loss(fresh(samples)).sum().backward()

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


def peers(device: str) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Shape, name, our loss and another library's, where it can be imported."""
    shapes = {
        "GHMC": (100_000, 80, 300),
        "EQLv2": (1_024, 1_203, 256),
        "Seesaw": (1_024, 1_203, 256),
    }
    for name, (rows, classes, positives) in {**shapes, "Focal": (100_000, 80, 300)}.items():
        loss = build(name, classes).to(device)
        columns = loss.num_outputs(classes)
        samples = make_samples(rows, columns, classes, positives, device)

        def run(loss=loss, samples=samples) -> None:
            samples.logits.grad = None
            loss(fresh(samples)).sum().backward()

        if name == "Focal":
            target = samples.onehot

            def other(samples=samples, target=target) -> None:
                samples.logits.grad = None
                sigmoid_focal_loss(samples.logits, target, 0.25, 2.0, "sum").backward()
        else:
            other = mmdet_losses.cases(samples, name) if device == "cpu" else None
        if other is not None:
            yield f"{rows:,} x {classes:,}", name, run, other
    samples = make_samples(2_048, 81, 80, 512, device)
    other = mmdet_losses.isr(samples) if device == "cpu" else None
    if other is not None:
        ce = F.cross_entropy(samples.logits.detach(), samples.labels, reduction="none")
        isr = ISR()
        yield "2,048 x 80, 512 positive", "ISR", lambda: isr(fresh(samples), ce, ce), other


def logits_bytes(shape: str) -> int:
    """Size of the float32 logits of a shape as `loss_cases` writes it."""
    rows, classes = shape.split(" x ")
    return 4 * int(rows.split()[-1].replace(",", "")) * int(classes.split(", ")[0].replace(",", ""))


def measure(case: tuple[str, str, Callable, Callable], repeat: int, device: str) -> dict:
    """A row of the table."""
    shape, name, run, plain = case
    ours, theirs = in_turn(run, plain, repeat)
    row = {"shape": shape, "loss": name, "ms": 1000 * ours, "times plain": ours / theirs}
    if device == "cpu" and name != "ISR":
        row["extra memory"] = (peak_memory(run) - peak_memory(plain)) / logits_bytes(shape)
    return row


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="timed pairs per line (5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="losses to time")
    parser.add_argument("--shapes", nargs="+", metavar="PART", default=[""], help="parts of shapes")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, others = [], []

    def wanted(shape: str, name: str) -> bool:
        return any(part in shape for part in args.shapes) and (not args.only or name in args.only)

    for case in tqdm(loss_cases(device, wanted), desc="timing", leave=False):
        rows.append(measure(case, args.repeat, device))
    if wanted("RoI", "ISR"):
        rows.append(measure(isr_case(device), args.repeat, device))
    for shape, name, run, other in peers(device):
        if not args.only or name in args.only:
            ours, theirs = in_turn(run, other, args.repeat)
            library = "fvcore" if name == "Focal" else "mmdet 3.3"
            times = {"ms": 1000 * ours, "theirs, ms": 1000 * theirs, "times faster": theirs / ours}
            others.append({"shape": shape, "loss": name, "library": library, **times})
    rows.sort(key=lambda row: row["shape"])
    machine = about()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for table in (rows, others):
        print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".2f"), end="\n\n")
    if not others:
        print("mmdet is not installed: no comparison.")
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"about": machine, "rows": rows, "peers": others}, file, indent=1)


if __name__ == "__main__":
    main()
