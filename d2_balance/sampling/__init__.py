"""Which proposals train a RoI head."""

from .base import PROPOSAL_SAMPLERS, Candidates, ProposalSampler, Selection
from .iou_balanced import IoUBalanced
from .isr_n import ISRN
from .ohem import OHEM

__all__ = [
    "ISRN",
    "OHEM",
    "PROPOSAL_SAMPLERS",
    "Candidates",
    "IoUBalanced",
    "ProposalSampler",
    "Selection",
]
