"""The examples in the docstrings of the losses run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

from d2_balance import losses
from d2_balance.losses import BoxLoss, ClassificationLoss

MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    torch.manual_seed(0)
    module = importlib.import_module(f"d2_balance.losses.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_every_loss_and_every_function_has_an_example():
    bases = (ClassificationLoss, BoxLoss)
    for name in losses.__all__:
        value = getattr(losses, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, bases)):
            assert ">>> " in value.__doc__ or value in bases, name
