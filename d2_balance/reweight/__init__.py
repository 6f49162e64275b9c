"""How much a sample counts: weights of samples, and the scale of the whole loss."""

from .base import REWEIGHTERS, Reweighter
from .carl import CARL
from .class_weights import ClassWeights, effective_number_weights
from .guided import GuidedScale
from .isr import ISR

__all__ = [
    "CARL",
    "ISR",
    "REWEIGHTERS",
    "ClassWeights",
    "GuidedScale",
    "Reweighter",
    "effective_number_weights",
]
