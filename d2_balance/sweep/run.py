"""Runs the trials of a sweep, stops the hopeless early, and goes on where it was stopped."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from d2_balance.utils.config_tree import merge
from d2_balance.utils.executors import Executor, Job, JobLostError, Running, stop_all

from . import trial as trials
from .intervals import Intervals
from .spec import SweepSpec
from .study import Study, open_storage

POLL_SECONDS = 1.0


@dataclass
class Active:
    """A trial that runs.

    Attributes:
        trial: in the study.
        directory: of the trial.
        running: its process.
        start: time.time() of the start.
        seen: iterations whose evaluation was read.
    """

    trial: FrozenTrial
    directory: str
    running: Running
    start: float = field(default_factory=time.time)
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Plan:
    """What the config of the baseline says of every trial.

    Attributes:
        iterations: length of a trial.
        first: iteration of the first rung, 0 without early stopping.
        dataset: the dataset that is evaluated.
    """

    iterations: int
    first: int
    dataset: str


class Sweep:
    """A study, an executor and the trials that run.

    Args:
        spec: the sweep.
        plan: length of the trials.
        output: directory of the sweep; trials lie in `trials/NAME-seedN`.
        study: the trials.
        executor: what runs them.
        gpus: GPUs of a trial.
        intervals: bootstrap of two evaluations, which early stopping asks.
        event: receives a line for each event.
        tick: called once a round, for a live table.
    """

    def __init__(
        self,
        spec: SweepSpec,
        plan: Plan,
        output: str,
        study: Study,
        executor: Executor,
        *,
        gpus: int = 0,
        intervals: Intervals,
        event: Callable[[str], None] = print,
        tick: Callable[[Sweep], None] = lambda sweep: None,
    ) -> None:
        self.spec, self.plan, self.output = spec, plan, output
        self.study, self.executor, self.gpus = study, executor, gpus
        self.intervals, self.event, self.tick = intervals, event, tick
        self.active: dict[int, Active] = {}  # by slot
        study.study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=max(plan.first, 1), reduction_factor=spec.reduction_factor
        )

    def run(self) -> None:
        """Run every trial that is not done; trials that are stopped keep their checkpoints.

        Raises:
            StudyError: the storage stays away.
        """
        try:
            self._adopt()
            while True:
                self._start_free()
                if not self.active:
                    if not self._others_run():
                        return
                    self.study.requeue_dead()
                for slot in list(self.active):
                    self._look(slot)
                self.tick(self)
                time.sleep(POLL_SECONDS)
        finally:
            stop_all([active.running for active in self.active.values()])

    def directory(self, trial: FrozenTrial) -> str:
        """Return the directory of a trial."""
        remedy, seed = self.study.key(trial)
        return os.path.join(self.output, "trials", f"{remedy}-seed{seed}")

    def eta(self) -> float | None:
        """Return the seconds that are left, None before the first trial has ended."""
        ended = [t for t in self.study.trials() if t.state.is_finished() and t.duration]
        spans = [t.duration.total_seconds() for t in ended if t.duration]
        if not spans:
            return None
        waiting = sum(t.state == TrialState.WAITING for t in self.study.trials())
        now = time.time()
        mean = statistics.fmean(spans)
        left = sum(max(mean - (now - a.start), 0) for a in self.active.values())
        return (left + waiting * mean) / max(self.executor.slots, 1)

    def _adopt(self) -> None:
        """Queue again trials of dead workers; one that had finished meanwhile is taken as it is."""
        for trial in self.study.requeue_dead():
            self.event(f"{self._label(trial)}: its worker died; it goes on from its checkpoint")

    def _others_run(self) -> bool:
        return any(t.state == TrialState.RUNNING for t in self.study.trials())

    def _start_free(self) -> None:
        for slot in range(self.executor.slots):
            while slot not in self.active:
                trial = self.study.claim()
                if trial is None:
                    return
                self._start(slot, trial)

    def _start(self, slot: int, trial: FrozenTrial) -> None:
        directory = self.directory(trial)
        remedy, seed = self.study.key(trial)
        result = trials.read_result(directory)
        if result is not None:
            self._finish(trial, result)
            return
        if self._is_dropped(remedy):
            self.study.prune(trial, "the remedy was dropped on another seed")
            self.event(f"{self._label(trial)}: not run, the remedy was dropped on another seed")
            return
        config = self.spec.config(remedy, seed, directory)
        if self.plan.first:
            merge(config, {"TEST": {"EVAL_PERIOD": self.plan.first}})
        trials.prepare(directory, config)
        log = os.path.join(directory, trials.LOG)
        job = Job(trials.command(directory, self.gpus), log)
        self.active[slot] = Active(trial, directory, self.executor.start(job, slot))
        self.event(f"{self._label(trial)}: started")

    def _is_dropped(self, remedy: str) -> bool:
        return any(
            t.state == TrialState.PRUNED and self.study.key(t)[0] == remedy
            for t in self.study.trials()
        )

    def _look(self, slot: int) -> None:
        active = self.active[slot]
        self.study.beat(active.trial)
        try:
            status = active.running.poll()
        except JobLostError as error:
            del self.active[slot]
            again = self.study.put_back(active.trial, f"its machine went away ({error})")
            self.event(f"{self._label(active.trial)}: {error}" + ("; it goes on" if again else ""))
            return
        if status is None:
            if self.plan.first and self._should_stop(active):
                active.running.stop()
                del self.active[slot]
                iteration = max(active.seen)
                value = trials.measured(active.directory)[iteration][self.spec.metric]
                reason = (
                    f"behind the leader at iteration {iteration} "
                    f"with {self.spec.metric} {value:.1f}"
                )
                self.study.prune(active.trial, reason)
                self.event(f"{self._label(active.trial)}: stopped, {reason}")
            return
        del self.active[slot]
        result = trials.read_result(active.directory)
        if status == 0 and result is not None:
            self._finish(active.trial, result)
        else:
            message = trials.failure(active.directory, status)
            self.study.fail(active.trial, message)
            self.event(f"{self._label(active.trial)}: failed, {message}")

    def _finish(self, trial: FrozenTrial, result: dict[str, Any]) -> None:
        task, _, figure = self.spec.metric.partition("/")
        value = (result["results"].get(task) or {}).get(figure)
        if value is None:
            self.study.fail(trial, f"its evaluation has no {self.spec.metric}")
            self.event(f"{self._label(trial)}: failed, its evaluation has no {self.spec.metric}")
            return
        self.study.complete(trial, value, result)
        self.event(f"{self._label(trial)}: {self.spec.metric} {value:.1f}")

    def _should_stop(self, active: Active) -> bool:
        """Whether the pruner would stop a trial and its interval lies below the leader's."""
        stops = False
        for iteration, figures in trials.measured(active.directory).items():
            value = figures.get(self.spec.metric)
            if iteration in active.seen or value is None or iteration >= self.plan.iterations:
                continue
            active.seen.add(iteration)
            self.intervals.keep(active.directory, iteration)
            value = value if math.isfinite(value) else 0.0
            stops = self.study.report(active.trial, value, iteration)
            stops = stops and self.study.key(active.trial)[0] != self.spec.reference
            stops = stops and self._is_behind(active, iteration)
        return stops

    def _is_behind(self, active: Active, iteration: int) -> bool:
        """Whether a remedy is worse than the best one at a rung, images and seeds considered."""
        own = self.study.key(active.trial)[0]
        reached: dict[str, list[tuple[str, float]]] = {}  # remedy to directory and value
        for other in self.study.trials():
            value = other.intermediate_values.get(iteration)
            if value is not None:
                at = self.directory(other), value
                reached.setdefault(self.study.key(other)[0], []).append(at)
        means = {name: statistics.fmean(v for _, v in at) for name, at in reached.items()}
        leader = max(means, key=lambda name: means[name])
        if leader == own:
            return False
        spread = pooled_spread([[v for _, v in at] for at in reached.values()])
        mine, theirs = ([d for d, _ in reached[name]] for name in (own, leader))
        return self.intervals.is_below(mine, theirs, iteration, spread)

    def _label(self, trial: FrozenTrial) -> str:
        remedy, seed = self.study.key(trial)
        return f"{remedy}, seed {seed}"


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Return the standard deviation within groups and its degrees of freedom.

    None if no group has two values: then nothing is known of the seeds.
    """
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    squares = sum((v - statistics.fmean(values)) ** 2 for values in groups for v in values)
    return math.sqrt(squares / freedom), freedom


def run_sweep(
    spec: SweepSpec,
    plan: Plan,
    output: str,
    executor: Executor,
    *,
    storage: str | None = None,
    name: str = "sweep",
    gpus: int = 0,
    retry_failed: bool = False,
    report_only: bool = False,
    intervals: Intervals,
    event: Callable[[str], None] = print,
    tick: Callable[[Sweep], None] = lambda sweep: None,
) -> Sweep:
    """Run a sweep to its end.

    Args:
        spec: the sweep, checked by `check_remedies`.
        plan: what `check_remedies` returns.
        output: directory, which the caller has locked unless there is a `storage`.
        executor: what runs the trials.
        storage: URL of a database that several workers share; None takes a journal file.
        name: of the study in the storage.
        gpus: GPUs of a trial.
        retry_failed: whether trials that have failed run again.
        report_only: whether nothing runs, and the study is only read.
        intervals: bootstrap that early stopping asks.
        event: receives a line for each event.
        tick: called once a round.

    Returns:
        The sweep, whose study holds every result.

    Raises:
        StudyError: the storage cannot be reached or holds another sweep.
    """
    study = Study(
        open_storage(storage, output),
        name,
        spec.fingerprint,
        [r.name for r in spec.remedies],
        spec.seeds,
        reference=spec.reference,
        alone=storage is None,
    )
    if retry_failed:
        study.retry_failed()
    sweep = Sweep(
        spec,
        plan,
        output,
        study,
        executor,
        gpus=gpus,
        intervals=intervals,
        event=event,
        tick=tick,
    )
    if not report_only:
        sweep.run()
    return sweep
