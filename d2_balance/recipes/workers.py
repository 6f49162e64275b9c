"""Stages at work: in this process, one after another, or side by side as jobs of an executor.

`python -m d2_balance.recipes.workers DIRECTORY` is such a job: DIRECTORY holds a pickled `Work`,
and the reason why it failed is written there.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from d2_balance.utils.executors import Executor, Job, JobLostError, Running, stop_all
from d2_balance.utils.files import atomic_path, write_text
from d2_balance.utils.lock import directory_lock

from .stages import StageError, Work, run_stage

POLL_SECONDS = 0.2
_WORK, _REASON = "work.pickle", "reason.txt"


@dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
        work: the stage.
        error: why it failed, or None.
        lost: whether its machine went away, so that the stage may be started again.
    """

    work: Work
    error: str | None
    lost: bool = False


class Workers:
    """Stages side by side; leaving the block ends those that still run.

    Args:
        executor: where they run; None runs a stage in this process as soon as it is started.
        directory: where jobs find their stage, on a file system that all machines see.
    """

    def __init__(self, executor: Executor | None, directory: str) -> None:
        self.executor, self.directory = executor, directory
        self._running: dict[int, tuple[Work, Running]] = {}  # by slot
        self._ended: list[Result] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stop_all([running for _, running in self._running.values()])

    @property
    def running(self) -> bool:
        """Whether `wait` has something to wait for."""
        return bool(self._running or self._ended)

    @property
    def free(self) -> bool:
        """Whether another stage can be started."""
        slots = self.executor.slots if self.executor else 1
        return len(self._running) + len(self._ended) < slots

    def start(self, work: Work) -> None:
        """Start a stage."""
        if self.executor is None:
            self._ended.append(Result(work, _error_of(work)))
            return
        directory = self._directory(work)
        with atomic_path(os.path.join(directory, _WORK)) as path, open(path, "wb") as file:
            pickle.dump(work, file)
        with suppress(FileNotFoundError):
            os.remove(os.path.join(directory, _REASON))
        job = Job([sys.executable, "-m", "d2_balance.recipes.workers", directory], work.log)
        slot = next(n for n in range(self.executor.slots) if n not in self._running)
        self._running[slot] = work, self.executor.start(job, slot)

    def wait(self) -> Result:
        """Wait for the next stage to end."""
        while not self._ended:
            for slot, (work, running) in list(self._running.items()):
                try:
                    status = running.poll()
                except JobLostError as error:
                    self._end(slot, Result(work, f"its machine went away ({error})", lost=True))
                    continue
                if status is not None:
                    self._end(slot, Result(work, self._reason(work, status)))
            if not self._ended:
                time.sleep(POLL_SECONDS)
        return self._ended.pop(0)

    def _end(self, slot: int, result: Result) -> None:
        del self._running[slot]
        if not result.lost:  # a machine that was given up may still hold the lock there
            shutil.rmtree(self._directory(result.work), ignore_errors=True)
        self._ended.append(result)

    def _directory(self, work: Work) -> str:
        return os.path.join(self.directory, work.stage.name)

    def _reason(self, work: Work, status: int) -> str | None:
        if status == 0:
            return None
        path = os.path.join(self._directory(work), _REASON)
        with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            return file.read()
        # killed, for example for its memory
        return f"its process ended with status {status}; see {work.log}"


def _error_of(work: Work) -> str | None:
    try:
        run_stage(work)
    except (StageError, ValueError, OSError) as error:
        return str(error)
    return None


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def main(directory: str) -> int:
    """Run the stage of a directory; return the exit status."""
    import d2_balance.data  # noqa: F401  registers the built-in sets

    signal.signal(signal.SIGTERM, _stop)  # so that the training of the stage is ended too
    with open(os.path.join(directory, _WORK), "rb") as file:
        work = pickle.load(file)
    try:
        with directory_lock(directory):
            error = _error_of(work)
    except ValueError as held:
        error = str(held)
    if error is not None:
        write_text(os.path.join(directory, _REASON), error)
    return int(error is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
