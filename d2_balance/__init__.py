"""Losses, sampling and evaluation for imbalanced data in Detectron2."""

__version__ = "0.1.0"
