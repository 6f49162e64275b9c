"""Losses, sampling and evaluation for imbalanced data in Detectron2.

Importing the package loads neither Detectron2 nor torchvision. `add_balance_config(cfg)` adds the
keys of the package to a config and registers its models, RoI heads and built-in datasets with
Detectron2; code without such a config (a LazyConfig) imports them from `d2_balance.modeling`.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import add_balance_config
    from .utils.config_files import get_config_file

__version__ = "0.1.0"
__all__ = ["__version__", "add_balance_config", "get_config_file"]

_MODULES = {
    "add_balance_config": "d2_balance.config",
    "get_config_file": "d2_balance.utils.config_files",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with warnings.catch_warnings():
            # Detectron2 is older than these deprecations; a user can do nothing about them.
            warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            return getattr(importlib.import_module(_MODULES[name]), name)
    except Exception as error:  # a broken binary raises anything
        raise ImportError(
            f"Detectron2 cannot be used ({type(error).__name__}: {error}); "
            "`d2-balance doctor` says what to do."
        ) from error
