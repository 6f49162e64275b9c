"""Configurations of train stages, made and checked before the first stage runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from d2_balance.utils.config_tree import merge

from .recipe import Recipe, Stage


def training_config(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The configuration of a train stage: its YAML, overrides and datasets."""
    from d2_balance.engine import read_config

    base = os.path.join(recipe.directory, stage["config"])
    own = [list(e) if not isinstance(e, dict) else e for e in read_config(base).DATASETS.REGISTER]
    config = merge({"_BASE_": os.path.abspath(base)}, stage["overrides"] or {})
    config["DATASETS"] = dict(config.get("DATASETS", {})) | {
        "TRAIN": list(stage["train"]),
        "TEST": list(stage["test"] or []),
        "REGISTER": own,
    }
    return config


def read_training_config(stage: Stage, recipe: Recipe) -> Any:
    """The full config (CfgNode) of a train stage.

    Raises:
        ValueError: its YAML cannot be read, or has keys or types that do not exist.
    """
    return _full(training_config(stage, recipe), stage, recipe)


def _full(config: dict[str, Any], stage: Stage, recipe: Recipe) -> Any:
    from detectron2.config import CfgNode

    from d2_balance.engine import read_config

    cfg = read_config(config.pop("_BASE_"))
    try:
        cfg.merge_from_other_cfg(CfgNode(config))
    except (KeyError, ValueError, AssertionError) as error:
        text = f"{recipe.path}: stage {stage.name}: overrides: {error.args[0]}"
        raise ValueError(text) from error
    return cfg


def check_configs(recipe: Recipe) -> None:
    """Checks the config of each train stage, and what a predict stage makes of its model's.

    Raises:
        ValueError: as `read_training_config`.
    """
    for stage in recipe.stages:
        if stage.kind == "train":
            read_training_config(stage, recipe)
        elif stage.kind == "predict":
            model = next(other for other in recipe.stages if other.name == stage["model"])
            config = merge(training_config(model, recipe), stage["overrides"] or {})
            _full(config, stage, recipe)


def external_names(stage: Stage, recipe: Recipe, known: Callable[[str], bool]) -> list[str]:
    """Names of the external datasets of a train stage, which it may train on.

    Args:
        stage: the stage.
        recipe: its recipe.
        known: whether a dataset is registered, in the recipe, or made by a stage.

    Raises:
        ValueError: naming recipe, stage and entry, if an entry has another form, or a TARGET does
            not exist.
    """
    from d2_balance.data.catalog.external import entries_as_given

    cfg = read_training_config(stage, recipe)
    with _names(stage, recipe):
        entries = entries_as_given(cfg)
        for key, entry in entries:
            if not known(entry["TARGET"]):
                raise ValueError(f"{key}: TARGET {entry['TARGET']!r} is no dataset of the recipe")
    return [entry["NAME"] for _, entry in entries]


def check_second_files(stage: Stage, recipe: Recipe) -> None:
    """Checks the files of DATASETS.EXTERNAL, IGNORE_REGIONS and CLASS_COUNTS_FILE of a train stage.

    A stage may run for days before the one that needs the file.

    Raises:
        ValueError: naming recipe, stage and entry, if a file does not exist.
    """
    from d2_balance.data.catalog.external import external_entries
    from d2_balance.data.class_counts import counts_file
    from d2_balance.data.ignore_regions import region_files

    cfg = read_training_config(stage, recipe)
    with _names(stage, recipe):
        region_files(cfg)
        counts_file(cfg)
        external_entries(cfg)


@contextmanager
def _names(stage: Stage, recipe: Recipe) -> Iterator[None]:
    """Puts the recipe and the stage in front of what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{recipe.path}: stage {stage.name}: {error}") from error
