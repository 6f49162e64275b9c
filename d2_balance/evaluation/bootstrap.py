"""Is a difference real? A paired bootstrap over images, and the spread of seeds.

Images are drawn with replacement, the same ones for all runs. AP of a resample is computed from
matches that were made once: an image that was drawn twice counts twice. Images are drawn within
strata, those that show objects of the same frequency groups, so that no group ever loses all its
classes; a class without objects in a resample leaves the means of that resample.

    interval of a difference  =  2.5 % and 97.5 % quantiles of it over the resamples     (images)
    widened by t sqrt(s_a^2 / n_a + s_b^2 / n_b)  where there are seeds                  (training)

t is the 97.5 % quantile of Student's distribution with Welch's degrees of freedom: two or three
seeds say little about their spread, and 1.96 would promise too much.

Equal scores of one class keep the order of the images; the copies of an image stand together.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile intervals, chapter
13; two samples and strata, chapter 8).

B: resamples, I: images, K: classes, T: IoU thresholds, D: detections.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import stats

from d2_balance.data.groups import GROUPS

from .matching import IGNORED, Curve, Matcher, Ranked, running

ROUNDS = 1000
METRICS = ("AP", "AP50", "APr", "APc", "APf")
BETTER, WORSE, NOISE = "better", "worse", "within noise"


@dataclass(frozen=True)
class Difference:
    """How much a group of runs gains on another, in percent.

    Attributes:
        value: difference of the means of the groups.
        low, high: 95 % interval; NaN where nothing can be resampled.
        images: standard deviation over resampled images.
        training: standard error by the seeds; NaN with fewer than two seeds in a group.
    """

    value: float
    low: float
    high: float
    images: float
    training: float

    @property
    def verdict(self) -> str:
        """Whether the interval lies above 0, below 0, or holds it; "" without an interval."""
        if math.isnan(self.low):
            return ""
        return BETTER if self.low > 0 else WORSE if self.high < 0 else NOISE


@dataclass(frozen=True, eq=False)
class Comparison:
    """A group of runs against another.

    Attributes:
        metrics: METRICS to their difference.
        classes: class name to the difference of its AP.
        own: 95 % intervals over resampled images of the two groups themselves, METRICS and class
            names to (low, high).
    """

    metrics: dict[str, Difference]
    classes: dict[str, Difference]
    own: tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]


class Resampled:
    """AP of one run on images with weights.

    Args:
        matcher: its matches.
    """

    def __init__(self, matcher: Matcher) -> None:
        truth = matcher.truth
        counted = np.flatnonzero(truth.counts)
        self._object_image, self._object_category = truth.image[counted], truth.category[counted]
        self.num_classes, self.num_images = len(truth.class_ids), truth.num_images
        ranked = Ranked(matcher)
        # detections that count at no threshold matter for nothing
        used = (ranked.status != IGNORED).any(axis=0)
        self._image, category = ranked.image[used].astype(np.int32), ranked.category[used]
        self._curves = [Curve(status[used], category) for status in ranked.status]

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP of each class at each IoU threshold.

        Args:
            weights: (I,) integers, how often each image counts.

        Returns:
            (T, K) in [0, 1], NaN without objects.
        """
        objects = np.bincount(self._object_category, weights[self._object_image], self.num_classes)
        own = weights.astype(np.int32).take(self._image)
        total = running(own)
        return np.stack([curve.average_precision(own, total, objects) for curve in self._curves])


def strata_of(matcher: Matcher, groups: Sequence[str | None]) -> np.ndarray:
    """(I,) which frequency groups each image shows objects of, as bits.

    Args:
        matcher: of any of the runs.
        groups: (K,) "r", "c", "f" or None.
    """
    truth = matcher.truth
    letters = list(GROUPS)
    bit = np.array([0 if g is None else 1 << letters.index(g) for g in groups], dtype=np.int64)
    strata = np.zeros(truth.num_images, dtype=np.int64)
    np.bitwise_or.at(strata, truth.image[truth.counts], bit[truth.category[truth.counts]])
    return strata


