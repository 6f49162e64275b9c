"""Recipes: a YAML file of datasets and stages, checked before the first stage runs.

    output: output/challenge
    datasets:                       # as DATASETS.REGISTER
      - [my_train, train.json, images]
    stages:
      - {name: coco, kind: train, config: ../mask_rcnn.yaml, train: [my_train]}

Paths of configs and class maps are relative to the recipe's directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2_balance.utils.files import read_yaml
from d2_balance.utils.names import closest

from .fields import check_fields


@dataclass(frozen=True)
class Kind:
    """What a kind of stage takes.

    Attributes:
        required, optional: names of its fields.
        stages: those of them that name earlier stages, and the kinds that these may be.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    stages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


PREDICTIONS = ("predict", "ensemble", "rescore")
_RESULT = {"predictions": PREDICTIONS}

KINDS = {
    # a dataset with some classes of another: names, or [n, k] for each n-th class from k on
    "classes": Kind(("from",), ("keep", "every")),
    # two datasets, <name>_rest and <name>_held, with a fraction of the images in the second
    "split": Kind(("from", "fraction"), ("seed",)),
    # `weights` is a stage, a file, or an address of the model zoo
    "train": Kind(("config", "train"), ("test", "overrides", "weights")),
    # `classes` is the dataset of the model's classes, where `dataset` has others
    "predict": Kind(("model", "dataset"), ("classes", "overrides"), {"model": ("train",)}),
    # inputs: {predictions: stage, classes: dataset, map: file}
    "ensemble": Kind(("inputs", "dataset"), ("method", "iou", "max_dets")),
    "fit": Kind(("predictions", "dataset", "test"), ("method", "metric", "max_dets"), _RESULT),
    "rescore": Kind(
        ("predictions", "factors", "dataset"), ("max_dets",), _RESULT | {"factors": ("fit",)}
    ),
    "evaluate": Kind(("predictions", "dataset"), ("train", "max_dets"), _RESULT),
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its directory in the output.
        kind: one of KINDS.
        settings: its fields.
        needs: names of the stages whose outputs it reads.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    needs: tuple[str, ...]

    def __getitem__(self, key: str) -> Any:
        return self.settings.get(key)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `directory` is where its relative paths start."""

    path: str
    directory: str
    output: str
    datasets: list[list[str]]
    stages: list[Stage]

    @classmethod
    def read(cls, path: str) -> Recipe:
        """Read and check a recipe.

        Raises:
            ValueError: naming the file, the stage and the field.
        """
        content = read_yaml(path)
        if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
            raise ValueError(f"{path}: a recipe has 'stages', a list")
        _only(content, ("output", "datasets", "stages"), path)
        datasets = [_dataset(entry, path) for entry in content.get("datasets") or []]
        directory = os.path.dirname(os.path.abspath(path))
        stages: list[Stage] = []
        made: dict[str, str] = {}
        for number, entry in enumerate(content["stages"]):
            stage = _stage(entry, f"{path}: stage {number}", stages, made, directory)
            stages.append(stage)
            made |= dict.fromkeys(sets_of(stage), stage.name)
        if not stages:
            raise ValueError(f"{path}: 'stages' is empty")
        return cls(path, directory, content.get("output") or "output/challenge", datasets, stages)


def sets_of(stage: Stage) -> list[str]:
    """Names of the datasets that a stage makes."""
    names = {"classes": ("",), "split": ("_rest", "_held")}
    return [stage.name + end for end in names.get(stage.kind, ())]


def datasets_in(stage: Stage) -> list[str]:
    """Names of the datasets that a stage reads."""
    found: list[Any] = []
    for key in ("from", "train", "test", "dataset", "classes"):
        value = stage[key]
        found += value if isinstance(value, list) else [value]
    found += [entry.get("classes") for entry in stage["inputs"] or []]
    return [name for name in found if name]


def _stage(
    entry: Any, where: str, before: list[Stage], made: Mapping[str, str], directory: str
) -> Stage:
    name, kind, settings = _checked(entry, where, before)
    where = f"{where} ({name})"
    kinds = {stage.name: stage.kind for stage in before}
    form = KINDS[kind]
    needs = [
        _reference(settings[key], kinds, form.stages[key], f"{where}: {key}") for key in form.stages
    ]
    if kind == "train" and settings.get("weights") in kinds:
        needs.append(_reference(settings["weights"], kinds, ("train",), f"{where}: weights"))
    needs += [n for n in _inputs(settings, kinds, where)]
    for key in ("config", "map"):
        for holder in (settings, *(settings.get("inputs") or [])):
            if holder.get(key) and not os.path.isfile(os.path.join(directory, holder[key])):
                raise ValueError(f"{where}: {key} {holder[key]!r} does not exist in {directory}")
    stage = Stage(name, kind, settings, ())
    needs += [made[d] for d in datasets_in(stage) if d in made]
    return Stage(name, kind, settings, tuple(dict.fromkeys(needs)))


def _checked(entry: Any, where: str, before: list[Stage]) -> tuple[str, str, dict[str, Any]]:
    """Return name, kind and settings of a stage whose own fields are right."""
    if not isinstance(entry, dict) or "name" not in entry or "kind" not in entry:
        raise ValueError(f"{where} needs 'name' and 'kind'")
    settings = dict(entry)
    name, kind = settings.pop("name"), settings.pop("kind")
    where = f"{where} ({name})"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise ValueError(f"{where}: a name has letters, digits, _ and -")
    if name in {stage.name for stage in before}:
        raise ValueError(f"{where}: another stage has this name")
    if kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r} is unknown; {closest(str(kind), KINDS)}")
    form = KINDS[kind]
    _only(settings, form.required + form.optional, where)
    missing = [key for key in form.required if settings.get(key) in (None, [], "")]
    if missing:
        raise ValueError(f"{where}: {kind} needs {', '.join(missing)}")
    check_fields(settings, kind, where)
    if kind == "fit" and settings["dataset"] in settings["test"]:
        raise ValueError(
            f"{where}: dataset {settings['dataset']!r} is one of test; it must have images that "
            "nothing is evaluated on, as of a stage of kind split"
        )
    if kind == "classes" and bool(settings.get("keep")) == bool(settings.get("every")):
        raise ValueError(f"{where}: classes needs one of keep and every")
    return name, kind, settings


def _inputs(settings: Mapping[str, Any], kinds: Mapping[str, str], where: str) -> list[str]:
    found = []
    for number, entry in enumerate(settings.get("inputs") or []):
        place = f"{where}: inputs[{number}]"
        if not isinstance(entry, dict) or "predictions" not in entry:
            raise ValueError(f"{place} is {{predictions: stage, classes: dataset, map: file}}")
        _only(entry, ("predictions", "classes", "map"), place)
        check_fields(entry, "inputs", place)
        found.append(_reference(entry["predictions"], kinds, PREDICTIONS, place))
    return found


def _reference(name: Any, kinds: Mapping[str, str], allowed: tuple[str, ...], where: str) -> str:
    fitting = [n for n, kind in kinds.items() if kind in allowed]
    if name not in fitting:
        raise ValueError(
            f"{where}: {name!r} is no stage of kind {' or '.join(allowed)} before this one; "
            f"{closest(str(name), fitting)}"
        )
    return name


def _dataset(entry: Any, path: str) -> list[str]:
    if (
        not isinstance(entry, list)
        or len(entry) != 3
        or not all(isinstance(value, str) for value in entry)
    ):
        raise ValueError(f"{path}: datasets: {entry!r} must be [name, file, directory of images]")
    return entry


def _only(settings: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in settings:
        if key not in allowed:
            raise ValueError(f"{where}: unknown field {key!r}; {closest(str(key), allowed)}")
