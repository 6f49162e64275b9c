#!/usr/bin/env bash
# submitit 1.5.4: jobs of the local executor all get GPU 0.
#
# Expected: two jobs of one GPU each, started side by side with CUDA_VISIBLE_DEVICES=2,3, run on GPU 2 and
# on GPU 3.
# Seen: both have CUDA_VISIBLE_DEVICES=0. The parent's list is replaced, and nothing is shared out: two
# trainings go to one GPU, one that the user may not have been given, while others are idle. No GPU is
# needed to see it.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet submitit==1.5.4
cd "$directory"
cat > script.py <<'PYTHON'
import os
import sys
import time
from importlib.metadata import version

import submitit


def visible():
    time.sleep(2)  # both run at once
    return os.environ.get("CUDA_VISIBLE_DEVICES")


os.environ["CUDA_VISIBLE_DEVICES"] = "2,3"
executor = submitit.AutoExecutor("jobs", cluster="local")
executor.update_parameters(timeout_min=5, gpus_per_node=1)
jobs = [executor.submit(visible) for _ in range(2)]
seen = [job.result() for job in jobs]
print(f"submitit {version('submitit')}: two jobs of one GPU each see {seen}, the parent '2,3'")
sys.exit(0 if seen == ["0", "0"] else 1)
PYTHON
"$directory/venv/bin/python" script.py
