"""Losses: tensors in, tensor out; one paper, one file. No import of Detectron2."""

from ._base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from ._samples import Samples
from .alrp import ALRP
from .ap import AP
from .bags import BAGS
from .balanced_l1 import BalancedL1
from .balanced_softmax import BalancedSoftmax, LogitAdjusted
from .cross_entropy import BalancedCE, SigmoidCE, SoftmaxCE
from .dr import DR
from .drop_loss import DropLoss
from .efl import EFL
from .eql import EQL
from .eqlv2 import EQLv2
from .federated import Federated
from .focal import Focal
from .ghm import GHMC, GHMR
from .iou import CIoU, DIoU, GIoU
from .loce import LOCE
from .quality_focal import QFL, VFL
from .rank_sort import RankSort
from .seesaw import Seesaw
from .smooth_l1 import SmoothL1
from .softmax_eql import SoftmaxEQL

__all__ = [
    "ALRP",
    "AP",
    "BAGS",
    "BOX_LOSSES",
    "CLS_LOSSES",
    "DR",
    "EFL",
    "EQL",
    "GHMC",
    "GHMR",
    "LOCE",
    "QFL",
    "VFL",
    "BalancedCE",
    "BalancedL1",
    "BalancedSoftmax",
    "BoxLoss",
    "CIoU",
    "ClassificationLoss",
    "DIoU",
    "DropLoss",
    "EQLv2",
    "Federated",
    "Focal",
    "GIoU",
    "LogitAdjusted",
    "RankSort",
    "Samples",
    "Seesaw",
    "SigmoidCE",
    "SmoothL1",
    "SoftmaxCE",
    "SoftmaxEQL",
]
