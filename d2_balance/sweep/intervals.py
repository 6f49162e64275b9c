"""Intervals of the differences between trials, from the predictions that they leave."""

from __future__ import annotations

import functools
import glob
import math
import os
import shutil
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation.bootstrap import (
    ROUNDS,
    Comparison,
    Resampled,
    compare,
    quantile,
    strata_of,
)
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.predictions import read_predictions
from d2_balance.utils.files import atomic_path

RUNGS = "rungs"
RESAMPLES_OF_RUNG = 300  # a rung asks for a sign, not for a figure


class Intervals:
    """Bootstrap of trials on one dataset.

    Args:
        dataset: registered name or annotation file.
        metric: task and figure, such as "bbox/AP".
        cuts: largest image counts of a rare and of a common class; None takes the data's groups.
        train: the training set that counts classes, None for the counts of the file itself.
        max_dets: detections that count, None for the rules' own limit.
    """

    def __init__(
        self,
        dataset: str,
        metric: str,
        *,
        cuts: tuple[int, int] | None = None,
        train: str | None = None,
        max_dets: int | None = None,
    ) -> None:
        self.dataset, self.cuts, self.train, self.max_dets = dataset, cuts, train, max_dets
        self.task, _, self.figure = metric.partition("/")
        self.groups: list[str | None] = []
        self.names: list[str] = []
        self.strata: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._resampled = functools.lru_cache(maxsize=8)(self._read)

    def keep(self, directory: str, iteration: int) -> None:
        """Keep the predictions of the evaluation at a rung, which the next one writes over."""
        source = _predictions(directory)
        if source is not None:
            target = os.path.join(directory, RUNGS, f"{iteration}.json")
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)

    def is_below(
        self,
        directories: Sequence[str],
        leaders: Sequence[str],
        iteration: int,
        spread: tuple[float, int] | None,
    ) -> bool:
        """Whether the trials of a remedy are worse than another's at a rung, by a 95 % interval.

        Without the predictions of all of them nothing can be said, and the answer is no.

        Args:
            directories: of the remedy's trials.
            leaders: of the other's.
            iteration: of the rung.
            spread: standard deviation of one seed and its degrees of freedom; None if it is not
                known, and the interval speaks of the images only.
        """
        theirs, own = (
            [os.path.join(d, RUNGS, f"{iteration}.json") for d in group]
            for group in (leaders, directories)
        )
        if not all(map(os.path.exists, (*theirs, *own))):
            return False
        found = self._compare(theirs, own, RESAMPLES_OF_RUNG).metrics.get(self.figure)
        if found is None or not math.isfinite(found.images):
            return False
        wide = quantile(math.inf) * found.images
        if spread is not None:
            sizes = 1 / len(theirs) + 1 / len(own)
            wide = math.hypot(wide, quantile(spread[1]) * spread[0] * math.sqrt(sizes))
        return found.value + wide < 0

    def compare(self, first: Sequence[str], second: Sequence[str]) -> Comparison | None:
        """Compare finished trials of two remedies; None if predictions of one are missing.

        Args:
            first: directories of the trials of the reference.
            second: directories of the trials of another remedy.
        """
        old, new = ([_predictions(d) for d in directories] for directories in (first, second))
        kept = [f for f in old if f is not None], [f for f in new if f is not None]
        if len(kept[0]) < max(len(old), 1) or len(kept[1]) < max(len(new), 1):
            return None
        return self._compare(*kept)

    def _compare(
        self, first: Sequence[str], second: Sequence[str], rounds: int = ROUNDS
    ) -> Comparison:
        old, new = (
            [self._resampled(file, os.path.getmtime(file)) for file in files]
            for files in (first, second)
        )
        return compare(old, new, self.groups, self.names, self.strata, rounds)

    def _read(self, file: str, changed: float) -> Resampled:
        """Evaluate a file of predictions; `changed` tells a later file of the same name."""
        truth = load_annotations(self.dataset, "DATASETS.TEST")
        train = load_annotations(self.train, "DATASETS.TRAIN") if self.train else None
        measured = measure(
            truth,
            read_predictions(file, truth),
            train=train,
            max_dets=self.max_dets,
            tasks=[self.task],
            cuts=self.cuts,
        )
        classes = measured.evaluation.classes
        self.names = list(classes)
        self.groups = [record["group"] for record in classes.values()]
        matcher = measured.matchers[self.task]
        self.strata = strata_of(matcher, self.groups)
        return Resampled(matcher)


def _predictions(directory: str) -> str | None:
    """Return the predictions of the last evaluation in a directory, None if there are none."""
    pattern = os.path.join(glob.escape(directory), "inference", "predictions_*.json")
    found = sorted(glob.glob(pattern))
    return found[0] if found else None
