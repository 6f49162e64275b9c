"""From MODEL.BALANCE to loss objects, with every error raised before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2_balance.data.class_counts import FROM_CHECKPOINT, ClassCounts
from d2_balance.data.model_classes import ModelClasses, class_counts, saved_loss_state
from d2_balance.losses import (
    BOX_LOSSES,
    CLS_LOSSES,
    BoxLoss,
    CIoULoss,
    ClassificationLoss,
    DIoULoss,
    GIoULoss,
    SmoothL1Loss,
)
from d2_balance.reweight import REWEIGHTERS, GuidedScale
from d2_balance.sampling import (
    ANCHOR_SAMPLERS,
    PROPOSAL_SAMPLERS,
    AnchorSampler,
    ProposalSampler,
)
from d2_balance.utils.rules import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT_OR_0,
    FRACTION,
    Rule,
    check_values,
    one_of,
)

from .compatibility import HEADS, check_pairing, check_proposal_sampler
from .postprocess.calibration import (
    LINKS,
    REFERENCES,
    FracalSigmoid,
    LogN,
    Reference,
    Shift,
    class_shift,
)
from .postprocess.soft_nms import METHODS
from .postprocess.statistics import FIELDS, CalibrationStatistics, dataset_dimensions

# Constructor arguments without a default are quantities of the training set.
DATA_ARGUMENTS = {
    "class_frequency": lambda statistics: statistics.frequency,
    "class_count": lambda statistics: statistics.image_count,
    "instance_count": lambda statistics: statistics.instance_count,
}
NUM_CLASSES = "num_classes"  # the one argument without a default that the model knows itself

RULES: dict[str, Rule] = {
    "MODEL.BALANCE.GUIDED_SCALE": AT_LEAST_0,
    "MODEL.BALANCE.RPN.GUIDED_SCALE": AT_LEAST_0,
    "MODEL.BALANCE.GUIDED_MAX_RATIO": ("a number above 0", lambda value: value > 0),
    "MODEL.BALANCE.CLASSIFIER": one_of(("linear", "cosine")),
    "MODEL.BALANCE.COSINE.TEMPERATURE": ABOVE_0,
    "MODEL.BALANCE.COSINE.POWER": ABOVE_0,
    "MODEL.BALANCE.MASK_PREDICTOR": one_of(("conv", "normalized")),
    "MODEL.BALANCE.TEST_NMS.METHOD": one_of(METHODS),
    "MODEL.BALANCE.TEST_NMS.IOU": FRACTION,
    "MODEL.BALANCE.TEST_NMS.SIGMA": ABOVE_0,
    "MODEL.BALANCE.TEST_NMS.MIN_SCORE": AT_LEAST_0,
    "MODEL.BALANCE.CALIBRATION.NAME": one_of(("", "logit_adjustment", "fracal", "logn")),
    "MODEL.BALANCE.CALIBRATION.LINK": one_of(("", *LINKS)),
    "MODEL.BALANCE.CALIBRATION.COUNT": one_of(("images", "objects")),
    "MODEL.BALANCE.CALIBRATION.REFERENCE": one_of(REFERENCES),
    "MODEL.BALANCE.CALIBRATION.TAU": AT_LEAST_0,
    "MODEL.BALANCE.CALIBRATION.POWER": AT_LEAST_0,
    "MODEL.BALANCE.CALIBRATION.MOMENTUM": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "MODEL.BALANCE.CALIBRATION.MAX_ITER": COUNT_OR_0,
    "MODEL.BALANCE.NORCAL.GAMMA": AT_LEAST_0,
}
"""What the values of keys must be that the functions below read."""


@contextmanager
def renamed(namespace: dict[str, Any], **classes: Any) -> Iterator[None]:
    """Let the functions of a module use other classes under these names inside of the block.

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
        ValueError: the counts have another number of classes, or are not available.
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

    Zeros stand for values that come with the weights: if CLASS_COUNTS_FILE is "checkpoint", and if
    neither the training set nor its counts are here, but the buffers lie in MODEL.WEIGHTS.
    """
    zeros = torch.zeros(num_classes, dtype=torch.float64)
    if cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == FROM_CHECKPOINT:
        return zeros
    try:
        return class_quantity(cfg, name, num_classes)
    except ValueError:
        registered = all(dataset in DatasetCatalog for dataset in cfg.DATASETS.TRAIN)
        if registered or not saved_loss_state(cfg.MODEL.WEIGHTS):
            raise
        return zeros


def check_class_quantities(cls_loss: ClassificationLoss, num_classes: int) -> None:
    """Refuse a loss that was made for another number of classes, as Python code may hand over.

    Raises:
        ValueError: naming the argument and the length that it must have.
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
        raise ValueError(f"MODEL.BALANCE.{key}: {name!r} is unknown; must be one of {names}.")
    return registry.get(name)


