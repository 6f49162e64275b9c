"""Standard and Cascade RoI heads with balanced output layers.

Both differ from Detectron2's in the output layers, and hand them two things that Detectron2 drops:
the image-level labels and the ids of the matched objects. Mask and keypoint heads stay stock.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import nn

from .fast_rcnn import BalancedFastRCNNOutputLayers


class _BatchContext:
    """Gives the output layers the image-level labels and the object ids of a batch."""

    def forward(self, images, features, proposals, targets=None) -> Any:
        if targets is not None:
            number_objects(targets)
        with self._listed(getattr(images, "listed", None)):
            return super().forward(images, features, proposals, targets)

    @contextmanager
    def _listed(self, listed):
        predictor = self.box_predictor
        layers = predictor if isinstance(predictor, nn.ModuleList) else [predictor]
        for layer in layers:
            layer.listed = listed
        try:
            yield
        finally:
            for layer in layers:
                layer.listed = None


def number_objects(targets: list[Instances]) -> None:
    """Sets `gt_index` of every object: 0, 1, ... through the batch.

    Detectron2 gathers all fields that begin with gt_ when it samples proposals.
    """
    first = 0
    for target in targets:
        count = len(target)
        target.gt_index = torch.arange(first, first + count, device=target.gt_classes.device)
        first += count


@ROI_HEADS_REGISTRY.register()
class BalancedStandardROIHeads(_BatchContext, StandardROIHeads):
    """StandardROIHeads with `BalancedFastRCNNOutputLayers`."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_head"].output_shape
        ret["box_predictor"] = BalancedFastRCNNOutputLayers(cfg, shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(_BatchContext, CascadeROIHeads):
    """CascadeROIHeads with `BalancedFastRCNNOutputLayers`, each stage with a state of its own."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
        ret["box_predictors"] = [
            BalancedFastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=stage)
            )
            for head, stage in zip(ret["box_heads"], weights, strict=True)
        ]
        return ret

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        # Detectron2 drops the matched object, so it is asked with ids in place of classes: an id
        # above K cannot be taken for background.
        first = self.num_classes + 1
        marked = [
            Instances(t.image_size, gt_boxes=t.gt_boxes, gt_classes=t.gt_index + first)
            for t in targets
        ]
        classes = torch.cat([t.gt_classes for t in targets])
        proposals = super()._match_and_label_boxes(proposals, stage, marked)
        for proposal in proposals:
            found = proposal.gt_classes
            proposal.gt_index = found - first
            if len(classes):
                own = classes[proposal.gt_index.clamp(min=0)]
                proposal.gt_classes = torch.where(found >= first, own, found)
        return proposals
