"""Which rows count, and how much: selection, weights, and the scale of the whole loss."""

from d2_balance.sampling.base import Candidates, Selection, Selector
from d2_balance.sampling.iou_balanced import IoUBalanced
from d2_balance.sampling.ohem import OHEM

from .base import REWEIGHTERS, Reweighter
from .guided import GuidedScale
from .prime_samples import CARL, ISR, ISRN

__all__ = [
    "CARL",
    "ISR",
    "ISRN",
    "OHEM",
    "REWEIGHTERS",
    "Candidates",
    "GuidedScale",
    "IoUBalanced",
    "Reweighter",
    "Selection",
    "Selector",
]