def one_class_losses(registry: Registry) -> Iterator[tuple[str, Any]]:
    """Names and classes of the losses that can train the RPN.

    It has one class, object, and one sigmoid column: nothing is counted per class, and there are
    no outputs besides.
    """
    allowed = HEADS["the RPN"].cls_losses
    for name, cls in registry:
        if registry is not CLS_LOSSES or cls in allowed:
            yield name, cls


def _node(cfg: CfgNode, subnode: str) -> CfgNode:
    """MODEL.BALANCE, or its node for a head with losses of its own ("RPN")."""
    return cfg.MODEL.BALANCE[subnode] if subnode else cfg.MODEL.BALANCE


def _construct(
    cfg: CfgNode,
    key: str,
    registry: Registry,
    name: str,
    num_classes: int,
    subnode: str = "",
    counts: ClassCounts | None = None,
) -> Any:
    prefix = f"{subnode}." if subnode else ""
    cls = _lookup(registry, prefix + key, name)
    if subnode == "RPN" and registry is CLS_LOSSES:  # before it asks for what the RPN does not have
        check_pairing("the RPN", cls, BOX_LOSSES.get("SmoothL1"))
    node = _node(cfg, subnode).get(name.upper(), {})
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name == NUM_CLASSES:
            arguments[parameter.name] = num_classes
        elif parameter.default is parameter.empty:
            arguments[parameter.name] = (
                loss_quantity(cfg, parameter.name, num_classes)
                if counts is None
                else DATA_ARGUMENTS[parameter.name](counts).double()
            )
        else:
            arguments[parameter.name] = node[argument_key(parameter.name)]
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"MODEL.BALANCE.{prefix}{name.upper()}: {error}") from error


def build_cls_loss(
    cfg: CfgNode, num_classes: int, subnode: str = "", counts: ClassCounts | None = None
) -> ClassificationLoss | None:
    """The loss that MODEL.BALANCE.CLS_LOSS names, or None if it is empty (stock loss).

    Args:
        cfg: full config.
        num_classes: K.
        subnode: "RPN" for the loss of MODEL.BALANCE.RPN.
        counts: of the training set; None takes those of the config, see `loss_quantity`.

    Raises:
        ValueError: the name is unknown, an argument out of range, or the loss does not fit the
            head; the message names the key.
    """
    name = _node(cfg, subnode).CLS_LOSS
    if not name:
        return None
    loss: ClassificationLoss = _construct(
        cfg, "CLS_LOSS", CLS_LOSSES, name, num_classes, subnode, counts
    )
    return loss


def build_box_loss(cfg: CfgNode, num_classes: int, subnode: str = "") -> BoxLoss | None:
    """As `build_cls_loss`, for MODEL.BALANCE.BOX_LOSS."""
    name = _node(cfg, subnode).BOX_LOSS
    return _construct(cfg, "BOX_LOSS", BOX_LOSSES, name, num_classes, subnode) if name else None


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
    sampler: ProposalSampler = _construct(
        cfg, "PROPOSAL_SAMPLER", PROPOSAL_SAMPLERS, name, num_classes
    )
    return sampler


def build_anchor_sampler(cfg: CfgNode, num_classes: int, subnode: str = "") -> AnchorSampler | None:
    """The sampler that ANCHOR_SAMPLER of MODEL.BALANCE, or of its `subnode`, names; None if empty.

    Raises:
        ValueError: the name is unknown or an argument out of range; the message names the key.
    """
    name = _node(cfg, subnode).ANCHOR_SAMPLER
    if not name:
        return None
    sampler: AnchorSampler = _construct(
        cfg, "ANCHOR_SAMPLER", ANCHOR_SAMPLERS, name, num_classes, subnode
    )
    return sampler


