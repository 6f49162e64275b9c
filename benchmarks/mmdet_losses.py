"""The losses of mmdet 3.3 without mmcv: its loss files, behind stand-ins for what they import.

The extra `bench` brings mmdet from the registry without mmcv, which it does not ask for; nothing
of mmcv's compiled part is needed. `pip install --no-deps mmdet==3.3.0` is enough, too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from d2_balance.losses.samples import paired_iou


def _registry() -> types.SimpleNamespace:
    return types.SimpleNamespace(register_module=lambda *args, **kwargs: lambda cls: cls)


def load(name: str) -> types.ModuleType | None:
    """The module `mmdet.models.losses.<name>`, or None without mmdet."""
    try:
        files = importlib.metadata.files("mmdet") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    place = next((file.locate() for file in files if str(file).endswith(f"losses/{name}.py")), None)
    if place is None:
        return None
    folder = Path(place).parent
    for package, path in {
        "mmdet": folder.parents[1],
        "mmdet.models": folder.parent,
        "mmdet.models.losses": folder,
    }.items():
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(path)]  # a package whose own __init__ is not run
    _stand_in("mmdet.registry", MODELS=_registry())
    _stand_in("mmengine", logging=None)
    _stand_in("mmengine.logging", print_log=lambda *args, **kwargs: None)
    _stand_in("mmdet.structures", bbox=None)
    _stand_in("mmdet.structures.bbox", bbox_overlaps=_overlaps)
    _stand_in("mmdet.models.task_modules", coders=None)
    _stand_in("mmdet.models.task_modules.coders", BaseBBoxCoder=object)
    _stand_in("mmdet.models.task_modules.samplers", SamplingResult=object)
    return importlib.import_module(f"mmdet.models.losses.{name}")


def _stand_in(name: str, **content: object) -> None:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(content)


def _overlaps(boxes: Tensor, others: Tensor, is_aligned: bool = False) -> Tensor:
    return paired_iou(boxes, others) if is_aligned else box_iou(boxes, others)


class _Decoder:
    """A box coder whose deltas are boxes."""

    def decode(self, rois: Tensor, deltas: Tensor) -> Tensor:
        return deltas


def isr(samples, k: float = 2.0) -> Callable[[], object] | None:
    """mmdet's `isr_p` on the samples; boxes are decoded beforehand, which favours mmdet."""
    module = load("pisa_loss")
    if module is None:
        return None
    labels, pos = samples.labels, samples.pos
    rows = labels.new_zeros(len(labels), 4, dtype=torch.float32)
    pred, target = rows.clone(), rows.clone()
    pred[pos], target[pos] = samples.pred_boxes.detach(), samples.gt_boxes
    sampling = [types.SimpleNamespace(pos_assigned_gt_inds=samples.gt_index)]
    logits = samples.logits.detach()

    def loss_cls(score, label, reduction_override):
        return F.cross_entropy(score, label, reduction=reduction_override)

    def run() -> object:
        targets = (labels, torch.ones(len(labels)), target, torch.ones_like(target))
        return module.isr_p(
            logits, pred, targets, rows, sampling, loss_cls, _Decoder(), k, 0, samples.num_classes
        )

    return run


def cases(samples, name: str) -> Callable[[], None] | None:
    """Forward and backward of mmdet's GHMC, EQLv2 or Seesaw on the samples; None: not there."""
    file = {"GHMC": "ghm_loss", "EQLv2": "eqlv2_loss", "Seesaw": "seesaw_loss"}[name]
    module = load(file)
    if module is None:
        return None
    logits, labels, classes = samples.logits, samples.labels, samples.num_classes
    if name == "GHMC":
        loss = module.GHMC(bins=30, momentum=0.75)
        target, weight = samples.onehot, torch.ones_like(samples.onehot)
        compute = lambda: loss(logits, target, weight)  # noqa: E731
    elif name == "EQLv2":
        loss = module.EQLV2Loss(num_classes=classes)
        compute = lambda: loss(logits, labels)  # noqa: E731
    else:
        loss = module.SeesawLoss(num_classes=classes)
        compute = lambda: sum(v for k, v in loss(logits, labels).items() if "loss" in k)  # noqa: E731

    def run() -> None:
        logits.grad = None
        compute().backward()

    return run
