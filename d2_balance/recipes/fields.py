"""What the fields of a recipe's stages may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2_balance.evaluation.merge import ensemble, rescore
from d2_balance.utils.rules import Rule, one_of


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _number(value: Any) -> bool:
    return type(value) in (int, float)


TEXT: Rule = ("a text", lambda value: isinstance(value, str))
NAMES: Rule = (
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)

FIELDS: Mapping[str, Rule] = {
    "from": TEXT,
    "keep": NAMES,
    "every": (
        "[n, first], two integers, n at least 1 and first at least 0",
        lambda v: isinstance(v, list) and len(v) == 2 and _whole(v[0], 1) and _whole(v[1], 0),
    ),
    "fraction": ("a number in (0, 1)", lambda value: _number(value) and 0 < value < 1),
    "seed": ("an integer", lambda value: type(value) is int),
    "config": TEXT,
    "train": NAMES,
    "test": NAMES,
    "overrides": ("config keys with their values", lambda value: isinstance(value, dict)),
    "weights": TEXT,
    "model": TEXT,
    "dataset": TEXT,
    "classes": TEXT,
    "inputs": ("a list of inputs", lambda value: isinstance(value, list)),
    "predictions": TEXT,
    "map": TEXT,
    "factors": TEXT,
    "iou": ("a number in [0, 1)", lambda value: _number(value) and 0 <= value < 1),
    "max_dets": ("an integer of at least 0", lambda value: _whole(value, 0)),
    "metric": one_of(rescore.METRICS),
}
"""The fields by name; where kinds of stages differ, `OWN` comes first."""

OWN: Mapping[tuple[str, str], Rule] = {
    ("evaluate", "train"): TEXT,
    ("ensemble", "method"): one_of(ensemble.METHODS),
    ("fit", "method"): one_of(rescore.METHODS),
}


def check_fields(settings: Mapping[str, Any], kind: str, where: str) -> None:
    """Checks the values of a stage, or of an input; a field of None is left out.

    Raises:
        ValueError: naming the field and what it must be.
    """
    for key, value in settings.items():
        must, fits = OWN.get((kind, key)) or FIELDS[key]
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {key} is {value!r}; must be {must}")
