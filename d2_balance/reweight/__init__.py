"""Reweighting of rows, on top of elementwise losses."""

from .base import REWEIGHTERS, Reweighter

__all__ = ["REWEIGHTERS", "Reweighter"]
