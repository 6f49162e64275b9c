"""AP by frequency group and by class, with LVIS and COCO rules."""

from importlib import import_module
from typing import Any

_MODULES = {
    "APTable": "matching",
    "COCOGroupEvaluator": "evaluators",
    "LVISGroupEvaluator": "evaluators",
    "build_evaluator": "evaluators",
    "evaluate_predictions": "evaluate",
    "groups_from_counts": "groups",
    "read_per_class": "record",
    "read_predictions": "predictions",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: files are evaluated without torch and Detectron2."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
