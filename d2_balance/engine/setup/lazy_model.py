"""The losses of this package in a lazy config of Detectron2: swaps targets, fills in the data.

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
balance_model(model, "my_train", num_classes=30, cls_loss=L(EQLLoss)(lambda_=0.01))
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.utils.registry import locate
from fvcore.common.registry import Registry
from omegaconf import DictConfig
from torch import Tensor, nn

from d2_balance.data.class_counts import ClassCounts
from d2_balance.data.image_labels import ImageLabels
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling import (
    BalancedCascadeROIHeads,
    BalancedFastRCNNOutputLayers,
    BalancedFCOS,
    BalancedPanopticFPN,
    BalancedRCNN,
    BalancedRes5ROIHeads,
    BalancedRetinaNet,
    BalancedRPN,
    BalancedStandardROIHeads,
)
from d2_balance.modeling.build import DATA_ARGUMENTS, NUM_CLASSES
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS
from d2_balance.utils.names import closest

BALANCED = {
    GeneralizedRCNN: BalancedRCNN,
    PanopticFPN: BalancedPanopticFPN,
    RetinaNet: BalancedRetinaNet,
    FCOS: BalancedFCOS,
    StandardROIHeads: BalancedStandardROIHeads,
    CascadeROIHeads: BalancedCascadeROIHeads,
    Res5ROIHeads: BalancedRes5ROIHeads,
    FastRCNNOutputLayers: BalancedFastRCNNOutputLayers,
    RPN: BalancedRPN,
}
_FEDERATED_KEYS = (
    "use_sigmoid_ce",
    "use_fed_loss",
    "fed_loss_num_classes",
    "get_fed_cls_weights",
)


def dataset_quantity(names: str | Sequence[str], num_classes: int, quantity: str) -> Tensor:
    """Return a quantity of training sets for the constructor of a loss.

    Images without objects are left out, as Detectron2's loader leaves them out.

    Args:
        names: of the datasets.
        num_classes: K.
        quantity: "class_frequency", "class_count" or "instance_count".

    Returns:
        (K,) float64.
    """
    names = [names] if isinstance(names, str) else list(names)
    counts = ClassCounts.from_dataset_dicts(get_detection_dataset_dicts(names), num_classes)
    return torch.as_tensor(DATA_ARGUMENTS[quantity](counts)).double()


def balance_model(
    model: DictConfig,
    train: str | Sequence[str],
    *,
    num_classes: int | None = None,
    cls_loss: str | type | DictConfig | None = None,
    box_loss: str | type | DictConfig | None = None,
    reweighters: Sequence[str | type | DictConfig] = (),
    proposal_sampler: str | type | DictConfig | None = None,
    anchor_sampler: str | type | DictConfig | None = None,
    rpn_cls_loss: str | type | DictConfig | None = None,
    rpn_box_loss: str | type | DictConfig | None = None,
    rpn_anchor_sampler: str | type | DictConfig | None = None,
    **arguments: Any,
) -> DictConfig:
    """Give a lazy model of Detectron2 the losses of this package.

    Stock classes become the balanced ones. The output layers' federated keys (`use_sigmoid_ce`,
    `use_fed_loss` and what belongs to them) are taken out; without a `cls_loss` they are
    translated to SigmoidCE or Federated. What a loss takes from the data (class counts,
    frequencies) is filled in. Every stage of a cascade gets losses of its own.

    Args:
        model: of a config such as common/models/mask_rcnn_fpn.py; changed in place.
        train: names of the training sets, which the class quantities are counted on.
        num_classes: K; None keeps the model's.
        cls_loss: name, class, or `L(Loss)(...)`; None keeps the stock loss.
        box_loss: likewise.
        reweighters: likewise, each.
        proposal_sampler: likewise; of RoI heads.
        anchor_sampler: likewise; of dense models.
        rpn_cls_loss: likewise, of the RPN.
        rpn_box_loss: likewise, of the RPN.
        rpn_anchor_sampler: likewise, of the RPN.
        **arguments: of the balanced output layers or dense model, such as `box_weight=10.0`.

    Returns:
        The model.

    Raises:
        ValueError: a part has no balanced form, or a name is unknown.
    """
    train = [train] if isinstance(train, str) else list(train)
    has_rois = "roi_heads" in model
    classes = model.roi_heads if has_rois else model
    if num_classes is not None:
        classes.num_classes = num_classes
    _balance(model, "model")
    model.image_labels = L(ImageLabels)(
        dataset_names=train,
        num_classes="${..roi_heads.num_classes}" if has_rois else "${..num_classes}",
    )
    known = (train, classes.num_classes)
    if not has_rois:
        _set_losses(model, known, cls_loss, box_loss, reweighters, anchor_sampler)
        model.update(arguments)
        return model
    if anchor_sampler is not None:
        raise ValueError(
            "anchor_sampler samples the anchors of dense models; must be rpn_anchor_sampler, or "
            "proposal_sampler for RoI heads"
        )
    heads = model.roi_heads
    _balance(heads, "model.roi_heads")
    if proposal_sampler is not None:
        heads.proposal_sampler = _part(proposal_sampler, PROPOSAL_SAMPLERS, *known)
    if any(part is not None for part in (rpn_cls_loss, rpn_box_loss, rpn_anchor_sampler)):
        rpn = model.proposal_generator
        _balance(rpn, "model.proposal_generator")
        _set_losses(rpn, (train, 1), rpn_cls_loss, rpn_box_loss, (), rpn_anchor_sampler)
    for stage in output_layers(model):
        _balance(stage, "model.roi_heads.box_predictor")
        federated = {key: stage.pop(key, None) for key in _FEDERATED_KEYS}
        chosen = cls_loss
        if chosen is None and federated["use_fed_loss"]:
            sampled = federated["fed_loss_num_classes"] or 50
            chosen = L(CLS_LOSSES.get("Federated"))(num_sampled=sampled)
        elif chosen is None and federated["use_sigmoid_ce"]:
            chosen = "SigmoidCE"
        _set_losses(stage, known, chosen, box_loss, reweighters)
        stage.update(copy.deepcopy(arguments))
    return model


def output_layers(model: DictConfig) -> list[DictConfig]:
    """Return the output layers of a lazy model: one of each cascade stage, or the dense model."""
    if "roi_heads" not in model:
        return [model]
    heads = model.roi_heads
    return list(heads.box_predictors) if "box_predictors" in heads else [heads.box_predictor]


def target(node: DictConfig) -> Any:
    """Return what a lazy node calls, which its config may name."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def _balance(node: DictConfig, name: str) -> None:
    stock = target(node)
    if stock in BALANCED:
        node._target_ = BALANCED[stock]
    elif stock not in BALANCED.values() and str(stock.__module__).startswith("detectron2."):
        allowed = ", ".join(cls.__name__ for cls in BALANCED)
        raise ValueError(
            f"{name}: {stock.__name__} has no balanced form; it must be one of {allowed}"
        )