def resamples(strata: np.ndarray, rounds: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield (I,) weights: images drawn with replacement within their stratum."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == value) for value in np.unique(strata)]
    for _ in range(rounds):
        weights = np.zeros(len(strata))
        for own in members:
            weights[own] = np.bincount(rng.integers(0, len(own), len(own)), minlength=len(own))
        yield weights


def figures(values: np.ndarray, groups: Sequence[str | None]) -> np.ndarray:
    """METRICS and the AP of each class, in percent.

    Args:
        values: (T, K) AP.
        groups: (K,) of the classes.

    Returns:
        (5 + K,) NaN where nothing is known.
    """
    by_class = values.mean(axis=0)
    letters = np.array([g or "" for g in groups])
    means = [_mean(by_class), _mean(values[0])]
    means += [_mean(by_class[letters == letter]) for letter in GROUPS]
    return 100 * np.append(means, by_class)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def compare(
    first: Sequence[Resampled],
    second: Sequence[Resampled],
    groups: Sequence[str | None],
    names: Sequence[str],
    strata: np.ndarray,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Comparison:
    """Compare two groups of runs on the same images.

    Args:
        first: the runs that are compared with; several are seeds of one configuration.
        second: the runs that may be better.
        groups: (K,) frequency groups of the classes.
        names: (K,) class names.
        strata: (I,) what `strata_of` returns.
        rounds: resamples.
        seed: of the resamples.
    """
    runs = [*first, *second]

    def one(weights: np.ndarray) -> np.ndarray:
        return np.stack([figures(run.average_precision(weights), groups) for run in runs])

    plain = one(np.ones(len(strata)))  # (runs, 5 + K)
    drawn = np.empty((2, rounds, plain.shape[1]))
    n = len(first)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for number, values in enumerate(pool.map(one, resamples(strata, rounds, seed))):
            drawn[:, number] = values[:n].mean(axis=0), values[n:].mean(axis=0)
    value = plain[n:].mean(axis=0) - plain[:n].mean(axis=0)
    training, wider = _by_seeds(plain[:n], plain[n:])
    low, high, spread = _intervals(drawn[1] - drawn[0])
    low = value - np.hypot(value - low, wider)
    high = value + np.hypot(high - value, wider)
    found = [
        Difference(*map(float, row)) for row in zip(value, low, high, spread, training, strict=True)
    ]
    keys = [*METRICS, *names]
    own = tuple(
        dict(zip(keys, zip(*(e.tolist() for e in _intervals(d)[:2]), strict=True), strict=True))
        for d in drawn
    )
    return Comparison(
        dict(zip(METRICS, found[: len(METRICS)], strict=True)),
        dict(zip(names, found[len(METRICS) :], strict=True)),
        (own[0], own[1]),
    )


def quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's distribution; of infinite freedom it is normal's."""
    return float(stats.t.ppf(0.975, freedom))


def _by_seeds(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of differences of means, and half of their 95 % intervals.

    Args:
        first: (seeds, n) figures of the runs of a group.
        second: those of the other.

    Returns:
        (n,) each; NaN and 0 where one group has fewer than two seeds.
    """
    sizes = len(first), len(second)
    if min(sizes) < 2:
        return np.full(first.shape[1], np.nan), np.zeros(first.shape[1])
    parts = [g.var(axis=0, ddof=1) / n for g, n in zip((first, second), sizes, strict=True)]
    error = np.sqrt(parts[0] + parts[1])
    squares = sum(part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):  # equal seeds, or figures without a value
        freedom = error**4 / squares
        wider = np.nan_to_num(stats.t.ppf(0.975, freedom) * error)
    return error, wider


def _intervals(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % intervals and standard deviations of the columns, without NaN."""
    known = ~np.isnan(drawn)
    columns = np.flatnonzero(known.sum(axis=0) > 1)
    low, high, spread = (np.full(drawn.shape[1], np.nan) for _ in range(3))
    for k in columns.tolist():
        values = drawn[known[:, k], k]
        low[k], high[k] = np.quantile(values, (0.025, 0.975))
        spread[k] = values.std(ddof=1)
    return low, high, spread


def seeds_summary(results: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Mean, standard deviation (NaN with one seed) and number of seeds of each metric."""
    summary = {}
    for metric in results[0]:
        values = np.array([r[metric] for r in results])
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        summary[metric] = (float(values.mean()), spread, len(values))
    return summary
