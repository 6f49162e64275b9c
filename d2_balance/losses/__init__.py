"""Losses: tensors in, tensor out; one paper, one file. No import of Detectron2."""

from .base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from .cross_entropy import BalancedCE, SigmoidCE, SoftmaxCE
from .dr import DR
from .eql import EQL
from .focal import Focal
from .ghm import GHMC, GHMR
from .iou import GIoU
from .samples import Samples
from .smooth_l1 import SmoothL1

__all__ = [
    "BOX_LOSSES",
    "CLS_LOSSES",
    "DR",
    "EQL",
    "GHMC",
    "GHMR",
    "BalancedCE",
    "BoxLoss",
    "ClassificationLoss",
    "Focal",
    "GIoU",
    "Samples",
    "SigmoidCE",
    "SmoothL1",
    "SoftmaxCE",
]
