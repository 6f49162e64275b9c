"""Where the losses meet Detectron2."""

from .criterion import detection_losses
from .fast_rcnn import BalancedFastRCNNOutputLayers
from .rcnn import BalancedRCNN
from .retinanet import BalancedRetinaNet
from .roi_heads import BalancedCascadeROIHeads, BalancedStandardROIHeads

__all__ = [
    "BalancedCascadeROIHeads",
    "BalancedFastRCNNOutputLayers",
    "BalancedRCNN",
    "BalancedRetinaNet",
    "BalancedStandardROIHeads",
    "detection_losses",
]