def _set_losses(
    node: DictConfig,
    known: tuple[list[str], int],
    cls_loss: str | type | DictConfig | None,
    box_loss: str | type | DictConfig | None,
    reweighters: Sequence[str | type | DictConfig],
    anchor_sampler: str | type | DictConfig | None = None,
) -> None:
    for name, loss, registry in (
        ("cls_loss", cls_loss, CLS_LOSSES),
        ("box_loss", box_loss, BOX_LOSSES),
        ("anchor_sampler", anchor_sampler, ANCHOR_SAMPLERS),
    ):
        if loss is not None:
            node[name] = _part(loss, registry, *known)
    if reweighters:
        parts = [_part(each, REWEIGHTERS, *known) for each in reweighters]
        node.reweighters = L(nn.ModuleList)(modules=parts)


def _part(
    given: str | type | DictConfig, registry: Registry, train: list[str], num_classes: int
) -> DictConfig:
    """Return the lazy call of a loss, with its data quantities filled in."""
    if isinstance(given, str):
        if given not in registry:
            raise ValueError(f"{given!r} is unknown; {closest(given, (n for n, _ in registry))}")
        given = registry.get(given)
    node: DictConfig = copy.deepcopy(given) if isinstance(given, DictConfig) else L(given)()
    for name, parameter in inspect.signature(target(node)).parameters.items():
        if name in node or parameter.default is not parameter.empty:
            continue
        if name == NUM_CLASSES:
            node[name] = num_classes
        elif name in DATA_ARGUMENTS:
            node[name] = L(dataset_quantity)(names=train, num_classes=num_classes, quantity=name)
    return node


def use_datasets(
    dataloader: DictConfig, *, train: str | Sequence[str], test: str | Sequence[str]
) -> DictConfig:
    """Train and test a lazy config on other datasets, with the evaluator that each of them needs.

    Own annotation files are registered by `run = dict(DATASETS=dict(REGISTER=[[name, json,
    images]]))` in the config, so that they are known again when the run is resumed.

    Args:
        dataloader: of a config such as common/data/coco.py; changed in place.
        train: names of the training sets.
        test: names of the test sets.

    Returns:
        The dataloader.
    """
    dataloader.train.dataset.names = train
    dataloader.test.dataset.names = test
    dataloader.pop("evaluator", None)
    return dataloader
