"""The tail in numbers: repeat factors and what they do, and which thresholds to take.

    r(c) = max(1, sqrt(t / f(c))),    r(I) = max over the classes c of image I of r(c)

with f(c) the share of images that show class c. An epoch has sum_I r(I) images on average, and class
c is shown sum over its images of r(I) times.

Source: Gupta et al., LVIS, arXiv:1908.03195, appendix B.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.groups import LVIS_CUTS
from ..data.statistics import ClassStatistics
from ..losses.eql import lambda_for_tail_ratio, tail_ratio, tail_weight
from .table import DataTable

WANTED_RATIOS = (0.06, 0.10)  # 2 to 10 % is the useful range of TR (arXiv:2003.05176)
LONGEST_EPOCH = 1.5  # times the images: beyond it, repeats cost more than a longer schedule


@dataclass(frozen=True)
class RepeatFactors:
    """What one threshold does.

    Attributes:
        threshold: t.
        epoch: images of an epoch over the images of the data set, at least 1.
        shown: (K,) how often each class is shown in an epoch, in images.
        repeated: classes with a factor above 1.
    """

    threshold: float
    epoch: float
    shown: np.ndarray
    repeated: int


def repeat_factors(table: DataTable, threshold: float) -> RepeatFactors:
    """Repeat factors as Detectron2's RepeatFactorTrainingSampler has them; empty images left out.

    Args:
        table: the data set; crowds count here, as in the sampler.
        threshold: t, above 0.
    """
    classes = max(table.num_classes, 1)
    keep = np.unique(table.image[~table.crowd])  # FILTER_EMPTY_ANNOTATIONS
    known = np.isin(table.image, keep)
    pairs = np.unique(table.image[known] * classes + table.label[known])
    image, label = pairs // classes, pairs % classes
    count = np.bincount(label, minlength=classes)
    with np.errstate(divide="ignore"):
        factor = np.maximum(1.0, np.sqrt(threshold * len(keep) / count))
    largest = np.ones(len(table.sizes))
    np.maximum.at(largest, image, factor[label])
    shown = np.bincount(label, weights=largest[image], minlength=classes)
    repeated = int(((factor > 1) & (count > 0)).sum())
    return RepeatFactors(threshold, float(largest[keep].mean()), shown, repeated)


def suggested_threshold(
    table: DataTable, statistics: ClassStatistics, cuts: tuple[int, int] = LVIS_CUTS
) -> RepeatFactors | None:
    """The threshold for MODEL's sampler: the frequency that parts common from frequent classes.

    LVIS takes 0.001, which is 100 of its 100,000 images. Where an epoch would grow beyond
    `LONGEST_EPOCH`, the largest class frequency below is taken for which it does not.

    Returns:
        None where no class is below any threshold that is worth it: repeating would do nothing.
    """
    frequency = np.unique(statistics.frequency.numpy())
    frequency = frequency[frequency > 0]
    border = min(cuts[1] / statistics.num_images, 1.0)
    candidates = [border, *frequency[frequency < border][::-1]]
    for threshold in candidates:
        found = repeat_factors(table, float(threshold))
        if not found.repeated:
            return None
        if found.epoch <= LONGEST_EPOCH:
            return found
    return None


@dataclass(frozen=True)
class Tail:
    """A threshold of the equalization loss.

    Attributes:
        lambda_: classes below it are tail.
        classes: number of tail classes.
        ratio: TR(lambda), share of the class-image pairs that are tail's, in [0, 1].
    """

    lambda_: float
    classes: int
    ratio: float


def tail_at(statistics: ClassStatistics, lambda_: float) -> Tail:
    """Number of tail classes and TR of a lambda."""
    tail = tail_weight(statistics.frequency, lambda_, "step")
    ratio = float(tail_ratio(tail, statistics.image_count)) if len(tail) else 0.0
    return Tail(lambda_, int(tail.sum()), ratio)


def suggested_tail(statistics: ClassStatistics) -> Tail | None:
    """The largest tail of up to 6 % of the class-image pairs, else of up to 10 %.

    Returns:
        None where even the rarest class has more: there is no tail.
    """
    for wanted in WANTED_RATIOS:
        value = lambda_for_tail_ratio(statistics.frequency, statistics.image_count, wanted)
        found = tail_at(statistics, value)
        if found.classes and found.ratio > 0:
            return found
    return None
