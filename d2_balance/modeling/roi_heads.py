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
from .objects import classes_of_ids, ids_as_classes, number_objects


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
        marked = ids_as_classes(targets, self.num_classes)
        proposals = super()._match_and_label_boxes(proposals, stage, marked)
        for proposal in proposals:
            proposal.gt_classes, proposal.gt_index = classes_of_ids(
                proposal.gt_classes, targets, self.num_classes
            )
        return proposals
