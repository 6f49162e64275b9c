"""Counts the samples (anchors, proposals) of an image by the rules of the model's training."""

from __future__ import annotations

import copy
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
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import rpn
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

RETINANET, FCOS, RPN, ROI_HEADS = PARTS = ("RetinaNet", "FCOS", "RPN", "ROIHeads")

# ((height, width), boxes (M, 4)) -> (positives, samples that are not ignored)
SampleCounter = Callable[[tuple[int, int], Tensor], tuple[int, int]]


def sample_counters(cfg: CfgNode) -> dict[str, SampleCounter]:
    """One counter for each part of the configured model that has a classifier of samples.

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
    if issubclass(arch, fcos.FCOS):
        return {FCOS: PointCounter(cfg, backbone)}
    counters: dict[str, SampleCounter] = {}
    if issubclass(arch, GeneralizedRCNN | ProposalNetwork):
        generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        if generator in PROPOSAL_GENERATOR_REGISTRY and issubclass(
            PROPOSAL_GENERATOR_REGISTRY.get(generator), rpn.RPN
        ):
            with torch.device("meta"):
                parts = rpn.RPN.from_config(cfg, shapes)
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
        shapes = [backbone.output_shape()[name] for name in features]
        self._shapes = shapes
        self._grid = AnchorGrid(backbone, shapes, build_anchor_generator(cfg, shapes))
        self._matcher = parts["anchor_matcher"]
        self._boundary = parts.get("anchor_boundary_thresh", -1)
        self.levels = list(features)
        self.low_quality: bool = self._matcher.allow_low_quality_matches
        # thresholds run from -inf to inf, one label for each interval between two of them
        labels = self._matcher.labels
        self.threshold = float(self._matcher.thresholds[labels.index(1)])

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        positives, samples = zip(*self.by_level(size, boxes), strict=True)
        return sum(positives), sum(samples)

    def with_anchors(self, cfg: CfgNode) -> AnchorCounter:
        """The same counter with the anchors of another MODEL.ANCHOR_GENERATOR."""
        other = copy.copy(self)
        other._grid = self._grid.with_generator(build_anchor_generator(cfg, self._shapes))
        return other

    def by_level(self, size: tuple[int, int], boxes: Tensor) -> list[tuple[int, int]]:
        """Positives and samples of each feature map, in the order of `levels`."""
        grid = self._grid(size)
        anchors = Boxes.cat(grid)
        _, labels = self._matcher(pairwise_iou(Boxes(boxes), anchors))
        if self._boundary >= 0:
            labels[~anchors.inside_box(size, self._boundary)] = -1
        return [
            (int((part == 1).sum()), int((part >= 0).sum()))
            for part in labels.split([len(level) for level in grid])
        ]

    def best_iou(self, size: tuple[int, int], boxes: Tensor) -> Tensor:
        """(M,) highest IoU of each box with an anchor that is not ignored at the border."""
        if self._boundary < 0 and type(self._grid.generator) is DefaultAnchorGenerator:
            return self._grid.best_iou(size, boxes)
        anchors = Boxes.cat(self._grid(size))
        if self._boundary >= 0:
            anchors = anchors[anchors.inside_box(size, self._boundary)]
        if not len(anchors):
            return torch.zeros(len(boxes))
        parts = boxes.split(64)  # with a whole grid of anchors, a few boxes at a time
        return torch.cat([pairwise_iou(Boxes(part), anchors).amax(dim=1) for part in parts])


class PointCounter:
    """Anchor points of FCOS, which ignores none; labelled by Detectron2's class without a head.

    Args:
        cfg: full config.
        backbone: gives strides and padding.
    """

    def __init__(self, cfg: CfgNode, backbone: Backbone) -> None:
        node, shapes = cfg.MODEL.FCOS, backbone.output_shape()
        self._model = fcos.FCOS(
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
        self.levels = list(node.IN_FEATURES)

    def __call__(self, size: tuple[int, int], boxes: Tensor) -> tuple[int, int]:
        positives, samples = zip(*self.by_level(size, boxes), strict=True)
        return sum(positives), sum(samples)

    def by_level(self, size: tuple[int, int], boxes: Tensor) -> list[tuple[int, int]]:
        """Positives and samples of each feature map, in the order of `levels`."""
        classes = torch.zeros(len(boxes), dtype=torch.int64)
        objects = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
        grid = self._grid(size)
        (labels,), _ = self._model.label_anchors(grid, [objects])
        parts = labels.split([len(level) for level in grid])
        return [(int((part == 0).sum()), len(part)) for part in parts]


class AnchorGrid:
    """Anchors of an image by its size, from the shapes of the feature maps alone."""

    def __init__(self, backbone: Backbone, shapes: list[ShapeSpec], generator: nn.Module) -> None:
        self._padding = {
            "size_divisibility": backbone.size_divisibility,
            "padding_constraints": backbone.padding_constraints,
        }
        self._strides = [shape.stride for shape in shapes]
        self.generator = generator
        self._known: tuple[list[tuple[int, int]], list[Boxes]] | None = None

    def with_generator(self, generator: nn.Module) -> AnchorGrid:
        """The same feature maps with other anchors."""
        other = copy.copy(self)
        other.generator, other._known = generator, None
        return other

    def __call__(self, size: tuple[int, int]) -> list[Boxes]:
        """Anchors of each level for one image of (height, width)."""
        shapes = self._map_sizes(size)
        if self._known is None or self._known[0] != shapes:
            maps = [torch.empty(1, 1, *shape, device="meta") for shape in shapes]
            self._known = shapes, self.generator(maps)
        return self._known[1]

    def best_iou(self, size: tuple[int, int], boxes: Tensor) -> Tensor:
        """(M,) highest IoU of each box with an anchor, for Detectron2's own generator.

        Anchors of one shape overlap a box most where their centre is nearest to its centre, in x
        and in y: only these are compared, not the whole grid.
        """
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2  # (M, 2) x, y
        best = torch.zeros(len(boxes))
        cells: Any = self.generator.cell_anchors
        for shape, stride, cell in zip(self._map_sizes(size), self._strides, cells, strict=True):
            start = self.generator.offset * stride
            last = torch.tensor([shape[1] - 1, shape[0] - 1])
            place = torch.minimum(((centre - start) / stride).round().clamp(min=0), last)
            shift = (place * stride + start).repeat(1, 2)  # (M, 4)
            anchors = shift[:, None] + cell[None]  # (M, A, 4)
            corner = torch.maximum(anchors[..., :2], boxes[:, None, :2])
            overlap = (torch.minimum(anchors[..., 2:], boxes[:, None, 2:]) - corner).clamp(min=0)
            inter = overlap.prod(dim=2)
            area = (cell[:, 2:] - cell[:, :2]).prod(dim=1)
            union = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None] + area - inter
            best = torch.maximum(best, (inter / union).amax(dim=1))
        return best

    def _map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each feature map."""
        blank = torch.empty(1, *size, device="meta")
        padded = ImageList.from_tensors([blank], **self._padding).tensor.shape[-2:]
        return [tuple(-(-edge // stride) for edge in padded) for stride in self._strides]
