"""GeneralizedRCNN that hands LVIS image-level labels and ignore regions to its heads."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.panoptic_fpn import PanopticFPN
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN

from d2_balance.data.image_labels import ImageLabels

from ..deformable import deformable_convolutions
from ..image_context import LabelledImages
from ..roi_heads.feature_memory import build_memories
from ..scripting import Scriptable


@META_ARCH_REGISTRY.register()
class BalancedRCNN(Scriptable, LabelledImages, GeneralizedRCNN):
    """GeneralizedRCNN whose ImageList brings labels and regions to RPN and RoI heads.

    Args:
        image_labels: turns the inputs' LVIS image-level labels into a mask; None gives no mask.
        **kwargs: as Detectron2's GeneralizedRCNN.
    """

    @configurable
    def __init__(self, *, image_labels: ImageLabels | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_labels = image_labels

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        with deformable_convolutions(cfg):
            ret: dict[str, Any] = super().from_config(cfg)
        build_memories(cfg, ret["roi_heads"], ret["backbone"].output_shape())
        ret["image_labels"] = ImageLabels(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        return ret


@META_ARCH_REGISTRY.register()
class BalancedPanopticFPN(BalancedRCNN, PanopticFPN):
    """PanopticFPN whose RoI heads and RPN receive labels and regions as in `BalancedRCNN`."""
