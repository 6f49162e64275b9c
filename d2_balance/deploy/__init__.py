"""Use a trained model: load it, predict, export it, convert weights of other projects."""

from .load import load
from .predictor import Predictor

__all__ = ["Predictor", "load"]