def build_guided(cfg: CfgNode, subnode: str = "") -> GuidedScale | None:
    """Guided scaling as GUIDED_SCALE of MODEL.BALANCE, or of its `subnode`, says; None if it is 0.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """
    for below in ("MODEL.BALANCE.GUIDED_", "MODEL.BALANCE.RPN.GUIDED_"):
        check_values(cfg, RULES, below)
    scale = _node(cfg, subnode).GUIDED_SCALE
    return GuidedScale(scale, cfg.MODEL.BALANCE.GUIDED_MAX_RATIO) if scale else None


def classifier_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of output layers that MODEL.BALANCE.CLASSIFIER and COSINE set.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """
    check_values(cfg, RULES, "MODEL.BALANCE.CLASSIFIER")
    return {"classifier": cfg.MODEL.BALANCE.CLASSIFIER, "cosine": cosine_arguments(cfg)}


def cosine_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of `CosineLinear` and `NormalizedConv2d`.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """
    check_values(cfg, RULES, "MODEL.BALANCE.COSINE.")
    return {name.lower(): value for name, value in cfg.MODEL.BALANCE.COSINE.items()}


def normalized_masks(cfg: CfgNode) -> bool:
    """Return whether MODEL.BALANCE.MASK_PREDICTOR asks for normalised mask logits.

    Raises:
        ValueError: the value is unknown, or there are no masks.
    """
    check_values(cfg, RULES, "MODEL.BALANCE.MASK_PREDICTOR")
    name: str = cfg.MODEL.BALANCE.MASK_PREDICTOR
    if name == "normalized" and not cfg.MODEL.MASK_ON:
        raise ValueError("MODEL.BALANCE.MASK_PREDICTOR 'normalized' needs MODEL.MASK_ON True.")
    return name == "normalized"


def build_test_nms(cfg: CfgNode) -> dict[str, Any] | None:
    """Return the arguments of `soft_nms` that MODEL.BALANCE.TEST_NMS sets; None for hard.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """
    check_values(cfg, RULES, "MODEL.BALANCE.TEST_NMS.")
    node = cfg.MODEL.BALANCE.TEST_NMS
    if node.METHOD == "hard":
        return None
    names = {"METHOD": "method", "IOU": "iou_threshold", "SIGMA": "sigma", "MIN_SCORE": "min_score"}
    return {argument: node[name] for name, argument in names.items()}


def calibration_name(cfg: CfgNode) -> str:
    """Return what calibrates scores at test time, as `compatibility.Parts` has it."""
    balance = cfg.MODEL.BALANCE
    return balance.CALIBRATION.NAME or ("norcal" if balance.NORCAL.GAMMA else "")


def build_calibration(cfg: CfgNode, num_classes: int, activation: str) -> nn.Module | None:
    """Return what MODEL.BALANCE.CALIBRATION changes in the logits of the K classes at test time.

    NorCal of a softmax is not among it: the output layers apply it to probabilities.

    Args:
        cfg: full config.
        num_classes: K.
        activation: of the loss, see `ClassificationLoss`.

    Returns:
        A module from (..., K) logits to (..., K) logits, or None if there is none.

    Raises:
        ValueError: a value is out of range, or two calibrations are on; the message names the key.
    """
    for below in ("MODEL.BALANCE.CALIBRATION.", "MODEL.BALANCE.NORCAL."):
        check_values(cfg, RULES, below)
    node, gamma = cfg.MODEL.BALANCE.CALIBRATION, cfg.MODEL.BALANCE.NORCAL.GAMMA
    if gamma and node.NAME:
        raise ValueError(
            f"MODEL.BALANCE.CALIBRATION.NAME is {node.NAME!r} and MODEL.BALANCE.NORCAL.GAMMA "
            f"{gamma}: scores are calibrated once; set one of them off."
        )
    if gamma and activation == "sigmoid":
        count = class_quantity(cfg, "class_count", num_classes)
        return Shift(-gamma * count.clamp(min=1).log())
    return _CALIBRATIONS[node.NAME](cfg, num_classes, activation) if node.NAME else None


