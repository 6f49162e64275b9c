"""Which rows count, and how much: selection, weights, and the scale of the whole loss."""

from .base import REWEIGHTERS, Reweighter
from .guided import GuidedScale
from .prime_samples import CARL, ISR

__all__ = ["CARL", "ISR", "REWEIGHTERS", "GuidedScale", "Reweighter"]
