#!/usr/bin/env bash
# Optuna 5.0.0: four workers on one grid run more trials than the grid has points.
#
# Expected: GridSampler with 6 points (three values, two seeds) and four workers that call optimize() makes
# 6 trials.
# Seen: 9, every point once and three of them a second time. A worker stops only when it finds the grid
# visited, and draws among points that others are running: with trials of a day each, GPU days are
# spent on repetitions, and a mean over the trials counts some seeds twice.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet optuna==5.0.0
cd "$directory"
cat > script.py <<'PYTHON'
import multiprocessing
import sys
import time
import warnings

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
GRID = {"gamma": [1, 2, 3], "seed": [1, 2]}


def storage():
    return JournalStorage(JournalFileBackend("study.journal"))


def objective(trial):
    for name, values in GRID.items():
        trial.suggest_categorical(name, values)
    time.sleep(1)
    return 1.0


def work(barrier):
    sampler = optuna.samplers.GridSampler(GRID)
    study = optuna.load_study(study_name="s", storage=storage(), sampler=sampler)
    barrier.wait()
    study.optimize(objective)


def main():
    optuna.create_study(study_name="s", storage=storage())
    barrier = multiprocessing.Barrier(4)
    workers = [multiprocessing.Process(target=work, args=(barrier,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trials = optuna.load_study(study_name="s", storage=storage()).trials
    points = {tuple(trial.params.items()) for trial in trials}
    states = {trial.state.name for trial in trials}
    print(
        f"optuna {optuna.__version__}: grid of 6, {len(points)} points, {len(trials)} trials, {states}"
    )
    return 0 if len(points) == 6 < len(trials) and states == {"COMPLETE"} else 1


if __name__ == "__main__":
    sys.exit(main())
PYTHON
"$directory/venv/bin/python" script.py
