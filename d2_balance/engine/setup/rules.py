"""What the values of config keys must be: one table.

What two keys exclude in each other, and what the data must be, is checked by the modules that use
them; `validate` calls all of it before anything is built.
"""

from __future__ import annotations

from d2_balance.data.samplers import REPEAT_FORMS
from d2_balance.modeling.build import RULES as RULES_OF_MODELS
from d2_balance.utils.rules import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_0,
    FRACTION,
    PROBABILITY,
    Rule,
    one_of,
)

PRECISIONS = ("fp16", "bf16")
BETA_MODES = ("floor", "sawtooth", "linear")
BEST_MODES = ("max", "min")
WANDB_MODES = ("online", "offline")

RULES: dict[str, Rule] = {
    "SOLVER.AMP.PRECISION": one_of(PRECISIONS),
    "SOLVER.AMP.INIT_SCALE": ABOVE_0,
    "SOLVER.AMP.MAX_SKIPPED": COUNT,
    "SOLVER.EMA.DECAY": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "SOLVER.INTERRUPT_TIMEOUT": ("a number of seconds above 0", lambda value: value > 0),
    "SOLVER.REFERENCE_IMS_PER_BATCH": (
        "0, or the number of images that the learning rate was chosen for",
        lambda value: value >= 0,
    ),
    "DATALOADER.REPEAT_FORM": one_of(REPEAT_FORMS),
    "DATALOADER.REPEAT_ALPHA": ABOVE_0,
    "DATALOADER.MAX_UNREADABLE_IMAGES": COUNT_OR_0,
    "TEST.BEST.MODE": one_of(BEST_MODES),
    "TEST.BEST.PATIENCE": COUNT_OR_0,
    "TEST.BEST.MIN_DELTA": AT_LEAST_0,
    "TEST.LOSS.PERIOD": COUNT_OR_0,
    "TEST.LOSS.IMAGES": COUNT_OR_0,
    "LOG.IMAGES": COUNT_OR_0,
    "LOG.IMAGES_MIN_SCORE": FRACTION,
    "LOG.WANDB_MODE": one_of(WANDB_MODES),
    "MODEL.RETINANET.PRIOR_PROB": PROBABILITY,
    "MODEL.FCOS.PRIOR_PROB": PROBABILITY,
    "MODEL.BALANCE.PRIOR_PROB": PROBABILITY,
    "MODEL.BALANCE.CLS_LOSS_WEIGHT": AT_LEAST_0,
    "MODEL.BALANCE.BOX_LOSS_WEIGHT": AT_LEAST_0,
    "MODEL.BALANCE.RPN.PRIOR_PROB": PROBABILITY,
    "MODEL.BALANCE.RPN.CLS_LOSS_WEIGHT": AT_LEAST_0,
    "MODEL.BALANCE.RPN.BOX_LOSS_WEIGHT": AT_LEAST_0,
    "MODEL.BALANCE.BETA_DECAY.MODE": one_of(BETA_MODES),
    "MODEL.BALANCE.BETA_DECAY.AMOUNT": AT_LEAST_0,
    "MODEL.BALANCE.BETA_DECAY.PERIOD": COUNT,
    "MODEL.BALANCE.BETA_DECAY.MIN": AT_LEAST_0,
} | RULES_OF_MODELS
