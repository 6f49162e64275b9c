"""The losses, their inputs and what they are compared with, for bm_losses.py."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mmdet_losses
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

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
        image_index=(torch.arange(rows) * images // rows).to(device),
        num_images=images,
        verified=(torch.rand(images, classes, generator=generator) > 0.9).to(device),
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


def training_step(loss: ClassificationLoss, samples: Samples) -> Callable[[], None]:
    """Forward and backward of a loss."""

    def run() -> None:
        samples.logits.grad = None
        loss(fresh(samples)).sum().backward()

    return run


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

                yield shape, name, training_step(loss, samples), plain_loss(samples, softmax)


def compiled_cases(
    device: str, wanted: Callable[[str, str], bool]
) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Shape, name, the loss and its compiled plain formula, on one shape of each kind of head."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.losses.test_fast_forms import PLAIN

    for name, cls in sorted(CLS_LOSSES):
        rows, classes, positives = DENSE[1] if has_class_columns_only(cls) else ROI[2]
        shape = f"{rows:,} x {classes:,}, {positives:,} positive"
        if name not in PLAIN or not wanted(shape, name):
            continue
        loss = build(name, classes).to(device)
        samples = make_samples(rows, loss.num_outputs(classes), classes, positives, device)
        formula = torch.compile(functools.partial(PLAIN[name], loss))

        def compiled(samples=samples, formula=formula) -> None:
            samples.logits.grad = None
            formula(fresh(samples)).sum().backward()

        yield shape, name, training_step(loss, samples), compiled


def isr_case(device: str) -> tuple[str, str, Callable, Callable]:
    """The weights of ISR on the RoIs of a large batch, and the loss that they weight."""
    rows = ISR_IMAGES * ISR_ROIS
    samples = make_samples(rows, 81, 80, rows // 4, device, ISR_IMAGES)
    ce = F.cross_entropy(samples.logits.detach(), samples.labels, reduction="none")
    isr = ISR()

    def run() -> None:
        with torch.no_grad():
            isr(fresh(samples), ce, ce)

    shape = f"RoI {ISR_IMAGES} images x {ISR_ROIS}, {rows // 4:,} positive"
    return shape, "ISR", run, plain_loss(samples, softmax=True)


def peers(device: str) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Shape, name, our loss and another library's, where it can be imported."""
    shapes = {
        "GHMC": (100_000, 80, 300),
        "EQLv2": (1_024, 1_203, 256),
        "Seesaw": (1_024, 1_203, 256),
        "QFL": (100_000, 80, 300),
        "VFL": (100_000, 80, 300),
    }
    for name, (rows, classes, positives) in {**shapes, "Focal": (100_000, 80, 300)}.items():
        loss = build(name, classes).to(device)
        columns = loss.num_outputs(classes)
        samples = make_samples(rows, columns, classes, positives, device)

        run = training_step(loss, samples)
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
