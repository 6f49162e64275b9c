#!/usr/bin/env bash
# Optuna 5.0.0: in a journal file, the trial of a killed worker is RUNNING for ever.
#
# Expected: when the next worker of the study calls optimize(), the trial becomes FAIL, and one that was
# enqueued (one configuration of a comparison) is run again.
# Seen: it stays RUNNING, no error is raised, and its configuration is never run: the study ends with
# one result less. Only the storages of databases have heartbeats, and those are off until they are
# asked for.
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


def load():
    return optuna.load_study(
        study_name="s", storage=JournalStorage(JournalFileBackend("study.journal"))
    )


def objective(seconds):
    def run(trial):
        trial.suggest_categorical("loss", ["eql", "seesaw"])
        time.sleep(seconds)
        return 1.0

    return run


def train():
    load().optimize(objective(60), n_trials=1)


def main():
    storage = JournalStorage(JournalFileBackend("study.journal"))
    study = optuna.create_study(study_name="s", storage=storage)
    for loss in ("eql", "seesaw"):
        study.enqueue_trial({"loss": loss})
    worker = multiprocessing.Process(target=train)
    worker.start()
    while not load().trials[0].params:
        time.sleep(0.1)
    worker.kill()
    worker.join()
    load().optimize(objective(0), n_trials=1)
    states = [(trial.state.name, trial.params["loss"]) for trial in load().trials]
    print(f"optuna {optuna.__version__}: a worker was killed, another ran a trial: {states}")
    return 0 if states == [("RUNNING", "eql"), ("COMPLETE", "seesaw")] else 1


if __name__ == "__main__":
    sys.exit(main())
PYTHON
"$directory/venv/bin/python" script.py