def _shift(cfg: CfgNode, num_classes: int, link: str, reference: Reference, tau: float) -> Tensor:
    node = cfg.MODEL.BALANCE.CALIBRATION
    counts = class_counts(cfg)
    name = "class_count" if node.COUNT == "images" else "instance_count"
    count = class_quantity(cfg, name, num_classes)
    total = counts.num_images if node.COUNT == "images" else float(count.sum())
    return class_shift(count, total, node.LINK or link, reference, tau)


def _logit_adjustment(cfg: CfgNode, num_classes: int, activation: str) -> nn.Module:
    node = cfg.MODEL.BALANCE.CALIBRATION
    return Shift(_shift(cfg, num_classes, "raw", node.REFERENCE, node.TAU))


def _fracal(cfg: CfgNode, num_classes: int, activation: str) -> nn.Module:
    node = cfg.MODEL.BALANCE.CALIBRATION
    shift = _shift(cfg, num_classes, "base10", "average", 1.0)
    statistics, source = _measured(cfg)
    if statistics is not None and (node.STATISTICS or not _train_sets_here(cfg)):
        dimension = statistics.column("fractal_dimension", num_classes, source)
    else:
        dimension = dataset_dimensions(tuple(cfg.DATASETS.TRAIN), num_classes)
    measured = {"fractal_dimension": dimension.tolist()}
    if activation == "sigmoid":
        return FracalSigmoid(shift, dimension, node.POWER, measured)
    return Shift(shift - node.POWER * dimension.log(), measured)


def _logn(cfg: CfgNode, num_classes: int, activation: str) -> nn.Module:
    statistics, source = _measured(cfg)
    if statistics is None or (statistics.logit_mean is None and source == cfg.MODEL.WEIGHTS):
        if _train_sets_here(cfg):
            return LogN()  # a training collects them at its end
        raise ValueError(
            "MODEL.BALANCE.CALIBRATION.NAME 'logn' needs MODEL.BALANCE.CALIBRATION.STATISTICS, "
            "which is empty; must be a file of `d2-balance calibrate`, as MODEL.WEIGHTS holds none."
        )
    return LogN(*(statistics.column(f, num_classes, source) for f in FIELDS[1:]))


def _train_sets_here(cfg: CfgNode) -> bool:
    """Whether the training sets are here, and counts of a checkpoint are not asked for."""
    here = [name in DatasetCatalog for name in cfg.DATASETS.TRAIN]
    return bool(here) and all(here) and cfg.MODEL.BALANCE.CLASS_COUNTS_FILE != FROM_CHECKPOINT


def _measured(cfg: CfgNode) -> tuple[CalibrationStatistics | None, str]:
    """Statistics of STATISTICS, else those saved with MODEL.WEIGHTS, and the file that has them."""
    path, weights = cfg.MODEL.BALANCE.CALIBRATION.STATISTICS, cfg.MODEL.WEIGHTS
    saved = ModelClasses.of_weights(weights)
    found = saved is not None and saved.calibration is not None
    if path and (PathManager.isfile(path) or not found):
        return CalibrationStatistics.load(path), path
    if saved is None or saved.calibration is None:
        return None, ""
    return CalibrationStatistics.of_values(saved.names, saved.calibration, weights), weights


_CALIBRATIONS = {"logit_adjustment": _logit_adjustment, "fracal": _fracal, "logn": _logn}


def stock_box_loss(loss_type: str, beta: float) -> BoxLoss:
    """Detectron2's BBOX_REG_LOSS_TYPE as one of ours.

    Args:
        loss_type: "smooth_l1" or "giou".
        beta: beta of smooth L1.

    Raises:
        ValueError: no loss of ours stands for `loss_type`.
    """
    if loss_type == "smooth_l1":
        return SmoothL1Loss(beta=beta)
    losses = {"giou": GIoULoss, "diou": DIoULoss, "ciou": CIoULoss}
    if loss_type not in losses:
        raise ValueError(
            f"BBOX_REG_LOSS_TYPE {loss_type!r} is unknown; must be one of smooth_l1, "
            f"{', '.join(losses)}."
        )
    return losses[loss_type]()
