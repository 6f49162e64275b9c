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

from d2_balance.losses._samples import paired_iou


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
    directory = Path(place).parent
    for package, path in {
        "mmdet": directory.parents[1],
        "mmdet.models": directory.parent,
        "mmdet.models.losses": directory,
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
    """Mmdet's `isr_p` on the samples; boxes are decoded beforehand, which favours mmdet."""
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


FILES = {
    "GHMC": "ghm_loss",
    "EQLv2": "eqlv2_loss",
    "Seesaw": "seesaw_loss",
    "QFL": "gfocal_loss",
    "VFL": "varifocal_loss",
}


def cases(samples, name: str) -> Callable[[], None] | None:
    """Forward and backward of mmdet's loss of a name in `FILES`; None: mmdet is not there."""
    module = load(FILES[name])
    if module is None:
        return None
    logits, labels, classes = samples.logits, samples.labels, samples.num_classes
    quality = labels.new_zeros(len(labels), dtype=logits.dtype)
    quality[samples.pos] = samples.iou.to(quality.dtype)  # beforehand, which favours mmdet
    compute: dict[str, Callable[[], Tensor]] = {
        "GHMC": lambda: loss(logits, samples.onehot, everywhere),
        "EQLv2": lambda: loss(logits, labels),
        "Seesaw": lambda: sum(v for k, v in loss(logits, labels).items() if "loss" in k),
        "QFL": lambda: module.quality_focal_loss(logits, (labels, quality), reduction="sum"),
        "VFL": lambda: module.varifocal_loss(logits, soft, reduction="sum"),
    }
    if name == "GHMC":
        loss, everywhere = module.GHMC(bins=30, momentum=0.75), torch.ones_like(samples.onehot)
    elif name == "EQLv2":
        loss = module.EQLV2Loss(num_classes=classes)
    elif name == "Seesaw":
        loss = module.SeesawLoss(num_classes=classes)
    elif name == "VFL":
        soft = samples.onehot * quality.unsqueeze(1)

    def run() -> None:
        logits.grad = None
        compute[name]().backward()

    return run
