"""Counts the rows (anchors, proposals) of a picture by the rules of the model's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.fcos import FCOS as PointDetector
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN as RegionProposals
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

from .prior import FCOS, RETINANET, ROI_HEADS, RPN

# ((height, width), boxes (M, 4)) -> (positives, rows that are not ignored)
RowCounter = Callable[[tuple[int, int], Tensor], tuple[int, int]]


def row_counters(cfg: CfgNode) -> dict[str, RowCounter]:
    """One counter for each part of the configured model that has a classifier of rows.

    The backbone is made without memory for its weights, for strides and padding alone.

    Raises:
        ValueError: the model has no such part.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    arch = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else object
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    if issubclass(arch, RetinaNet):
        with torch.device("meta"):
            parts = RetinaNet.from_config(cfg)
        return {RETINANET: AnchorCounter(cfg, backbone, cfg.MODEL.RETINANET.IN_FEATURES, parts)}
    if issubclass(arch, PointDetector):
        return {FCOS: PointCounter(cfg, backbone)}
    counters: dict[str, RowCounter] = {}
    if issubclass(arch, GeneralizedRCNN | ProposalNetwork):
        generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        if generator in PROPOSAL_GENERATOR_REGISTRY and issubclass(
            PROPOSAL_GENERATOR_REGISTRY.get(generator), RegionProposals
        ):
            with torch.device("meta"):
                parts = RegionProposals.from_config(cfg, shapes)
            counters[RPN] = AnchorCounter(cfg, backbone, cfg.MODEL.RPN.IN_FEATURES, parts)
        if issubclass(arch, GeneralizedRCNN):
            counters[ROI_HEADS] = ProposalCounter(cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN)
    if not counters:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {name} has no anchors or proposals whose prior is counted"
        )
    return counters


class ProposalCounter:
    """Proposals of a RoI head that keeps all of them: those of the RPN and the objects.

    At the start of training no proposal fits, and the objects themselves are the positives: a lower
    bound.
    """

    def __init__(self, proposals: int) -> None:
        self._proposals = proposals

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        return len(boxes), self._proposals + len(boxes)


class AnchorCounter:
    """Anchors of RetinaNet or the RPN.

    Args:
        cfg: full config.
        backbone: gives strides and padding.
        features: names of the feature maps with anchors.
        parts: what `from_config` of Detectron2's class returns.
    """

    def __init__(
        self, cfg: CfgNode, backbone: Backbone, features: list[str], parts: dict[str, Any]
    ) -> None:
        shapes = backbone.output_shape()
        self._grid = AnchorGrid(
            backbone,
            [shapes[name] for name in features],
            build_anchor_generator(cfg, [shapes[name] for name in features]),
        )
        self._matcher = parts["anchor_matcher"]
        self._boundary = parts.get("anchor_boundary_thresh", -1)

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        anchors = Boxes.cat(self._grid(size))
        _, labels = self._matcher(pairwise_iou(Boxes(boxes), anchors))
        if self._boundary >= 0:
            labels[~anchors.inside_box(size, self._boundary)] = -1
        return int((labels == 1).sum()), int((labels >= 0).sum())


class PointCounter:
    """Anchor points of FCOS, which ignores none; labelled by Detectron2's class without a head.

    Args:
        cfg: full config.
        backbone: gives strides and padding.
    """

    def __init__(self, cfg: CfgNode, backbone: Backbone) -> None:
        node, shapes = cfg.MODEL.FCOS, backbone.output_shape()
        self._model = PointDetector(
            backbone=backbone,
            head=nn.Identity(),
            head_in_features=node.IN_FEATURES,
            num_classes=1,
            center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
        levels = [shapes[name] for name in node.IN_FEATURES]
        self._grid = AnchorGrid(backbone, levels, self._model.anchor_generator)

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        classes = torch.zeros(len(boxes), dtype=torch.int64)
        objects = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
        (labels,), _ = self._model.label_anchors(self._grid(size), [objects])
        return int((labels == 0).sum()), len(labels)


class AnchorGrid:
    """Anchors of a picture by its size, from the shapes of the feature maps alone."""

    def __init__(self, backbone: Backbone, shapes: list[ShapeSpec], generator: nn.Module) -> None:
        self._padding = {
            "size_divisibility": backbone.size_divisibility,
            "padding_constraints": backbone.padding_constraints,
        }
        self._strides = [shape.stride for shape in shapes]
        self._generator = generator
        self._known: tuple[tuple[int, int], list[Boxes]] | None = None

    def __call__(self, size: tuple[int, int]) -> list[Boxes]:
        """Anchors of each level for one picture of (height, width)."""
        blank = torch.empty(1, *size, device="meta")
        padded = tuple(ImageList.from_tensors([blank], **self._padding).tensor.shape[-2:])
        if self._known is None or self._known[0] != padded:
            maps = [
                torch.empty(1, 1, *(-(-edge // stride) for edge in padded), device="meta")
                for stride in self._strides
            ]
            self._known = padded, self._generator(maps)
        return self._known[1]
