"""What the value of a config key must be: rules for tables of keys, and their check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .config_tree import value_of

if TYPE_CHECKING:
    from detectron2.config import CfgNode

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, as a message says it, and the test."""

COUNT: Rule = ("an integer of at least 1", lambda value: value >= 1)
COUNT_OR_0: Rule = ("an integer of at least 0", lambda value: value >= 0)
AT_LEAST_0: Rule = ("a number of at least 0", lambda value: 0 <= value < math.inf)
ABOVE_0: Rule = ("a number above 0", lambda value: 0 < value < math.inf)
FRACTION: Rule = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
PROBABILITY: Rule = ("a number in (0, 1)", lambda value: 0 < value < 1)


def one_of(names: Iterable[str]) -> Rule:
    """Return the rule of a key that has one of some values."""
    names = tuple(names)
    return f"one of {', '.join(map(repr, names))}", names.__contains__


def check_values(cfg: CfgNode, rules: Mapping[str, Rule], below: str = "") -> None:
    """Check the values of keys.

    Args:
        cfg: full config.
        rules: key with dots to its rule.
        below: only keys that begin with it.

    Raises:
        ValueError: naming the key, its value and what it must be.
    """
    for key, (must, fits) in rules.items():
        value = value_of(cfg, key)
        if key.startswith(below) and not fits(value):
            raise ValueError(f"{key} is {value!r}; must be {must}.")
