#!/usr/bin/env bash
# Optuna 5.0.0: a journal file whose last line is cut off is destroyed by the next worker.
#
# Expected: a study in a journal file is read without its half line, and written on after it; the file is
# append-only so that a crash costs the last entry at most.
# Seen: it is read, and the next worker appends to the half line. From then on every worker ends in
# JSONDecodeError, whatever it reads, and the study with all its trials is lost to Optuna. A full disk
# or a machine that goes down leaves such a line. Before the study is opened again, with no worker at
# work, cut the file after its last newline.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet optuna==5.0.0
cd "$directory"
cat > script.py <<'PYTHON'
import sys
import warnings

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def storage():
    return JournalStorage(JournalFileBackend("study.journal"))


def attempt():
    """Load the study in a worker of its own and run one more trial."""
    try:
        study = optuna.load_study(study_name="s", storage=storage())
        study.optimize(lambda trial: 1.0, n_trials=1)
        return f"{len(study.trials)} trials"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


optuna.create_study(study_name="s", storage=storage()).optimize(lambda trial: 1.0, n_trials=3)
with open("study.journal", "rb+") as file:
    content = file.read()
    file.truncate(len(content) - 9)
print(f"optuna {optuna.__version__}: journal of 3 trials, the last 9 bytes are missing")
print("read only:", len(optuna.load_study(study_name="s", storage=storage()).trials), "trials")
answers = [attempt() for _ in range(3)]
for number, answer in enumerate(answers, 1):
    print(f"worker {number}: {answer}")
sys.exit(0 if all(a.startswith("JSONDecodeError") for a in answers[1:]) else 1)
PYTHON
"$directory/venv/bin/python" script.py
