"""Stages at work: in this process, one after another, or side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType

from .stages import StageError, Work, run_stage


@dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
        work: the stage.
        error: why it failed, or None.
    """

    work: Work
    error: str | None


@dataclass
class _Running:
    work: Work
    process: SpawnProcess
    result: Connection


@dataclass
class Workers:
    """Up to `jobs` stages side by side; leaving the block ends those that still run.

    Args:
        jobs: 1 runs a stage in this process as soon as it is started.
    """

    jobs: int
    _running: list[_Running] = field(default_factory=list)
    _ended: list[Result] = field(default_factory=list)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.join()

    @property
    def running(self) -> bool:
        """Whether `wait` has something to wait for."""
        return bool(self._running or self._ended)

    @property
    def free(self) -> bool:
        """Whether another stage can be started."""
        return len(self._running) + len(self._ended) < self.jobs

    def start(self, work: Work) -> None:
        """Start a stage."""
        if self.jobs == 1:
            self._ended.append(Result(work, _error_of(work)))
            return
        context = multiprocessing.get_context("spawn")
        result, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, sender), name=work.stage.name)
        process.start()
        sender.close()
        self._running.append(_Running(work, process, result))

    def wait(self) -> Result:
        """Wait for the next stage to end."""
        if self._ended:
            return self._ended.pop()
        ready = set(wait([running.process.sentinel for running in self._running]))
        ended = next(r for r in self._running if r.process.sentinel in ready)
        self._running.remove(ended)
        ended.process.join()
        try:
            error = ended.result.recv()
        except EOFError:  # killed, for example for its memory
            error = f"its process ended with status {ended.process.exitcode}; see {ended.work.log}"
        return Result(ended.work, error)


def _run(work: Work, sender: Connection) -> None:
    """Run a stage in a process of its own, and send why it failed."""
    signal.signal(signal.SIGTERM, _stop)  # so that the training of the stage is ended too
    try:
        sender.send(_error_of(work))
    except KeyboardInterrupt:  # the command says so
        sys.exit(128 + signal.SIGINT)


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _error_of(work: Work) -> str | None:
    try:
        run_stage(work)
    except (StageError, ValueError, OSError) as error:
        return str(error)
    return None
