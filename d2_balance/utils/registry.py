"""Registries of classes that know the name they have in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fvcore.common import registry

T = TypeVar("T", bound=type)


class Named:
    """Class with a `name`, the one it was registered under; without one the class's own."""

    name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__


class Registry(registry.Registry):
    """fvcore's registry, where a name in a config need not be the name of a class."""

    def register(self, name: str | None = None) -> Callable[[T], T]:
        """Register the class below under a name.

        Args:
            name: what a config writes; None takes the name of the class.

        Raises:
            AssertionError: the name is taken.
        """

        def decorator(cls: T) -> T:
            cls.name = name or cls.__name__  # type: ignore[attr-defined]
            self._do_register(cls.name, cls)  # type: ignore[attr-defined]
            return cls

        return decorator

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._obj_map.items())
