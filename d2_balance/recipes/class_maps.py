"""Class maps of a recipe, checked before the first stage runs where both class lists are known.

Known are the classes of annotation files that exist, and of the datasets that `split` and
`classes` stages make of them. The others are checked by the stage that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from d2_balance.data.annotations import read_annotations
from d2_balance.data.catalog.external import external_entries
from d2_balance.data.catalog.metadata import target_categories
from d2_balance.data.class_map import read_class_map, resolve_class_map
from d2_balance.data.ignore_regions import region_files

from .datasets import DataSets, chosen_classes
from .recipe import Recipe, Stage, sets_of
from .training import read_training_config

Categories = list[dict[str, Any]] | None
Side = tuple[str, Callable[[], Categories]]
"""Name of a source or target of a map, and what reads its classes."""


class ClassLists:
    """The `categories` of annotation files and datasets, each file read once.

    Args:
        recipe, datasets: where datasets come from.
    """

    def __init__(self, recipe: Recipe, datasets: DataSets) -> None:
        self._makers = {name: stage for stage in recipe.stages for name in sets_of(stage)}
        self._datasets = datasets
        self._files: dict[str, list[dict[str, Any]]] = {}

    def of_file(self, path: str) -> list[dict[str, Any]]:
        """Those of an annotation file.

        Raises:
            ValueError: it cannot be read.
        """
        if path not in self._files:
            self._files[path] = read_annotations(path).categories
        return self._files[path]

    def of_set(self, name: str, trains: bool = False) -> Categories:
        """Those of a dataset; None where they are not known yet.

        Args:
            name: of a stage, of the recipe, or registered.
            trains: a training takes the class names of registered sets from their metadata.

        Raises:
            ValueError: a `classes` stage keeps a class that does not exist.
        """
        if name in self._makers:
            stage = self._makers[name]
            found = self.of_set(stage["from"])
            if stage.kind != "classes" or found is None:
                return found
            ids = chosen_classes(found, stage["keep"], stage["every"], stage["from"])
            return [category for category in found if category["id"] in ids]
        path = self._datasets.file(name)
        if path is None:
            return None
        if trains and self._datasets.source(name) == name:
            return target_categories(name)
        return self.of_file(path)


def check_class_maps(stage: Stage, recipe: Recipe, lists: ClassLists) -> None:
    """Checks the class maps of a train or ensemble stage.

    Raises:
        ValueError: naming recipe, stage, file and class.
    """
    for place, path, source, target in _uses(stage, recipe, lists):
        try:
            entries = read_class_map(path)
            own, others = source[1](), target[1]()
            if own is not None and others is not None:
                resolve_class_map(entries, own, others, (source[0], target[0]), path)
        except ValueError as error:
            raise ValueError(f"{recipe.path}: stage {stage.name}: {place}: {error}") from error


def _uses(stage: Stage, recipe: Recipe, lists: ClassLists) -> Iterator[tuple[str, str, Side, Side]]:
    """(place in the recipe, class map file, source, target) of each map of a stage."""
    if stage.kind == "ensemble":
        target = stage["dataset"]
        for number, entry in enumerate(stage["inputs"]):
            source, path = entry.get("classes"), entry.get("map")
            if source and path:
                path = os.path.normpath(os.path.join(recipe.directory, path))
                sides = [(name, partial(lists.of_set, name)) for name in (source, target)]
                yield f"inputs[{number}]", path, sides[0], sides[1]
    if stage.kind == "train":
        cfg = read_training_config(stage, recipe)
        found = [
            (key, entry.get("CLASS_MAP"), entry["JSON"], entry["TARGET"])
            for key, entry in external_entries(cfg)
        ] + [
            (f"DATASETS.IGNORE_REGIONS[{number}]", x.class_map, x.json_file, x.dataset)
            for number, x in enumerate(region_files(cfg))
        ]
        for key, path, file, target in found:
            if path:
                source = file, partial(lists.of_file, file)
                yield key, path, source, (target, partial(lists.of_set, target, True))
