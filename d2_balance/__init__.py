"""Losses, sampling and evaluation for imbalanced data in Detectron2.

`import d2_balance` registers the models, RoI heads and built-in data sets with Detectron2, and
`add_balance_config(cfg)` adds their keys. Without Detectron2 only `d2_balance.losses` and the
command `d2-balance doctor` work.
"""

from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["__version__"]

if find_spec("detectron2") is not None:
    from . import modeling  # noqa: F401  registers the models and heads
    from .config import add_balance_config
    from .data.mini_lvis import register_mini_lvis

    register_mini_lvis()
    __all__ += ["add_balance_config"]
