"""Losses: tensors in, tensor out; one paper, one file. No import of Detectron2."""

from .ap import AP
from .base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from .cross_entropy import BalancedCE, SigmoidCE, SoftmaxCE
from .dr import DR
from .efl import EFL
from .eql import EQL
from .eqlv2 import EQLv2
from .focal import Focal
from .ghm import GHMC, GHMR
from .iou import GIoU
from .quality_focal import QFL, VFL
from .rank_sort import RankSort
from .samples import Samples
from .seesaw import Seesaw
from .smooth_l1 import SmoothL1

__all__ = [
    "AP",
    "BOX_LOSSES",
    "CLS_LOSSES",
    "DR",
    "EFL",
    "EQL",
    "GHMC",
    "GHMR",
    "QFL",
    "VFL",
    "BalancedCE",
    "BoxLoss",
    "ClassificationLoss",
    "EQLv2",
    "Focal",
    "GIoU",
    "RankSort",
    "Samples",
    "Seesaw",
    "SigmoidCE",
    "SmoothL1",
    "SoftmaxCE",
]
