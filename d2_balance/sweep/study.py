"""The study of a sweep in an Optuna storage: who runs which trial, and what came of it.

A trial is a remedy with a seed. A worker claims one by Optuna's own compare-and-set from WAITING to
RUNNING, so that two workers never have the same. Optuna's journal files know no heartbeat; here a
worker writes one for each trial that it runs, in every storage alike, and a trial whose worker is
dead is closed and queued again under the same remedy and seed. Its training goes on from its
checkpoint.
"""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

JOURNAL = "study.journal"
BEAT_SECONDS, STALE_SECONDS = 15.0, 120.0
RETRY_SECONDS = 300.0  # how long a storage may be away
CREATIONS = 10  # tries to open a database that another worker sets up
ATTEMPTS = 3  # of a trial whose worker or machine died
KEY, SEED = "remedy", "seed"

T = TypeVar("T")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyError(Exception):
    """A storage that cannot be reached, or holds another sweep."""


def open_storage(url: str | None, directory: str) -> BaseStorage:
    """Return the storage of a study.

    Args:
        url: SQLAlchemy URL, such as postgresql+psycopg://user@host/name; None takes a journal file.
        directory: of the journal file; no other process may be writing to it.

    Raises:
        StudyError: the database cannot be reached, or its driver is missing.
    """
    if url is None:
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, JOURNAL)
        _cut_half_line(path)
        return JournalStorage(JournalFileBackend(path))
    if url.startswith("postgresql://"):  # SQLAlchemy would take psycopg2, which is not maintained
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    for attempt in range(CREATIONS):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            raise StudyError(
                f"--storage {hidden(url)} needs a database driver ({error}): "
                "pip install 'd2-balance[cluster]'"
            ) from error
        except Exception as error:  # SQLAlchemy's and the driver's own types
            text = str(error).strip().splitlines()[0]
            # Optuna 5.0 makes its tables without a lock: of two workers that start at once on an
            # empty database, one finds them half made.
            raced = any(word in text.lower() for word in ("already exists", "unique"))
            if not raced or attempt == CREATIONS - 1:
                raise StudyError(f"--storage {hidden(url)} cannot be reached: {text}") from error
            time.sleep(1 + random.random())
    raise AssertionError("the loop returns or raises")


