"""Standard and Cascade RoI heads with balanced output layers.

Both differ from Detectron2's in the output layers only. Mask and keypoint heads stay stock.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from .fast_rcnn import BalancedFastRCNNOutputLayers


class _ImageLabels:
    """Hands the image-level labels of the batch to the output layers for one call."""

    def forward(self, images, features, proposals, targets=None) -> Any:
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
class BalancedStandardROIHeads(_ImageLabels, StandardROIHeads):
    """StandardROIHeads with `BalancedFastRCNNOutputLayers`."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_head"].output_shape
        ret["box_predictor"] = BalancedFastRCNNOutputLayers(cfg, shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(_ImageLabels, CascadeROIHeads):
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
