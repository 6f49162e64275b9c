"""From MODEL.BALANCE to loss objects, with every error raised before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2_balance.data.class_counts import FROM_CHECKPOINT
from d2_balance.data.model_classes import class_counts, saved_loss_state
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from d2_balance.reweight import REWEIGHTERS, GuidedScale
from d2_balance.sampling import PROPOSAL_SAMPLERS, ProposalSampler

from .compatibility import HEADS, check_pairing, check_proposal_sampler

# Constructor arguments without a default are quantities of the training set.
DATA_ARGUMENTS = {
    "class_frequency": lambda statistics: statistics.frequency,
    "class_count": lambda statistics: statistics.image_count,
    "instance_count": lambda statistics: statistics.instance_count,
}
NUM_CLASSES = "num_classes"  # the one argument without a default that the model knows itself


@contextmanager
def renamed(namespace: dict[str, Any], **classes: Any) -> Iterator[None]:
    """Let the functions of a module find other classes under these names inside of the block.

    Detectron2's builders name the classes that they make. Making ours behind theirs would take
    other random numbers for the weights than a stock model.

    Args:
        namespace: `vars` of the module; the names are as before afterwards.
        **classes: name to class.
    """
    before = {name: namespace[name] for name in classes}
    namespace.update(classes)
    try:
        yield
    finally:
        namespace.update(before)


def argument_key(argument: str) -> str:
    """The config key of a constructor argument: `lambda_` is LAMBDA."""
    return argument.rstrip("_").upper()


def class_quantity(cfg: CfgNode, name: str, num_classes: int) -> Tensor:
    """Return a quantity of the training set for each class.

    Args:
        cfg: full config; `data.model_classes.class_counts` says where the counts come from.
        name: one of `DATA_ARGUMENTS`.
        num_classes: K.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the counts have another number of classes, or cannot be had.
    """
    values = torch.as_tensor(DATA_ARGUMENTS[name](class_counts(cfg)))
    if len(values) != num_classes:
        raise ValueError(
            f"{name} has {len(values)} entries, one for each class of the training set, but the "
            f"model has {num_classes} classes; set MODEL.ROI_HEADS.NUM_CLASSES or "
            f"MODEL.RETINANET.NUM_CLASSES, or give a fitting MODEL.BALANCE.CLASS_COUNTS_FILE."
        )
    return values.double()


def loss_quantity(cfg: CfgNode, name: str, num_classes: int) -> Tensor:
    """Return `class_quantity` for the constructor of a loss, which keeps it in its buffers.

    Zeros stand for values that come with the weights: where CLASS_COUNTS_FILE is "checkpoint", and
    where neither the training set nor its counts are here, but the buffers lie in MODEL.WEIGHTS.
    """
    zeros = torch.zeros(num_classes, dtype=torch.float64)
    if cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == FROM_CHECKPOINT:
        return zeros
    try:
        return class_quantity(cfg, name, num_classes)
    except ValueError:
        here = all(dataset in DatasetCatalog for dataset in cfg.DATASETS.TRAIN)
        if here or not saved_loss_state(cfg.MODEL.WEIGHTS):
            raise
        return zeros


def check_class_quantities(cls_loss: ClassificationLoss, num_classes: int) -> None:
    """Refuses a loss that was made for another number of classes, as Python code may hand over.

    Raises:
        ValueError: naming the argument and the length that is allowed.
    """
    for name in DATA_ARGUMENTS:
        values = getattr(cls_loss, name, None)
        if values is not None and len(values) != num_classes:
            raise ValueError(
                f"{cls_loss.name}: {name} has {len(values)} entries; must be one for "
                f"each of the model's {num_classes} classes."
            )


def _lookup(registry: Registry, key: str, name: str) -> Any:
    if name not in registry:
        names = ", ".join(sorted(known for known, _ in registry))
        raise ValueError(f"MODEL.BALANCE.{key}: {name!r} is unknown; allowed: {names}.")
    return registry.get(name)


def one_class_losses(registry: Registry) -> Iterator[tuple[str, type]]:
    """Names and classes of the losses that can train the RPN.

    It has one class, object, and one sigmoid column: nothing is counted per class, and there are
    no outputs besides.
    """
    allowed = HEADS["the RPN"].cls_losses
    for name, cls in registry:
        if registry is not CLS_LOSSES or cls in allowed:
            yield name, cls


def _node(cfg: CfgNode, part: str) -> CfgNode:
    """MODEL.BALANCE, or the node of a part with losses of its own ("RPN")."""
    return cfg.MODEL.BALANCE[part] if part else cfg.MODEL.BALANCE


def _construct(
    cfg: CfgNode, key: str, registry: Registry, name: str, num_classes: int, part: str = ""
) -> Any:
    place = f"{part}." if part else ""
    cls = _lookup(registry, place + key, name)
    if part == "RPN" and registry is CLS_LOSSES:  # before it asks for what the RPN does not have
        check_pairing("the RPN", cls, BOX_LOSSES.get("SmoothL1"))
    node = _node(cfg, part).get(name.upper(), {})
    arguments = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name == NUM_CLASSES:
            arguments[parameter.name] = num_classes
        elif parameter.default is parameter.empty:
            arguments[parameter.name] = loss_quantity(cfg, parameter.name, num_classes)
        else:
            arguments[parameter.name] = node[argument_key(parameter.name)]
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"MODEL.BALANCE.{place}{name.upper()}: {error}") from error


def build_cls_loss(cfg: CfgNode, num_classes: int, part: str = "") -> ClassificationLoss | None:
    """The loss that MODEL.BALANCE.CLS_LOSS names, or None where it is empty (stock loss).

    Args:
        cfg: full config.
        num_classes: K.
        part: "RPN" for the loss of MODEL.BALANCE.RPN.

    Raises:
        ValueError: the name is unknown, an argument out of range, or the loss does not fit the
            part; the message names the key.
    """
    name = _node(cfg, part).CLS_LOSS
    return _construct(cfg, "CLS_LOSS", CLS_LOSSES, name, num_classes, part) if name else None


def build_box_loss(cfg: CfgNode, num_classes: int, part: str = "") -> BoxLoss | None:
    """The loss that MODEL.BALANCE.BOX_LOSS names, or None where it is empty (stock loss).

    Args:
        cfg: full config.
        num_classes: K.
        part: "RPN" for the loss of MODEL.BALANCE.RPN.

    Raises:
        ValueError: the name is unknown, an argument out of range, or the loss does not fit the
            part; the message names the key.
    """
    name = _node(cfg, part).BOX_LOSS
    return _construct(cfg, "BOX_LOSS", BOX_LOSSES, name, num_classes, part) if name else None


def build_reweighters(cfg: CfgNode, num_classes: int) -> nn.ModuleList:
    """The reweighters that MODEL.BALANCE.REWEIGHTERS lists, in order.

    Args:
        cfg: full config.
        num_classes: K.

    Raises:
        ValueError: a name is unknown or an argument out of range; the message names the key.
    """
    for name in cfg.MODEL.BALANCE.REWEIGHTERS:
        if name in PROPOSAL_SAMPLERS:
            raise ValueError(
                f"MODEL.BALANCE.REWEIGHTERS: {name} samples proposals; set "
                f"MODEL.BALANCE.PROPOSAL_SAMPLER {name} instead."
            )
    return nn.ModuleList(
        _construct(cfg, "REWEIGHTERS", REWEIGHTERS, name, num_classes)
        for name in cfg.MODEL.BALANCE.REWEIGHTERS
    )


def build_proposal_sampler(
    cfg: CfgNode, num_classes: int, head: str = "RoI heads"
) -> ProposalSampler | None:
    """The sampler that MODEL.BALANCE.PROPOSAL_SAMPLER names, None if it is empty.

    Args:
        cfg: full config.
        num_classes: K.
        head: entry of `compatibility.HEADS`; one without proposals has no use for a sampler.

    Raises:
        ValueError: the name is unknown, an argument out of range, or the head has no proposals.
    """
    name = cfg.MODEL.BALANCE.PROPOSAL_SAMPLER
    if not name:
        return None
    check_proposal_sampler(head, _lookup(PROPOSAL_SAMPLERS, "PROPOSAL_SAMPLER", name))
    return _construct(cfg, "PROPOSAL_SAMPLER", PROPOSAL_SAMPLERS, name, num_classes)


def build_guided(cfg: CfgNode, part: str = "") -> GuidedScale | None:
    """Guided scaling as GUIDED_SCALE of MODEL.BALANCE, or of its node `part`, says; None: off.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """
    scale, bound = _node(cfg, part).GUIDED_SCALE, cfg.MODEL.BALANCE.GUIDED_MAX_RATIO
    if not scale >= 0 or not bound > 0:
        place = f"{part}." if part else ""
        raise ValueError(
            f"MODEL.BALANCE.{place}GUIDED_SCALE is {scale} and MODEL.BALANCE.GUIDED_MAX_RATIO "
            f"{bound}; must be at least 0, and above 0."
        )
    return GuidedScale(scale, bound) if scale else None


def stock_box_loss(kind: str, beta: float) -> BoxLoss:
    """Detectron2's BBOX_REG_LOSS_TYPE as one of ours.

    Args:
        kind: "smooth_l1" or "giou".
        beta: beta of smooth L1.

    Raises:
        ValueError: no loss of ours stands for `kind`.
    """
    if kind == "smooth_l1":
        return BOX_LOSSES.get("SmoothL1")(beta=beta)
    names = {"giou": "GIoU", "diou": "DIoU", "ciou": "CIoU"}
    if names.get(kind) not in BOX_LOSSES:
        allowed = ["smooth_l1", *(k for k, v in names.items() if v in BOX_LOSSES)]
        raise ValueError(f"BBOX_REG_LOSS_TYPE {kind!r} is unknown; allowed: {', '.join(allowed)}.")
    return BOX_LOSSES.get(names[kind])()
