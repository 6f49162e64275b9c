"""What ends a run on purpose."""

from __future__ import annotations

import signal


class RunStopped(Exception):  # noqa: N818  not always an error
    """A run cannot go on; the message says why and what to do, and needs no traceback.

    Args:
        message: what a user reads.
        everywhere: whether all ranks raise the same error.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class StopTraining(BaseException):
    """Leaves the loop of Detectron2's trainer, which logs every Exception as a failure."""


class Interrupted(StopTraining):
    """SIGINT or SIGTERM has stopped a run, whose state is saved.

    Args:
        message: what a user reads.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status of the process: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def signal_name(number: int) -> str:
    """Return the name of a signal, and how it usually comes."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
