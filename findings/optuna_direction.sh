#!/usr/bin/env bash
# Optuna 5.0.0: the direction of a study that exists is not compared with the one that is asked for.
#
# Expected: create_study(direction="minimize", load_if_exists=True) on a study that maximizes raises.
# Seen: it returns the study that maximizes, without error or warning. A study that was first created
# without a direction minimizes; with direction="maximize" added to the script afterwards best_trial
# still is the one of the lowest AP.
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

optuna.logging.set_verbosity(optuna.logging.WARNING)
storage = optuna.storages.InMemoryStorage()
study = optuna.create_study(study_name="s", storage=storage)
study.optimize(lambda trial: [0.1, 0.4, 0.3][trial.number], n_trials=3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    again = optuna.create_study(
        study_name="s", storage=storage, direction="maximize", load_if_exists=True
    )
told = [str(warning.message) for warning in caught]
print(
    f"optuna {optuna.__version__}: asked to maximize, the study is to {again.direction.name}, "
    f"best value {again.best_value} of 0.1, 0.4, 0.3, warnings {told}"
)
sys.exit(0 if again.direction.name == "MINIMIZE" and again.best_value == 0.1 and not told else 1)
PYTHON
"$directory/venv/bin/python" script.py
