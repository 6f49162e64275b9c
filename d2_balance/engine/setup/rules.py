"""What the values of config keys must be: one table.

What two keys exclude in each other, and what the data must be, is checked by the modules that use
them; `validate` calls all of it before anything is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode

from d2_balance.data.samplers import REPEAT_FORMS
from d2_balance.utils.config_tree import value_of

PRECISIONS = ("fp16", "bf16")
BETA_MODES = ("floor", "sawtooth", "linear")
BEST_MODES = ("max", "min")
WANDB_MODES = ("online", "offline")

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, as a message says it, and the test."""

_COUNT: Rule = ("an integer of at least 1", lambda value: value >= 1)
_COUNT_OR_0: Rule = ("an integer of at least 0", lambda value: value >= 0)
_AT_LEAST_0: Rule = ("a number of at least 0", lambda value: 0 <= value < math.inf)
_ABOVE_0: Rule = ("a number above 0", lambda value: 0 < value < math.inf)
_FRACTION: Rule = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
_PROBABILITY: Rule = ("a number in (0, 1)", lambda value: 0 < value < 1)


def _one_of(names: tuple[str, ...]) -> Rule:
    return f"one of {', '.join(names)}", names.__contains__


RULES: dict[str, Rule] = {
    "SOLVER.AMP.PRECISION": _one_of(PRECISIONS),
    "SOLVER.AMP.INIT_SCALE": _ABOVE_0,
    "SOLVER.AMP.MAX_SKIPPED": _COUNT,
    "SOLVER.EMA.DECAY": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "SOLVER.INTERRUPT_TIMEOUT": ("a number of seconds above 0", lambda value: value > 0),
    "SOLVER.REFERENCE_IMS_PER_BATCH": (
        "0, or the number of images that the learning rate was chosen for",
        lambda value: value >= 0,
    ),
    "DATALOADER.REPEAT_FORM": _one_of(REPEAT_FORMS),
    "DATALOADER.REPEAT_ALPHA": _ABOVE_0,
    "DATALOADER.MAX_UNREADABLE_IMAGES": _COUNT_OR_0,
    "TEST.BEST.MODE": _one_of(BEST_MODES),
    "TEST.BEST.PATIENCE": _COUNT_OR_0,
    "TEST.BEST.MIN_DELTA": _AT_LEAST_0,
    "TEST.LOSS.PERIOD": _COUNT_OR_0,
    "TEST.LOSS.IMAGES": _COUNT_OR_0,
    "LOG.IMAGES": _COUNT_OR_0,
    "LOG.IMAGES_MIN_SCORE": _FRACTION,
    "LOG.WANDB_MODE": _one_of(WANDB_MODES),
    "MODEL.RETINANET.PRIOR_PROB": _PROBABILITY,
    "MODEL.FCOS.PRIOR_PROB": _PROBABILITY,
    "MODEL.BALANCE.PRIOR_PROB": _PROBABILITY,
    "MODEL.BALANCE.CLS_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.BALANCE.BOX_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.BALANCE.RPN.PRIOR_PROB": _PROBABILITY,
    "MODEL.BALANCE.RPN.CLS_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.BALANCE.RPN.BOX_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.BALANCE.BETA_DECAY.MODE": _one_of(BETA_MODES),
    "MODEL.BALANCE.BETA_DECAY.AMOUNT": _AT_LEAST_0,
    "MODEL.BALANCE.BETA_DECAY.PERIOD": _COUNT,
    "MODEL.BALANCE.BETA_DECAY.MIN": _AT_LEAST_0,
}


def check_values(cfg: CfgNode, below: str = "") -> None:
    """Check the values of all keys in `RULES`.

    Args:
        cfg: full config.
        below: only keys that begin with it.

    Raises:
        ValueError: naming the key, its value and what it must be.
    """
    for key, (must, fits) in RULES.items():
        value = value_of(cfg, key)
        if key.startswith(below) and not fits(value):
            raise ValueError(f"{key} is {value!r}; must be {must}.")
