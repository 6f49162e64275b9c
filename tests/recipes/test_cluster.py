"""A recipe on a Ray cluster of two nodes, one of which is killed."""

import json
import re
import time
from pathlib import Path

import pytest

from ..engine.test_kill import differences, final
from .recipes import recipe
from .test_kill import start


def stages():
    """Two trainings that do not need each other, their predictions, and the ensemble of these."""
    overrides = {"SOLVER": {"MAX_ITER": 40, "CHECKPOINT_PERIOD": 2}}
    trained = [
        {"name": f"model{n}", "kind": "train", "config": "small.yaml"}
        | {"train": ["challenge_train"], "test": ["challenge_val"]}
        | {"overrides": overrides | {"SEED": n}}
        for n in (1, 2)
    ]
    predicted = [
        {"name": f"val{n}", "kind": "predict", "model": f"model{n}", "dataset": "challenge_val"}
        for n in (1, 2)
    ]
    inputs = [{"predictions": f"val{n}"} for n in (1, 2)]
    merged = {"name": "merged", "kind": "ensemble", "dataset": "challenge_val", "inputs": inputs}
    return [*trained, *predicted, merged]


@pytest.mark.slow
def test_a_recipe_outlives_a_node_of_its_cluster(directory, cluster):
    cluster, nodes = cluster
    recipe(stages=stages())
    arguments = ["--ray", cluster.address, "--jobs", "2", "--num-gpus", "0"]
    process = start(*arguments)
    saved = [Path(f"out/model{n}/run/last_checkpoint") for n in (1, 2)]
    end = time.monotonic() + 300
    while not all(path.exists() for path in saved) and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    assert printed.count("it starts again") == 1, printed
    assert "5 of 5 stages" in Path("out/report.md").read_text()
    logs = "".join(Path(f"out/logs/model{n}.log").read_text() for n in (1, 2))
    resumed = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", logs)]
    assert len(resumed) == 3 and max(resumed) > 0  # from a checkpoint, and nothing runs twice

    process = start("--output", "alone")
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    for name in ("model1", "model2"):
        states = [final(Path(output, name, "run"))["model"] for output in ("alone", "out")]
        assert differences(*states) == []
    merged = [json.loads(Path(o, "merged/predictions.json").read_text()) for o in ("alone", "out")]
    assert merged[0] == merged[1]
