"""Losses, sampling and evaluation for imbalanced data in Detectron2.

`import d2_balance` registers the models, RoI heads and built-in datasets with Detectron2, and
`add_balance_config(cfg)` adds their keys. Where Detectron2 is missing or broken, the losses and
`d2-balance doctor` still work.
"""

import warnings

__version__ = "0.1.0"
__all__ = ["__version__", "add_balance_config"]

try:
    with warnings.catch_warnings():
        # Detectron2 is older than these deprecations; a user can do nothing about them.
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
        from d2_balance.config import add_balance_config
        from d2_balance.data.mini_lvis.dataset import register_mini_lvis

        from . import modeling  # noqa: F401  registers the models and heads
except Exception as error:  # a broken binary raises anything; doctor must still be able to say so
    _error = error

    def __getattr__(name: str) -> object:
        if name == "add_balance_config":
            raise ImportError(
                f"Detectron2 cannot be used ({type(_error).__name__}: {_error}); "
                "`d2-balance doctor` says what to do."
            ) from _error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
else:
    register_mini_lvis()
