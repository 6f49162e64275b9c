"""TorchScript by `torch.jit.script`: the inference form of models, without losses and samplers.

`detectron2.export.scripting_with_instances` scripts a model in evaluation mode. TorchScript
compiles every submodule, and losses take a `Samples` that it does not know. It asks a module for a
form to script first, `__prepare_scriptable__`; this is Detectron2's own class with the same
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn


def without_attributes(module: nn.Module, names: Sequence[str], cls: type[nn.Module]) -> nn.Module:
    """Return a copy of a module that shares its weights and lacks some attributes.

    Args:
        module: in evaluation mode; not changed.
        names: submodules and attributes that the copy lacks.
        cls: class of the copy.
    """
    # TorchScript leaves out branches of a constant
    annotations = {**getattr(cls, "__annotations__", {}), "training": torch.jit.Final[bool]}
    form = type(cls.__name__, (cls,), {"__annotations__": annotations})
    copied: nn.Module = nn.Module.__new__(form)
    copied.__dict__.update(module.__dict__)
    for group in ("_modules", "_parameters", "_buffers"):
        own = {k: v for k, v in module.__dict__[group].items() if k not in names}
        copied.__dict__[group] = own
    for name in names:
        copied.__dict__.pop(name, None)
    return copied


class Scriptable:
    """Base of modules that are scripted as Detectron2's class; before it in the inheritance."""

    training_only: tuple[str, ...] = ()
    """Submodules and attributes that inference does not need."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what `torch.jit.script` compiles instead of this module."""
        stock = next(c for c in type(self).__mro__ if c.__module__.startswith("detectron2."))
        return without_attributes(cast(nn.Module, self), self.training_only, stock)
