"""Losses: tensors in, tensor out; one paper, one file. No import of Detectron2."""

from ._base import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from ._samples import Samples
from .acsl import ACSLLoss, acsl_loss
from .alrp import ALRPLoss, alrp_loss
from .ap import APLoss, ap_loss
from .bags import BAGSLoss, group_softmax_loss
from .balanced_l1 import BalancedL1Loss, balanced_l1_loss
from .balanced_softmax import BalancedSoftmaxLoss, LogitAdjustedLoss, adjusted_ce_loss
from .cross_entropy import (
    BalancedCELoss,
    SigmoidCELoss,
    SoftmaxCELoss,
    balanced_ce_loss,
    sigmoid_ce_loss,
)
from .dr import DRLoss, dr_loss
from .drop_loss import DropLoss, drop_loss
from .ecm import ECMLoss, ecm_loss
from .efl import EFLLoss, equalized_focal_loss
from .eql import EQLLoss, eql_loss
from .eqlv2 import EQLv2Loss, SoftmaxEQLv2Loss, eqlv2_loss, softmax_eqlv2_loss
from .fcbl import FCBLLoss, fcbl_loss
from .federated import (
    FederatedLoss,
    FederatedSoftmaxLoss,
    federated_loss,
    federated_softmax_loss,
)
from .focal import FocalLoss, focal_loss
from .ghm import GHMCLoss, GHMRLoss, ghm_c_loss, ghm_r_loss
from .gumbel import GOLLoss, GumbelCELoss, gumbel_ce_loss
from .iou import CIoULoss, DIoULoss, GIoULoss, ciou_loss, diou_loss, giou_loss
from .loce import LOCELoss, equilibrium_loss
from .max_size import max_size_loss
from .quality_focal import QFLLoss, VFLLoss, quality_focal_loss, varifocal_loss
from .rank_sort import RankSortLoss, rank_sort_loss
from .seesaw import SeesawFocalLoss, SeesawLoss, seesaw_ce_loss, seesaw_focal_loss
from .smooth_l1 import SmoothL1Loss, smooth_l1_loss
from .softmax_eql import SoftmaxEQLLoss, softmax_eql_loss

__all__ = [
    "BOX_LOSSES",
    "CLS_LOSSES",
    "ACSLLoss",
    "ALRPLoss",
    "APLoss",
    "BAGSLoss",
    "BalancedCELoss",
    "BalancedL1Loss",
    "BalancedSoftmaxLoss",
    "BoxLoss",
    "CIoULoss",
    "ClassificationLoss",
    "DIoULoss",
    "DRLoss",
    "DropLoss",
    "ECMLoss",
    "EFLLoss",
    "EQLLoss",
    "EQLv2Loss",
    "FCBLLoss",
    "FederatedLoss",
    "FederatedSoftmaxLoss",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GIoULoss",
    "GOLLoss",
    "GumbelCELoss",
    "LOCELoss",
    "LogitAdjustedLoss",
    "QFLLoss",
    "RankSortLoss",
    "Samples",
    "SeesawFocalLoss",
    "SeesawLoss",
    "SigmoidCELoss",
    "SmoothL1Loss",
    "SoftmaxCELoss",
    "SoftmaxEQLLoss",
    "SoftmaxEQLv2Loss",
    "VFLLoss",
    "acsl_loss",
    "adjusted_ce_loss",
    "alrp_loss",
    "ap_loss",
    "balanced_ce_loss",
    "balanced_l1_loss",
    "ciou_loss",
    "diou_loss",
    "dr_loss",
    "drop_loss",
    "ecm_loss",
    "eql_loss",
    "eqlv2_loss",
    "equalized_focal_loss",
    "equilibrium_loss",
    "fcbl_loss",
    "federated_loss",
    "federated_softmax_loss",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "giou_loss",
    "group_softmax_loss",
    "gumbel_ce_loss",
    "max_size_loss",
    "quality_focal_loss",
    "rank_sort_loss",
    "seesaw_ce_loss",
    "seesaw_focal_loss",
    "sigmoid_ce_loss",
    "smooth_l1_loss",
    "softmax_eql_loss",
    "softmax_eqlv2_loss",
    "varifocal_loss",
]
