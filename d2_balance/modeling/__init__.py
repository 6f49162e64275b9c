"""Where the losses meet Detectron2."""

from .criterion import detection_losses
from .meta_arch.fcos import BalancedFCOS
from .meta_arch.rcnn import BalancedPanopticFPN, BalancedRCNN
from .meta_arch.retinanet import BalancedRetinaNet
from .proposal_generator.rpn import BalancedRPN
from .roi_heads.fast_rcnn import BalancedFastRCNNOutputLayers
from .roi_heads.roi_heads import (
    BalancedCascadeROIHeads,
    BalancedRes5ROIHeads,
    BalancedStandardROIHeads,
)

__all__ = [
    "BalancedCascadeROIHeads",
    "BalancedFCOS",
    "BalancedFastRCNNOutputLayers",
    "BalancedPanopticFPN",
    "BalancedRCNN",
    "BalancedRPN",
    "BalancedRes5ROIHeads",
    "BalancedRetinaNet",
    "BalancedStandardROIHeads",
    "detection_losses",
]
