"""Where the losses meet Detectron2."""

from .criterion import detection_losses
from .deformable import use_in_resnets
from .fast_rcnn import BalancedFastRCNNOutputLayers
from .fcos import BalancedFCOS
from .rcnn import BalancedRCNN
from .retinanet import BalancedRetinaNet
from .roi_heads import BalancedCascadeROIHeads, BalancedStandardROIHeads
from .rpn import BalancedRPN

__all__ = [
    "BalancedCascadeROIHeads",
    "BalancedFCOS",
    "BalancedFastRCNNOutputLayers",
    "BalancedRCNN",
    "BalancedRPN",
    "BalancedRetinaNet",
    "BalancedStandardROIHeads",
    "detection_losses",
]

use_in_resnets()
