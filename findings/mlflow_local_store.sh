#!/usr/bin/env bash
# mlflow-skinny 3.17.2: a local directory of runs needs a consent.
#
# Guess: a tracking URI file:///directory works as in every version before, so that the metrics of a
# training go to ./mlruns without a server.
# Seen: MlflowException, "The filesystem tracking backend ... is in maintenance mode", before the first
# run. Only MLFLOW_ALLOW_FILE_STORE=true lets it through. The other local store, sqlite:///, which the
# message recommends, is not in mlflow-skinny: MlflowClient refuses the URI as unsupported. This
# package sets the variable when it writes to a directory.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet mlflow-skinny==3.17.2
cd "$directory"
cat > local_store.py <<'PYTHON'
import os
import pathlib
import sys

import mlflow


def attempt(uri):
    try:
        return "experiment " + mlflow.MlflowClient(uri).create_experiment(f"e{len(uri)}")[:4] + "..."
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110]}"


os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
uri = pathlib.Path("mlruns").absolute().as_uri()
print(f"mlflow-skinny {mlflow.__version__}")
plain = attempt(uri)
print("file store                              ", plain)
sqlite = attempt("sqlite:///runs.db")
print("sqlite store                            ", sqlite)
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
consent = attempt(uri)
print("file store, MLFLOW_ALLOW_FILE_STORE=true", consent)
same = "maintenance mode" in plain and "unsupported URI" in sqlite and consent.startswith("experiment")
sys.exit(0 if same else 1)
PYTHON
"$directory/venv/bin/python" local_store.py
