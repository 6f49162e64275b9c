"""What ends a run on purpose."""

from __future__ import annotations


class RunStopped(Exception):
    """A run cannot go on; the message says why and what to do, and needs no traceback.

    Args:
        message: what a user reads.
        everywhere: whether all ranks raise the same error.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
