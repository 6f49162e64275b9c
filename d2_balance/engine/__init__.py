"""Trainer, hooks, the checks before a run and the summary after it.

The names are loaded when they are first used: reading a config does not load the evaluation.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    ".errors": ("RunStopped",),
    ".hooks.beta_decay": ("BetaDecay", "decayed_beta"),
    ".hooks.loss_stats": ("LossStats",),
    ".hooks.nonfinite": ("FiniteLosses", "FiniteWeights", "NonFiniteLossError"),
    ".resume.random_state": ("SeedSteps",),
    ".resume.data_stream": ("TrainStream", "build_train_stream"),
    ".setup.config_file": ("find_config", "read_config"),
    ".setup.launch": ("check_launch", "start"),
    ".setup.lazy": ("read_run", "save_lazy"),
    ".setup.lazy_model": ("balance_model", "dataset_quantity", "use_datasets"),
    ".setup.run": (
        "output_lock",
        "prepare_run",
        "short_messages",
        "use_cpu_without_cuda",
    ),
    ".setup.scaling": ("batch_warning", "scale_to_batch"),
    ".setup.validate": ("validate",),
    ".summary": ("write_summary",),
    ".trainer": ("BalancedTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
