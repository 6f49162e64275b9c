"""What the fields of a recipe's stages may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from d2_balance.evaluation.merge import ensemble, rescore


@dataclass(frozen=True)
class Field:
    """Values of a field; `allowed` is what a message says of them."""

    allowed: str
    fits: Callable[[Any], bool]


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _one_of(values: tuple[str, ...]) -> Field:
    return Field(f"one of {', '.join(values)}", values.__contains__)


TEXT = Field("a text", lambda value: isinstance(value, str))
NAMES = Field(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)

FIELDS: Mapping[str, Field] = {
    "from": TEXT,
    "keep": NAMES,
    "every": Field(
        "[n, first], two integers, n at least 1 and first at least 0",
        lambda v: isinstance(v, list) and len(v) == 2 and _whole(v[0], 1) and _whole(v[1], 0),
    ),
    "fraction": Field("a number in (0, 1)", lambda value: _number(value) and 0 < value < 1),
    "seed": Field("an integer", lambda value: type(value) is int),
    "config": TEXT,
    "train": NAMES,
    "test": NAMES,
    "overrides": Field("config keys with their values", lambda value: isinstance(value, dict)),
    "weights": TEXT,
    "model": TEXT,
    "dataset": TEXT,
    "classes": TEXT,
    "inputs": Field("a list of inputs", lambda value: isinstance(value, list)),
    "predictions": TEXT,
    "map": TEXT,
    "factors": TEXT,
    "iou": Field("a number in [0, 1)", lambda value: _number(value) and 0 <= value < 1),
    "max_dets": Field("an integer of at least 0", lambda value: _whole(value, 0)),
    "metric": _one_of(rescore.METRICS),
}
"""The fields by name; where kinds of stages differ, `OWN` comes first."""

OWN: Mapping[tuple[str, str], Field] = {
    ("evaluate", "train"): TEXT,
    ("ensemble", "method"): _one_of(ensemble.METHODS),
    ("fit", "method"): _one_of(rescore.METHODS),
}


def check_fields(settings: Mapping[str, Any], kind: str, where: str) -> None:
    """Checks the values of a stage, or of an input; a field of None is left out.

    Raises:
        ValueError: naming the field and what it must be.
    """
    for key, value in settings.items():
        field = OWN.get((kind, key)) or FIELDS[key]
        if value is not None and not field.fits(value):
            raise ValueError(f"{where}: {key} is {value!r}; must be {field.allowed}")