def _cut_half_line(path: str) -> None:
    """Remove the half line that a full disk or a crash left at the end of a journal.

    Optuna 5.0 reads over it, but appends to it, and can never read the file again.
    """
    with suppress(FileNotFoundError), open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def hidden(url: str) -> str:
    """Return a database URL without its password."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", url)


class Study:
    """Trials of one sweep.

    Args:
        storage: where they are kept.
        name: of the study in the storage.
        fingerprint: of the sweep; a study of another one is refused.
        remedies: names of the remedies, in order.
        seeds: seeds, in order.
        reference: the remedy that others are compared with.
        alone: whether no other worker can be at work, because this process holds the lock of the
            output directory; trials that are RUNNING are then dead.

    Raises:
        StudyError: the study belongs to another sweep, or the storage cannot be reached.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        fingerprint: str,
        remedies: Iterable[str],
        seeds: Iterable[int],
        *,
        reference: str | None = None,
        alone: bool = True,
    ) -> None:
        self.storage, self.name, self.alone = storage, name, alone
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{time.time():.0f}"
        self.remedies, self.seeds = list(remedies), list(seeds)
        self.reference = reference or self.remedies[0]
        self.beats: dict[int, float] = {}
        study = optuna.create_study(
            study_name=name, storage=storage, direction="maximize", load_if_exists=True
        )
        self.id = storage.get_study_id_from_name(name)
        self.study = study
        found = storage.get_study_user_attrs(self.id).get("fingerprint")
        if found is None:
            storage.set_study_user_attr(self.id, "fingerprint", fingerprint)
        elif found != fingerprint:
            raise StudyError(
                f"the study {name!r} was made from another sweep file or another version of it; "
                "give another --output, or another --study with --storage"
            )
        self._add_missing()

    def _add_missing(self) -> None:
        """Add the trials that are not there.

        All of the reference come first, because they show how far seeds spread; then the first seed
        of each remedy, the second, and so on.

        Two workers that start at once may both add one; `trials` shows the first of them only.
        """
        known = {self.key(t) for t in self.trials()}
        for remedy, seed in self._order():
            if (remedy, seed) not in known:
                self._add(remedy, seed, {})

    def _order(self) -> list[tuple[str, int]]:
        pairs = [(self.reference, seed) for seed in self.seeds]
        return pairs + [(r, s) for s in self.seeds for r in self.remedies if r != self.reference]

    def _add(self, remedy: str, seed: int, attributes: Mapping[str, Any]) -> None:
        self.study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params={KEY: remedy, SEED: seed},
                distributions={
                    KEY: CategoricalDistribution(self.remedies),
                    SEED: CategoricalDistribution(self.seeds),
                },
                user_attrs=dict(attributes),
            )
        )

    @staticmethod
    def key(trial: FrozenTrial) -> tuple[str, int]:
        """Return remedy and seed of a trial."""
        return trial.params[KEY], trial.params[SEED]

    def trials(self) -> list[FrozenTrial]:
        """Return one trial of each remedy and seed, in order.

        Of several, the first that has not failed stands for them, or the last that has.
        """
        chosen: dict[tuple[str, int], FrozenTrial] = {}
        for trial in self._steadily(lambda: self.storage.get_all_trials(self.id, deepcopy=False)):
            before = chosen.get(self.key(trial))
            if before is None or before.state == TrialState.FAIL:
                chosen[self.key(trial)] = trial
        return sorted(chosen.values(), key=lambda t: t.number)

    def claim(self) -> FrozenTrial | None:
        """Take the next trial that waits, None if there is none."""
        waiting = {self.key(t): t for t in self.trials() if t.state == TrialState.WAITING}
        # one whose worker died was added again, behind all others
        for trial in (waiting[pair] for pair in self._order() if pair in waiting):
            if self._set(trial, TrialState.RUNNING):
                self._note(trial, "worker", self.worker)
                self.beat(trial, force=True)
                return trial
        return None

    def beat(self, trial: FrozenTrial, *, force: bool = False) -> None:
        """Write that this worker is alive, at most every BEAT_SECONDS."""
        now = time.time()
        if force or now - self.beats.get(trial.number, 0) > BEAT_SECONDS:
            self.beats[trial.number] = now
            self._note(trial, "beat", now)

    def requeue_dead(self) -> list[FrozenTrial]:
        """Close trials whose worker is dead and queue them again; return those."""
        back = []
        for trial in self.trials():
            dead = trial.state == TrialState.RUNNING and self._is_dead(trial)
            if dead and self.put_back(trial, "its worker died"):
                back.append(trial)
        return back

    def put_back(self, trial: FrozenTrial, reason: str) -> bool:
        """Close a trial and add it again; after ATTEMPTS of them it has failed.

        Returns:
            Whether it waits again; False if another worker was faster, or it was the last attempt.
        """
        attempt = int(trial.user_attrs.get("attempt", 1))
        if attempt >= ATTEMPTS:
            self.fail(trial, f"{reason}, {attempt} times")
            return False
        remedy, seed = self.key(trial)
        self._add(remedy, seed, {"attempt": attempt + 1})  # first, so that a kill loses no trial
        self._note(trial, "message", reason)
        return self._set(trial, TrialState.FAIL)

    def retry_failed(self) -> None:
        """Add trials that have failed once more."""
        for trial in self.trials():
            if trial.state == TrialState.FAIL:
                self._add(*self.key(trial), {})

    def report(self, trial: FrozenTrial, value: float, iteration: int) -> bool:
        """Write the metric at a rung; return whether the pruner of the study would stop there."""
        self._steadily(
            lambda: self.storage.set_trial_intermediate_value(trial._trial_id, iteration, value)
        )
        frozen = self._steadily(lambda: self.storage.get_trial(trial._trial_id))
        return self._steadily(lambda: self.study.pruner.prune(self.study, frozen))

    def complete(self, trial: FrozenTrial, value: float, attributes: Mapping[str, Any]) -> None:
        """Write the result of a trial."""
        for name, item in attributes.items():
            self._note(trial, name, item)
        self._set(trial, TrialState.COMPLETE, value)

    def prune(self, trial: FrozenTrial, reason: str) -> None:
        """Write that a trial was stopped early, and why."""
        self._note(trial, "message", reason)
        self._set(trial, TrialState.PRUNED)

    def fail(self, trial: FrozenTrial, message: str) -> None:
        """Write that a trial has failed, and why."""
        self._note(trial, "message", message)
        self._set(trial, TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        if self.alone:
            return True
        worker = trial.user_attrs.get("worker", "")
        host, _, rest = worker.partition(":")
        if host == socket.gethostname() and rest:
            pid = int(rest.split(":")[0])
            return worker != self.worker and not _is_alive(pid)
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - max(float(trial.user_attrs.get("beat", 0)), begun) > STALE_SECONDS

    def _note(self, trial: FrozenTrial, name: str, value: Any) -> None:
        def write() -> None:
            with suppress(UpdateFinishedTrialError):  # another worker has closed it
                self.storage.set_trial_user_attr(trial._trial_id, name, value)

        trial.user_attrs[name] = value
        self._steadily(write)

    def _set(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> bool:
        values = None if value is None else [value]
        try:
            return self._steadily(
                lambda: self.storage.set_trial_state_values(trial._trial_id, state, values)
            )
        except UpdateFinishedTrialError:
            return False

    def _steadily(self, call: Callable[[], T]) -> T:
        """Call, and wait for a storage that is away for a while.

        Raises:
            StudyError: it is away for longer than RETRY_SECONDS.
        """
        start, pause = time.monotonic(), 0.5
        while True:
            try:
                return call()
            except UpdateFinishedTrialError:
                raise
            except Exception as error:
                if not _speaks_of_storage(error):
                    raise
                if time.monotonic() - start > RETRY_SECONDS:
                    raise StudyError(
                        f"the storage of the study {self.name!r} has been away for "
                        f"{RETRY_SECONDS:.0f} s ({error}); start again with --resume once it is "
                        "back: what the trials have reached is in their directories"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 15.0)


def _speaks_of_storage(error: Exception) -> bool:
    """Whether an error comes from a file or a database; SQLAlchemy's are not all wrapped."""
    if isinstance(error, OSError | OptunaError):
        return True
    return type(error).__module__.split(".")[0] in ("sqlalchemy", "psycopg", "psycopg2")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
