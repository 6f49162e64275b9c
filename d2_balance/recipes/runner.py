"""Run the stages of a recipe, and go on where a stopped run was.

A stage that is done has a directory with `done.json` in the output. Others work in a directory of
another name, which becomes theirs when they are done, so that a failure touches no finished output.
A training works in its own directory, whose checkpoints `train_net.py --resume` goes on from; there
`started.json` says with what settings, and its `done.json` is written last.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container
from typing import Any

from d2_balance.utils.executors import Executor
from d2_balance.utils.files import read_json, write_json
from d2_balance.utils.lock import LOCK_FILE, directory_lock

from .class_maps import ClassLists, check_class_maps
from .datasets import DataSets
from .recipe import Recipe, Stage, datasets_in, sets_of
from .report import write_report
from .stages import StageError, Work, add_sets, outputs_of, seconds_of_stage
from .training import check_configs, check_second_files, external_names, read_training_config
from .workers import Result, Workers

DONE, STARTED = "done.json", "started.json"
JOBS = ".jobs"
STARTS = 3  # of a stage whose machine goes away


def check_names(recipe: Recipe, known: Container[str]) -> None:
    """Checks that there is each dataset that a stage names; reads no annotation file.

    Args:
        recipe: the recipe.
        known: names that are registered or stand in the recipe's `datasets`.

    Raises:
        ValueError: naming recipe, stage and dataset.
    """
    made = {name for stage in recipe.stages for name in sets_of(stage)}

    def exists(name: str) -> bool:
        return name in made or name in known

    for stage in recipe.stages:
        external = external_names(stage, recipe, exists) if stage.kind == "train" else ()
        for name in datasets_in(stage):
            if not exists(name) and name not in external:
                raise ValueError(
                    f"{recipe.path}: stage {stage.name}: the dataset {name!r} is neither "
                    "registered, nor in 'datasets', nor made by a stage before"
                )


class Runner:
    """A recipe and its output directory.

    Args:
        recipe: the recipe.
        output: directory of all stages.
        resume: go on in a directory that holds stages.
        gpus: processes of a training; 0 is one that asks a cluster for no GPU.
        say: receives one line for each stage.

    Raises:
        FileExistsError: the directory holds stages, and `resume` is False.
        ValueError: stages that are done, or trainings that were begun, do not fit the recipe, or
            miss files or predecessors; a stage that is not done has a directory; or a dataset, a
            file or a class of a class map does not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: str,
        *,
        resume: bool = False,
        gpus: int = 1,
        say: Callable[[str], None] = print,
    ):
        self.recipe, self.output, self.gpus, self.say = recipe, os.path.abspath(output), gpus, say
        self.jobs = os.path.join(self.output, JOBS)
        self.datasets = DataSets(recipe.datasets)
        present = set(os.listdir(output)) if os.path.isdir(output) else set()
        if present - {LOCK_FILE} and not resume:
            raise FileExistsError(
                f"{output} is not empty, and nothing is overwritten: pass --resume to go on with "
                "the recipe there, or another --output"
            )
        check_configs(recipe)
        for stage in recipe.stages:
            if stage.kind == "train":
                check_second_files(stage, recipe)
        check_names(recipe, self.datasets)
        self.fingerprints = self._fingerprints()
        self.done = {s.name: found for s in recipe.stages if (found := self._read(s, DONE))}
        self._check_done()
        self._check_started()
        self._check_free()
        lists = ClassLists(recipe, self.datasets)
        for stage in recipe.stages:
            if stage.name not in self.done:
                check_class_maps(stage, recipe, lists)

    def run(self, executor: Executor | None = None) -> str:
        """Run what is not done yet; the report is written after each stage.

        Args:
            executor: runs stages side by side; None runs one after another in this process.

        Returns:
            The report, report.md; report.html lies beside it.

        Raises:
            StageError: a stage has failed; those before it stay done.
            ValueError: another run works in the output directory, or has worked there since the
                recipe was read.
        """
        with directory_lock(self.output):
            new = {s.name for s in self.recipe.stages if self._read(s, DONE)} - self.done.keys()
            if new:
                raise ValueError(
                    f"another run has finished {', '.join(sorted(new))} in {self.output} "
                    "meanwhile: start again with --resume"
                )
            return self._run_all(executor)

    def _run_all(self, executor: Executor | None) -> str:
        os.makedirs(os.path.join(self.output, "logs"), exist_ok=True)
        waiting = []
        for stage in self.recipe.stages:
            if stage.name in self.done:
                self.say(f"{self._label(stage)}: done before")
                add_sets(stage, self._directory(stage), self.datasets)
            else:
                waiting.append(stage)
        with Workers(executor, self.jobs) as workers:
            failed = self._run_waiting(waiting, workers)
        if failed:
            raise StageError("; ".join(failed))
        return write_report(self.recipe, self.output, self.done)

    def _run_waiting(self, waiting: list[Stage], workers: Workers) -> list[str]:
        """Run stages as soon as what they need is done; after a failure no more are started.

        Returns:
            What failed, a sentence for each stage.
        """
        failed: list[str] = []
        starts = collections.Counter[str]()
        while waiting or workers.running:
            ready = [s for s in waiting if all(name in self.done for name in s.needs)]
            if ready and not failed and workers.free:
                waiting.remove(ready[0])
                starts[ready[0].name] += 1
                self.say(f"{self._label(ready[0])} ...")
                workers.start(self._begin(ready[0]))
                continue
            if not workers.running:
                break
            result = workers.wait()
            if result.lost and not failed and starts[result.work.stage.name] < STARTS:
                self.say(f"{self._label(result.work.stage)}: {result.error}; it starts again")
                waiting.append(result.work.stage)
                continue
            try:
                self._end(result)
            except (StageError, OSError) as error:
                failed.append(f"stage {result.work.stage.name}: {error}")
        return failed

    def _label(self, stage: Stage) -> str:
        number = self.recipe.stages.index(stage) + 1
        return f"[{number}/{len(self.recipe.stages)}] {stage.name} ({stage.kind})"

    def _begin(self, stage: Stage) -> Work:
        """Make the directory that a stage works in."""
        directory = self._directory(stage)
        trains = stage.kind == "train"
        place = directory if trains else os.path.join(self.output, f".{stage.name}.partial")
        if not trains and os.path.isdir(place):
            shutil.rmtree(place)  # of a run that was stopped; nothing refers to it
        os.makedirs(place, exist_ok=True)
        if trains:
            write_json(os.path.join(place, STARTED), self._made_with(stage), indent=1, sync=True)
        log = os.path.join(self.output, "logs", f"{stage.name}.log")
        directories = {name: os.path.join(self.output, name) for name in self.done}
        return Work(stage, place, self.recipe, self.datasets, directories, log, self.gpus)

    def _end(self, result: Result) -> None:
        """Finish a stage that has ended.

        Raises:
            StageError: it has failed.
        """
        stage, place = result.work.stage, result.work.directory
        if result.error is not None:
            raise StageError(result.error)
        seconds = seconds_of_stage(result.work)
        self._finish(stage, place, seconds)
        if stage.kind != "train":
            os.rename(place, self._directory(stage))
        add_sets(stage, self._directory(stage), self.datasets)
        self.say(f"{self._label(stage)}: {seconds:.0f} s")
        write_report(self.recipe, self.output, self.done)

    def _finish(self, stage: Stage, place: str, seconds: float) -> None:
        missing = [f for f in outputs_of(stage) if not os.path.exists(os.path.join(place, f))]
        if missing:
            raise StageError(f"it ended without {', '.join(missing)}")
        found = self._made_with(stage) | {"seconds": seconds}
        write_json(os.path.join(place, DONE), found, indent=1, sync=True)
        self.done[stage.name] = found

    def _made_with(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name,
            "kind": stage.kind,
            "fingerprint": self.fingerprints[stage.name],
            "settings": stage.settings,
        }

    def _directory(self, stage: Stage) -> str:
        return os.path.join(self.output, stage.name)

    def _read(self, stage: Stage, file: str) -> dict[str, Any] | None:
        path = os.path.join(self._directory(stage), file)
        return read_json(path) if os.path.isfile(path) else None

    def _check_done(self) -> None:
        by_name = {stage.name: stage for stage in self.recipe.stages}
        for name, found in self.done.items():
            stage, directory = by_name[name], self._directory(by_name[name])
            lost = [n for n in stage.needs if n not in self.done]
            if lost:
                raise ValueError(
                    f"stage {lost[0]} is missing in {self.output}, and stage {name}, which is "
                    f"done, was made from it: put {lost[0]} back, or remove {directory} as well"
                )
            self._check_settings(stage, found, "made")
            for file in outputs_of(stage):
                if not os.path.exists(os.path.join(directory, file)):
                    raise ValueError(
                        f"stage {name} is done, but its {file} is missing in {directory}: put it "
                        "back, or remove the directory to make it again"
                    )

    def _check_started(self) -> None:
        for stage in self.recipe.stages:
            found = self._read(stage, STARTED)
            if found and stage.name not in self.done:
                self._check_settings(stage, found, "begun")

    def _check_settings(self, stage: Stage, found: dict[str, Any], made: str) -> None:
        if found["fingerprint"] != self.fingerprints[stage.name]:
            changed = _difference(found["settings"], stage.settings)
            raise ValueError(
                f"stage {stage.name} in {self.output} was {made} with other settings ({changed}); "
                f"use another --output, or remove {self._directory(stage)} to make it again"
            )

    def _check_free(self) -> None:
        """Refuse a directory that is there, unless it is of a training, which goes on in it."""
        for stage in self.recipe.stages:
            directory = self._directory(stage)
            if stage.kind != "train" and stage.name not in self.done and os.path.lexists(directory):
                raise ValueError(
                    f"stage {stage.name} is not done, for {directory} has no {DONE}; nothing is "
                    "overwritten: remove the directory to make it again"
                )

    def _fingerprints(self) -> dict[str, str]:
        """A key of each stage's settings and of all that it is made from."""
        found: dict[str, str] = {}
        named = {entry[0]: entry for entry in self.recipe.datasets}
        for stage in self.recipe.stages:
            content: list[Any] = [stage.kind, stage.settings, [found[n] for n in stage.needs]]
            content += [named[n] for n in datasets_in(stage) if n in named]
            if stage.kind == "train":
                content.append(read_training_config(stage, self.recipe).dump())
            for entry in stage["inputs"] or []:
                if entry.get("map"):
                    with open(os.path.join(self.recipe.directory, entry["map"]), "rb") as file:
                        content.append(file.read().decode("utf-8", "replace"))
            text = json.dumps(content, sort_keys=True, default=str)
            found[stage.name] = hashlib.sha256(text.encode()).hexdigest()
        return found


def _difference(before: dict, now: dict) -> str:
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return ", ".join(sorted(keys)) if keys else "its config, a dataset or a stage before it"
