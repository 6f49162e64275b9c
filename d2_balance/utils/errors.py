"""Errors that a user can do something about, told apart from bugs."""

from __future__ import annotations

import traceback

_PACKAGES = ("d2_balance", "detectron2", "fvcore", "yacs")


def is_deliberate(error: Exception) -> bool:
    """Return whether this package, Detectron2 or their config library raised the error itself."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__", ""))
    return module.split(".")[0] in _PACKAGES
