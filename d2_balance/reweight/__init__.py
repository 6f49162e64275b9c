"""Which rows count, and how much: selection, weights, and the scale of the whole loss."""

from .base import REWEIGHTERS, Reweighter
from .guided import GuidedScale
from .iou_balanced import IoUBalanced
from .ohem import OHEM
from .prime_samples import CARL, ISR, ISRN
from .selection import Candidates, Selection, Selector

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
