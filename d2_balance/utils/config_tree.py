"""Nested configs: CfgNode, plain dicts of YAML files, containers of lazy configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Node = TypeVar("Node", bound=Any)


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


def value_of(node: Mapping[str, Any], key: str) -> Any:
    """Return the value of a full name, such as "MODEL.RPN.IOU_LABELS"."""
    for part in key.split("."):
        node = node[part]
    return node


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by full name as a tree of plain dicts."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def changed(cfg: Node, values: Mapping[str, Any]) -> Node:
    """Return a copy of a CfgNode with other values by full name; the copy is not frozen."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        parents, _, last = key.rpartition(".")
        (value_of(cfg, parents) if parents else cfg)[last] = value
    return cfg


def merge(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested keys into a plain config, in place; mappings of `changes` are copied."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            below = config.get(key)
            value = merge(below if isinstance(below, dict) else {}, value)
        config[key] = value
    return config
