"""Sweeps with a stand-in for trainings: what runs, what stops early, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from d2_balance.sweep import trial as trials
from d2_balance.sweep.run import Plan, run_sweep
from d2_balance.sweep.spec import Remedy, SweepSpec
from d2_balance.sweep.study import Study, StudyError, open_storage
from d2_balance.utils.executors import Job, JobLostError, LocalExecutor

# Writes metrics.json in three steps of its remedy's quality, then result.json. A remedy may fail.
TRAINING = textwrap.dedent(
    """
    import json, os, sys, time, yaml
    directory = sys.argv[1]
    config = yaml.safe_load(open(os.path.join(directory, "trial.yaml")))
    with open(os.path.join(directory, "starts"), "a") as file:
        file.write("x")
    quality = config.get("QUALITY", 10.0) + 0.1 * config["SEED"]
    if config.get("FAILS"):
        print("error: no memory left"); sys.exit(3)
    if config.get("DIES"):
        os.kill(os.getpid(), 9)
    begin = len(open(os.path.join(directory, "metrics.json")).readlines()) if os.path.exists(
        os.path.join(directory, "metrics.json")) else 0
    for step in range(begin, 3):
        time.sleep(config.get("PAUSE", 0.01))
        with open(os.path.join(directory, "metrics.json"), "a") as file:
            value = quality * (step + 1) / 3
            line = {"iteration": 30 * (step + 1) - 1, "bbox/AP": value, "time": 0.5}
            file.write(json.dumps(line) + "\\n")
        time.sleep(config.get("PAUSE", 0.01))
    result = {"results": {"bbox": {"AP": quality}}, "seconds_per_iteration": 0.5, "peak_bytes": 1}
    json.dump(result, open(os.path.join(directory, "result.json"), "w"))
    """
)
PLAN = Plan(iterations=90, first=30, dataset="any")


class Told:
    """Intervals that say what a test wants."""

    def __init__(self, below=True):
        self.below, self.asked = below, []

    def keep(self, directory, iteration):
        pass

    def is_below(self, directories, leaders, iteration, spread):
        names = [[os.path.basename(d) for d in group] for group in (directories, leaders)]
        self.asked.append((*names, iteration, spread))
        return self.below


def spec_of(seeds=(1,), first=1 / 3, **remedies):
    entries = tuple(Remedy(name, fragment) for name, fragment in remedies.items())
    base = Remedy("baseline", {"QUALITY": 20.0})
    return SweepSpec("sweep.yaml", "base.yaml", {}, (base, *entries), tuple(seeds), first=first)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(trials, "command", lambda d, gpus=0: [sys.executable, str(script), d])
    monkeypatch.setattr("d2_balance.sweep.run.POLL_SECONDS", 0.02)


def sweep_in(directory, spec, *, intervals=None, plan=PLAN, jobs=1, **options):
    lines = []
    sweep = run_sweep(
        spec,
        plan,
        str(directory),
        options.pop("executor", None) or LocalExecutor(jobs),
        intervals=intervals or Told(False),
        event=lines.append,
        **options,
    )
    return sweep, lines


def states(sweep):
    return {sweep.study.key(t): t.state for t in sweep.study.trials()}


def starts(directory, name):
    file = Path(directory, "trials", name, "starts")
    return len(file.read_text()) if file.exists() else 0


def test_every_remedy_runs_once_with_every_seed(tmp_path):
    sweep, _ = sweep_in(tmp_path / "out", spec_of((1, 2), a={"QUALITY": 30.0}), jobs=2)
    done = {k: t.value for k, t in ((sweep.study.key(t), t) for t in sweep.study.trials())}
    assert done == {
        ("baseline", 1): pytest.approx(20.1), ("baseline", 2): pytest.approx(20.2),
        ("a", 1): pytest.approx(30.1), ("a", 2): pytest.approx(30.2),
    }  # fmt: skip
    assert all(starts(tmp_path / "out", f"{n}-seed{s}") == 1 for n, s in done)


def test_a_failure_is_recorded_with_its_message_and_the_sweep_goes_on(tmp_path):
    spec = spec_of(bad={"FAILS": True}, dead={"DIES": True}, good={"QUALITY": 30.0})
    sweep, lines = sweep_in(tmp_path / "out", spec)
    found = states(sweep)
    assert found["bad", 1] == found["dead", 1] == TrialState.FAIL
    assert found["good", 1] == TrialState.COMPLETE
    text = "\n".join(lines)
    assert "no memory left" in text and "killed by SIGKILL" in text


def test_the_hopeless_is_stopped_at_a_rung_and_its_other_seeds_do_not_run(tmp_path):
    told = Told(True)
    spec = spec_of((1, 2), bad={"QUALITY": 3.0, "PAUSE": 0.3})
    sweep, _ = sweep_in(tmp_path / "out", spec, intervals=told)
    found = states(sweep)
    assert found["bad", 1] == found["bad", 2] == TrialState.PRUNED
    own, leaders, iteration, (deviation, freedom) = told.asked[0]
    assert own == ["bad-seed1"] and leaders == ["baseline-seed1", "baseline-seed2"]
    # the reference runs first, and its two seeds are 1/30 apart at the rung
    assert iteration == 30 and freedom == 1 and deviation == pytest.approx(2**-0.5 / 30)
    assert starts(tmp_path / "out", "bad-seed2") == 0
    assert found["baseline", 2] == TrialState.COMPLETE
    stopped = next(t for t in sweep.study.trials() if sweep.study.key(t) == ("bad", 1))
    assert stopped.user_attrs["message"] == "behind the leader at iteration 30 with bbox/AP 1.0"


def test_nothing_is_stopped_while_its_interval_overlaps_the_leaders(tmp_path):
    spec = spec_of(bad={"QUALITY": 3.0, "PAUSE": 0.1})
    sweep, _ = sweep_in(tmp_path / "out", spec, intervals=Told(False))
    assert set(states(sweep).values()) == {TrialState.COMPLETE}


def test_the_reference_is_never_stopped(tmp_path):
    spec = spec_of((1, 2), good={"QUALITY": 90.0, "PAUSE": 0.05})
    sweep, _ = sweep_in(tmp_path / "out", spec, intervals=Told(True), jobs=2)
    assert states(sweep)["baseline", 2] == TrialState.COMPLETE


def test_a_finished_sweep_runs_nothing_again(tmp_path):
    spec = spec_of(a={})
    sweep_in(tmp_path / "out", spec)
    sweep_in(tmp_path / "out", spec)
    assert starts(tmp_path / "out", "a-seed1") == starts(tmp_path / "out", "baseline-seed1") == 1


def test_more_seeds_may_follow_and_another_sweep_is_refused(tmp_path):
    sweep_in(tmp_path / "out", spec_of(a={}))
    more, _ = sweep_in(tmp_path / "out", spec_of((1, 2), a={}))
    assert len(states(more)) == 4 and starts(tmp_path / "out", "a-seed1") == 1
    with pytest.raises(StudyError, match="another sweep file"):
        sweep_in(tmp_path / "out", spec_of(a={"QUALITY": 1.0}))


class Vanishing(LocalExecutor):
    """An executor whose machine goes away under the first job."""

    lost = 0

    def start(self, job, slot):
        running = super().start(job, slot)
        if not self.lost:
            self.lost += 1
            running.stop()
            running.poll = self._gone
        return running

    @staticmethod
    def _gone():
        raise JobLostError("node 7 died")


def test_a_trial_whose_machine_goes_away_runs_again(tmp_path):
    sweep, lines = sweep_in(tmp_path / "out", spec_of(a={}), executor=Vanishing(1))
    assert set(states(sweep).values()) == {TrialState.COMPLETE}
    assert any("node 7 died" in line for line in lines)


KILLED = """
import sys
sys.path[:0] = {path!r}
from d2_balance.sweep import trial as trials
from tests.sweep import test_run as t
trials.command = lambda d, gpus=0: [sys.executable, {script!r}, d]
t.sweep_in({out!r}, t.spec_of((1, 2), a={{"PAUSE": 0.4}}), jobs=2)
"""


def test_a_killed_sweep_goes_on_and_repeats_nothing_that_was_finished(tmp_path):
    out = str(tmp_path / "out")
    code = KILLED.format(path=sys.path, script=str(tmp_path / "training.py"), out=out)
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", code])
        end = time.monotonic() + 30
        before = len(list(Path(out).glob("trials/*/starts")))
        while len(list(Path(out).glob("trials/*/starts"))) <= before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        child.send_signal(signal.SIGKILL)
        child.wait()
    time.sleep(1)
    finished = [f.parent.name for f in Path(out).glob("trials/*/result.json")]
    counts = {name: starts(out, name) for name in finished}
    sweep, _ = sweep_in(out, spec_of((1, 2), a={"PAUSE": 0.4}), jobs=2)
    assert set(states(sweep).values()) == {TrialState.COMPLETE} and len(states(sweep)) == 4
    assert counts == {name: starts(out, name) for name in finished}
    for remedy, seed in states(sweep):
        lines = Path(out, "trials", f"{remedy}-seed{seed}", "metrics.json").read_text()
        assert [json.loads(x)["iteration"] for x in lines.splitlines()] == [29, 59, 89]


@pytest.mark.faults
def test_a_journal_whose_last_line_is_cut_off_costs_that_line_only(tmp_path):
    def opened():
        return Study(open_storage(None, str(tmp_path)), "s", "f", ["a", "b"], [1])

    study = opened()
    study.complete(study.claim(), 0.5, {})
    study.complete(study.claim(), 0.7, {})
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    states = [trial.state for trial in opened().trials()]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]  # dead, and run again
    again = opened()
    assert len(again.requeue_dead()) == 1
    again.complete(again.claim(), 0.7, {})
    assert [trial.value for trial in opened().trials()] == [0.5, 0.7]


def test_two_workers_never_have_one_trial(tmp_path):
    storage = open_storage(None, str(tmp_path))
    workers = [Study(storage, "s", "f", ["a", "b", "c"], [1, 2], alone=False) for _ in range(2)]
    taken = [w.claim() for _ in range(4) for w in workers]
    keys = [Study.key(t) for t in taken if t is not None]
    assert len(keys) == len(set(keys)) == 6


def test_trials_that_two_workers_added_twice_run_once(tmp_path):
    study = Study(open_storage(None, str(tmp_path)), "s", "f", ["a"], [1], alone=False)
    study._add("a", 1, {})
    assert Study.key(study.claim()) == ("a", 1)
    assert study.claim() is None


def test_the_worker_of_another_process_that_lives_is_not_taken_for_dead(tmp_path):
    study = Study(open_storage(None, str(tmp_path)), "s", "f", ["a"], [1], alone=False)
    trial = study.claim()
    other = Study(open_storage(None, str(tmp_path)), "s", "f", ["a"], [1], alone=False)
    assert other.requeue_dead() == []
    dead = f"{study.worker.split(':')[0]}:999999:0"
    study._note(trial, "worker", dead)
    assert [Study.key(t) for t in other.requeue_dead()] == [("a", 1)]
    assert Study.key(other.claim()) == ("a", 1)


def test_a_trial_whose_worker_died_is_the_next_again(tmp_path):
    study = Study(open_storage(None, str(tmp_path)), "s", "f", ["baseline", "a", "b"], [1, 2])
    first, second = study.claim(), study.claim()
    assert [Study.key(t) for t in (first, second)] == [("baseline", 1), ("baseline", 2)]
    assert study.put_back(first, "its worker died")
    assert [Study.key(study.claim()) for _ in range(3)] == [("baseline", 1), ("a", 1), ("b", 1)]


def test_a_trial_is_put_back_three_times_at_most(tmp_path):
    study = Study(open_storage(None, str(tmp_path)), "s", "f", ["a"], [1])
    attempts = 0
    while (trial := study.claim()) is not None:
        attempts += 1
        study.put_back(trial, "gone")
    assert attempts == 3
    (last,) = study.trials()
    assert last.state == TrialState.FAIL and "3 times" in last.user_attrs["message"]


@pytest.mark.parametrize(("given", "slots"), [(None, 1), (None, 2), (None, 1000), ("3", 2)])
def test_jobs_side_by_side_divide_the_threads(tmp_path, monkeypatch, given, slots):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
    running = LocalExecutor(slots).start(Job(command, str(log)), 0)
    while running.poll() is None:
        time.sleep(0.01)
    threads = max(1, len(os.sched_getaffinity(0)) // slots)
    assert log.read_text().strip() == (given or ("None" if slots == 1 else str(threads)))


def test_a_storage_that_cannot_be_reached_is_named_without_its_password():
    pytest.importorskip("psycopg")
    with pytest.raises(StudyError, match=r"me:\*\*\*@localhost:1/x cannot be reached"):
        open_storage("postgresql://me:secret@localhost:1/x", ".")
