"""Walk over nested configs: CfgNode, plain dicts of YAML files, containers of lazy configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full name and the value of every entry below a node that is no node itself.

    Args:
        node: mapping of mappings, such as CfgNode.
        prefix: put before every name, its dot included ("MODEL.").

    Yields:
        Pairs such as ("MODEL.RPN.IOU_LABELS", [0, -1, 1]).
    """
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def names(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the full names of all entries below a node, nodes included."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from names(value, f"{prefix}{key}.")
