"""What a message says where a name is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, allowed: Iterable[str]) -> str:
    """The end of a message: names that look like `name`, or all of them if few."""
    allowed = sorted(allowed)
    similar = get_close_matches(name, allowed, n=3, cutoff=0.6)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"allowed: {', '.join(allowed)}." if len(allowed) <= 30 else ""
