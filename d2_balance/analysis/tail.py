"""The tail in numbers: repeat factors and what they do, and which thresholds to take.

    r(c) = max(1, sqrt(t / f(c))),    r(I) = max over the classes c of image I of r(c)

with f(c) the fraction of images that show class c. An epoch has sum_I r(I) images on average, and
class c is shown sum over its images of r(I) times.

Source: Gupta et al., LVIS, arXiv:1908.03195, appendix B.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from d2_balance.data.groups import LVIS_CUTS

from .table import DataTable, Statistics

WANTED_RATIOS = (0.06, 0.10)  # 2 to 10 % is the useful range of TR (arXiv:2003.05176)
LONGEST_EPOCH = 1.5  # times the images: beyond it, repeats cost more than a longer schedule


@dataclass(frozen=True, eq=False)
class RepeatFactors:
    """What one threshold does.

    Attributes:
        threshold: t.
        epoch: images of an epoch over the images of the dataset, at least 1.
        factor: (K,) r(c); 1 for a class without an image.
        shown: (K,) how often each class is shown in an epoch, in images.
    """

    threshold: float
    epoch: float
    factor: np.ndarray
    shown: np.ndarray

    @property
    def repeated(self) -> int:
        """Classes with a factor above 1."""
        return int((self.factor > 1).sum())


def repeat_factors(table: DataTable, threshold: float, filter_empty: bool = True) -> RepeatFactors:
    """Repeat factors as Detectron2's RepeatFactorTrainingSampler has them.

    Args:
        table: the dataset, with an image to train on; crowds count here, as in the sampler.
        threshold: t, at least 0.
        filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS.
    """
    keep = table.kept_images(filter_empty)
    pairs = table.image_classes(crowds=True)
    image, label = pairs[np.isin(pairs[:, 0], keep)].T
    count = np.bincount(label, minlength=table.num_classes)
    wanted = threshold * len(keep) / np.maximum(count, 1)
    factor = np.where(count > 0, np.maximum(1.0, np.sqrt(wanted)), 1.0)
    largest = np.ones(len(table.sizes))
    np.maximum.at(largest, image, factor[label])
    shown = np.bincount(label, weights=largest[image], minlength=table.num_classes)
    return RepeatFactors(threshold, float(largest[keep].mean()), factor, shown)


def common_border(statistics: Statistics, groups: list[str], cuts: tuple[int, int] | None) -> float:
    """The frequency that parts common from frequent classes, in (0, 1].

    Args:
        statistics: class counts.
        groups: K letters.
        cuts: cut points that the groups come from; None: groups of the file, of which the largest
            count that is not frequent is taken, or LVIS's cut points where it has none.
    """
    border = (cuts or LVIS_CUTS)[1]
    if cuts is None and statistics.file_groups is not None:
        counts = zip(statistics.image_count.tolist(), groups, strict=True)
        border = max((n for n, group in counts if group != "f"), default=border)
    return min(max(border, 1) / statistics.num_images, 1.0)


def suggested_threshold(
    table: DataTable, statistics: Statistics, border: float, filter_empty: bool = True
) -> RepeatFactors | None:
    """The threshold for RepeatFactorTrainingSampler.

    LVIS takes 0.001, which is 100 of its 100,000 images: the border of common and frequent classes.
    Where an epoch would grow beyond `LONGEST_EPOCH` with it, the largest class frequency below is
    taken for which it does not.

    Args:
        table: the dataset.
        statistics: its class counts.
        border: of `common_border`.
        filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS.

    Returns:
        None where no class is below any threshold that is worth it: repeating would do nothing.
    """
    frequency = np.unique(statistics.frequency)
    below = frequency[(frequency > 0) & (frequency < border)]
    candidates = [border, *below[::-1]]  # an epoch grows with the threshold
    low, high = 0, len(candidates)
    while low < high:  # the first candidate whose epoch is short enough
        middle = (low + high) // 2
        if repeat_factors(table, float(candidates[middle]), filter_empty).epoch <= LONGEST_EPOCH:
            high = middle
        else:
            low = middle + 1
    if low == len(candidates):
        return None
    found = repeat_factors(table, _short(float(candidates[low])), filter_empty)
    return found if found.repeated else None


@dataclass(frozen=True)
class Tail:
    """A threshold of the equalization loss.

    Attributes:
        lambda_: classes below it are tail.
        classes: number of tail classes.
        ratio: TR(lambda), fraction of the class-image pairs that are tail's, in [0, 1].
    """

    lambda_: float
    classes: int
    ratio: float


def tail_at(statistics: Statistics, lambda_: float) -> Tail:
    """Return the number of tail classes and TR of a lambda."""
    tail = statistics.frequency < lambda_
    images = int(statistics.image_count.sum())
    ratio = float(statistics.image_count[tail].sum()) / max(images, 1)
    return Tail(lambda_, int(tail.sum()), ratio)


def lambda_for_tail_ratio(
    class_frequency: ArrayLike, image_count: ArrayLike, ratio: float
) -> float:
    """Return the largest lambda whose tail ratio does not pass the wanted one.

    Args:
        class_frequency: (K,) fraction of training images that show the class.
        image_count: (K,) training images of each class.
        ratio: wanted TR, in [0, 1].

    Returns:
        lambda, half-way between the last tail class and the next class; 0 if not even the rarest
        classes fit.
    """
    frequency, count = np.asarray(class_frequency, np.float64), np.asarray(image_count)
    order = np.argsort(frequency, kind="stable")
    frequency, fraction = frequency[order], np.cumsum(count[order]) / max(count.sum(), 1)
    last = np.ones(len(frequency), dtype=bool)  # classes of equal frequency go together
    last[:-1] = frequency[1:] > frequency[:-1]
    fits = np.flatnonzero(last & (fraction <= ratio))
    if not len(fits):
        return 0.0
    place = int(fits[-1])
    above = frequency[place + 1] if place + 1 < len(frequency) else 1.0
    return float((frequency[place] + above) / 2)


def suggested_tail(statistics: Statistics) -> Tail | None:
    """The largest tail of up to 6 % of the class-image pairs, else of up to 10 %.

    Returns:
        None where even the rarest class has more: there is no tail.
    """
    for wanted in WANTED_RATIOS:
        value = lambda_for_tail_ratio(statistics.frequency, statistics.image_count, wanted)
        exact = tail_at(statistics, value)
        if exact.ratio > 0:
            found = tail_at(statistics, _short(value))
            return found if found.classes == exact.classes else exact
    return None


def _short(value: float) -> float:
    """Three significant digits, for a file that people read."""
    return float(f"{value:.3g}")
