"""Which proposals train a RoI head, and which anchors a dense head or the RPN."""

from .base import (
    ANCHOR_SAMPLERS,
    PROPOSAL_SAMPLERS,
    AnchorSampler,
    Candidates,
    ProposalSampler,
    Selection,
)
from .hard_negatives import HardNegatives, hard_negatives
from .iou_balanced import IoUBalanced
from .isr_n import ISRN
from .ohem import OHEM

__all__ = [
    "ANCHOR_SAMPLERS",
    "ISRN",
    "OHEM",
    "PROPOSAL_SAMPLERS",
    "AnchorSampler",
    "Candidates",
    "HardNegatives",
    "IoUBalanced",
    "ProposalSampler",
    "Selection",
    "hard_negatives",
]
