"""What each kind of stage does in its directory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import yaml

from d2_balance.evaluation.evaluate import evaluate_predictions
from d2_balance.evaluation.files import file_name_of
from d2_balance.evaluation.merge.ensemble import merge_files
from d2_balance.evaluation.merge.rescore import apply_factors, fit_factors
from d2_balance.evaluation.predictions import read_predictions
from d2_balance.evaluation.record import Evaluation
from d2_balance.utils.config_tree import merge
from d2_balance.utils.executors import Job, run_job
from d2_balance.utils.files import read_json, read_yaml, write_json, write_text

from .datasets import DataSets, images_of, keep_classes, split
from .recipe import Recipe, Stage, sets_of
from .training import training_config

PREDICTIONS, FACTORS, EVALUATION = "predictions.json", "factors.json", "evaluation.json"
SECONDS = "seconds.json"
WEIGHTS = os.path.join("run", "model_final.pth")


class StageError(Exception):
    """A stage has failed; the message says which and where its log is."""


@dataclass
class Work:
    """What a stage works with.

    Attributes:
        stage: its settings.
        directory: where its output goes; of a stage that is not done yet.
        recipe: the recipe.
        datasets: datasets known so far.
        directories: stage name to directory, of the stages that are done.
        log: its log file.
        gpus: processes of a training; 0 is one that asks a cluster for no GPU.
    """

    stage: Stage
    directory: str
    recipe: Recipe
    datasets: DataSets
    directories: Mapping[str, str]
    log: str
    gpus: int

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def of(self, stage: str, name: str) -> str:
        """A file of an earlier stage."""
        return os.path.join(self.directories[stage], name)


def run_stage(work: Work) -> None:
    """Do the work of a stage, with what it prints in its log.

    Raises:
        StageError: a process has failed.
        ValueError: the data do not allow it.
    """
    start, before = time.time(), seconds_of_stage(work)
    try:
        with open(work.log, "a", encoding="utf-8") as log, redirect_stdout(log):
            _ACTIONS[work.stage.kind](work)
    finally:  # a training that is stopped goes on later
        write_json(work.path(SECONDS), before + time.time() - start)


def seconds_of_stage(work: Work) -> float:
    """Return how long a stage has worked, over all of its runs."""
    path = work.path(SECONDS)
    return float(read_json(path)) if os.path.isfile(path) else 0.0


def outputs_of(stage: Stage) -> list[str]:
    """Files that a finished stage must have."""
    return {
        "classes": ["annotations.json"],
        "split": ["rest.json", "held.json"],
        "train": [WEIGHTS],
        "fit": [FACTORS],
        "evaluate": [EVALUATION],
    }.get(stage.kind, [PREDICTIONS])


def add_sets(stage: Stage, directory: str, datasets: DataSets) -> None:
    """Make the datasets of a finished stage known."""
    for name, file in zip(sets_of(stage), outputs_of(stage), strict=False):
        datasets.add(name, os.path.join(directory, file), datasets.directory(stage["from"]))


def _classes(work: Work) -> None:
    stage = work.stage
    data = work.datasets.load(stage["from"]).data
    found = keep_classes(data, stage["keep"], stage["every"], stage["from"])
    write_json(work.path("annotations.json"), found)


def _split(work: Work) -> None:
    data = work.datasets.load(work.stage["from"]).data
    parts = split(data, work.stage["fraction"], work.stage["seed"] or 0)
    for name, part in zip(("rest.json", "held.json"), parts, strict=True):
        write_json(work.path(name), part)


def _train(work: Work) -> None:
    config = training_config(work.stage, work.recipe)
    if work.stage["weights"] is not None:
        weights = work.stage["weights"]
        known = weights in work.directories
        config["MODEL"] = config.get("MODEL", {}) | {
            "WEIGHTS": work.of(weights, WEIGHTS) if known else weights
        }
    config["OUTPUT_DIR"] = work.path("run")
    _register(config, work.datasets.entries())
    path = work.path("config.yaml")
    _write_yaml(path, config)
    _train_process(work, "--resume", "--config-file", path, "--num-gpus", str(max(work.gpus, 1)))


def _predict(work: Work) -> None:
    stage, directory = work.stage, work.directories[work.stage["model"]]
    config = read_yaml(os.path.join(directory, "config.yaml"))
    merge(config, stage["overrides"] or {})
    name, entries = stage["dataset"], work.datasets.entries()
    if stage["classes"]:
        root = work.datasets.directory(name)
        images = work.datasets.load(name)
        other = work.datasets.load(stage["classes"])
        name = f"{stage.name}_images"
        images_file = work.path("images.json")
        write_json(images_file, images_of(images, root, other))
        entries = [*entries, [name, images_file, root]]
    _register(config, entries)
    config["DATASETS"]["TEST"] = [name]
    config["OUTPUT_DIR"] = work.path("run")
    config["MODEL"] = config.get("MODEL", {}) | {"WEIGHTS": os.path.join(directory, WEIGHTS)}
    path = work.path("config.yaml")
    _write_yaml(path, config)
    _train_process(work, "--eval-only", "--config-file", path)
    found = work.path(os.path.join("run", "inference", f"predictions_{file_name_of(name)}.json"))
    os.replace(found, work.path(PREDICTIONS))
    if not stage["classes"]:
        _evaluate_file(work, work.path(PREDICTIONS))


def _ensemble(work: Work) -> None:
    stage = work.stage
    inputs = []
    for entry in stage["inputs"]:
        classes, map_file = entry.get("classes"), entry.get("map")
        inputs.append(
            (
                work.of(entry["predictions"], PREDICTIONS),
                classes and work.datasets.source(classes),
                map_file and os.path.join(work.recipe.directory, map_file),
            )
        )
    dataset = work.datasets.source(stage["dataset"])
    options = {k: stage[k] for k in ("method", "iou", "max_dets") if stage[k] is not None}
    print(merge_files(inputs, dataset, work.path(PREDICTIONS), **options))
    _evaluate_file(work, work.path(PREDICTIONS))


def _fit(work: Work) -> None:
    stage, source = work.stage, work.datasets.source
    options = {k: stage[k] for k in ("method", "metric", "max_dets") if stage[k] is not None}
    text = fit_factors(
        work.of(stage["predictions"], PREDICTIONS),
        source(stage["dataset"]),
        work.path(FACTORS),
        tests=[source(name) for name in stage["test"]],
        **options,
    )
    print(text)


def _rescore(work: Work) -> None:
    stage = work.stage
    options = {} if stage["max_dets"] is None else {"max_dets": stage["max_dets"]}
    text = apply_factors(
        work.of(stage["predictions"], PREDICTIONS),
        work.of(stage["factors"], FACTORS),
        work.datasets.source(stage["dataset"]),
        work.path(PREDICTIONS),
        **options,
    )
    print(text)
    _evaluate_file(work, work.path(PREDICTIONS))


def _evaluate(work: Work) -> None:
    if _evaluate_file(work, work.of(work.stage["predictions"], PREDICTIONS)) is None:
        raise ValueError(f"the dataset {work.stage['dataset']} has no annotations to compare with")


def _evaluate_file(work: Work, path: str) -> Evaluation | None:
    """Writes evaluation.json, where the images have annotations."""
    stage = work.stage
    truth = work.datasets.load(stage["dataset"])
    if not len(truth.id):
        return None
    train = work.datasets.load(stage["train"]) if stage["train"] else None
    cap = stage["max_dets"] or None
    found = evaluate_predictions(truth, read_predictions(path, truth), train=train, max_dets=cap)
    found.write(work.path(EVALUATION))
    return found


_ACTIONS: dict[str, Callable[[Work], Any]] = {
    "classes": _classes,
    "split": _split,
    "train": _train,
    "predict": _predict,
    "ensemble": _ensemble,
    "fit": _fit,
    "rescore": _rescore,
    "evaluate": _evaluate,
}


def _train_process(work: Work, *arguments: str) -> None:
    """Run `d2-balance train`, and end it when this process is ended.

    Raises:
        StageError: it has failed.
    """
    command = [sys.executable, "-m", "d2_balance", "train", *arguments]
    status = run_job(Job(command, work.log), signals=False)
    if status:
        with open(work.log, encoding="utf-8", errors="replace") as log:
            last = "".join(log.readlines()[-5:])
        raise StageError(f"the training ended with status {status}; {work.log} ends:\n{last}")


def _write_yaml(path: str, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False))


def _register(config: dict[str, Any], entries: list[list[str]]) -> None:
    """Adds datasets; those of the recipe replace the config's of the same name."""
    taken = {entry[0] for entry in entries}
    own = [e for e in config["DATASETS"]["REGISTER"] if _name_of(e) not in taken]
    config["DATASETS"]["REGISTER"] = own + entries


def _name_of(entry: Any) -> str:
    return entry["NAME"] if isinstance(entry, dict) else entry[0]
