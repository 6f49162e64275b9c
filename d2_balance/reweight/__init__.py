"""Reweighting of rows, on top of elementwise losses."""

from .base import REWEIGHTERS, Reweighter
from .prime_samples import CARL, ISR

__all__ = ["CARL", "ISR", "REWEIGHTERS", "Reweighter"]
