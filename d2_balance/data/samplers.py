"""Samplers of training images that Detectron2 does not have.

Weighted repeat-factor sampling gives image I of dataset d the factor w_d max_{c in I} r(c), with
r(c) = max(1, sqrt(t / f_c)) of Gupta et al., LVIS, arXiv:1908.03195, appendix B.2. f_c is the
fraction of images with class c among those of all sets together. (Detectron2's
WeightedCategoryTrainingSampler counts f in each set by itself: a class that is rare in one of them
counts as rare.)

Class-aware sampling samples a class, then an image that contains it: each class is met equally
often, whatever its frequency. Source: Shen et al., Relay Backpropagation for Effective Learning of
Deep Convolutional Neural Networks, arXiv:1512.05830. Here samples are independent, where
the paper walks through shuffled lists; the expected fraction of each image is the same.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.samplers import TrainingSampler
from torch import Tensor

from d2_balance.utils.arrays import unique

from .annotations import Counts, count_classes
from .records import objects_of

REPEAT_FORMS = ("rfs", "rfs_linear", "irfs", "eirfs")
_OFTEN = 1000  # times the median factor of an image, above which a few images are all that trains

logger = logging.getLogger(__name__)

_CHUNK = 4096  # images sampled at once


def images_by_class(dataset_dicts: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Lists, for each class that occurs, the images that contain it.

    Crowd annotations do not count.

    Args:
        dataset_dicts: Detectron2's standard dicts.

    Returns:
        starts (C + 1,) and images, both int64: class c of the C classes that occur has the
        ascending image indices `images[starts[c]:starts[c + 1]]`, each of them once.
    """
    size, objects = len(dataset_dicts), objects_of(dataset_dicts)
    kept = ~objects.crowd
    pairs = unique(objects.category[kept] * size + objects.image[kept])  # class by class
    classes, images = np.divmod(pairs, max(size, 1))
    first = np.flatnonzero(np.diff(classes, prepend=-1))
    starts = np.append(first, len(pairs))
    return torch.from_numpy(starts), torch.from_numpy(images)


class ClassAwareTrainingSampler(TrainingSampler):
    """Endless image indices: a class sampled uniformly, then one of its images, uniformly.

    Only classes that occur are sampled. An image without annotation, or with crowds only, is never
    sampled. All ranks generate the same stream, of which rank r of n takes the indices r, r + n and
    so on, as with Detectron2's TrainingSampler.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        seed: the same on all ranks; None: one that the ranks agree on, from numpy.

    Raises:
        ValueError: there is no annotation.
    """

    def __init__(self, dataset_dicts: Sequence[dict[str, Any]], *, seed: int | None = None) -> None:
        self._starts, self._images = images_by_class(dataset_dicts)
        if not len(self._images):
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN ClassAwareTrainingSampler needs annotations, and the "
                "training set has none besides crowds."
            )
        super().__init__(len(dataset_dicts), seed=seed)
        unused = len(dataset_dicts) - len(self._images.unique())
        logger.info(
            f"Class-aware sampling over {len(self._starts) - 1} classes; {unused} of "
            f"{len(dataset_dicts)} images have no annotation and are never sampled."
        )

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        counts = self._starts.diff()  # (C,)
        for _ in itertools.count():
            chosen = torch.randint(len(counts), (_CHUNK,), generator=generator)
            # in float64, where u < 1 keeps u * count below count after rounding
            u = torch.rand(_CHUNK, generator=generator, dtype=torch.float64)
            place = self._starts[chosen] + (u * counts[chosen]).long()
            yield from self._images[place].tolist()


def class_factors(
    counts: Counts, threshold: float, form: str = "rfs", alpha: float = 2.0
) -> np.ndarray:
    """How often the images of each class are shown.

    With n_c of D images and m_c of M objects that show class c, f_c = n_c / D, b_c = m_c / M:

        rfs         max(1, sqrt(t / f_c))                Gupta et al., LVIS, arXiv:1908.03195
        rfs_linear  max(1, t / f_c)                      Detectron2's REPEAT_SQRT False
        irfs        max(1, sqrt(t / sqrt(f_c b_c)))      Yaman et al., arXiv:2305.08069
        eirfs       exp(alpha sqrt(t / sqrt(f'_c b'_c))) Ahmed et al., arXiv:2503.21893

    The released code of E-IRFS has f'_c = max(n_c, 1) / sum_k max(n_k, 1) and b'_c = (m_c + 1) /
    sum_k (m_k + 1); so has this. There is no released code of IRFS.

    Args:
        counts: of the training set.
        threshold: t, above 0.
        form: one of `REPEAT_FORMS`.
        alpha: of eirfs, above 0.

    Returns:
        (K,) at least 1.

    Raises:
        ValueError: an unknown form.
    """
    images, objects = counts.image_count, counts.instance_count
    if form == "eirfs":
        f, b = np.maximum(images, 1), objects + 1
        return np.exp(alpha * np.sqrt(threshold / np.sqrt(f / f.sum() * (b / b.sum()))))
    if form not in REPEAT_FORMS:
        raise ValueError(f"DATALOADER.REPEAT_FORM is {form!r}; must be one of {REPEAT_FORMS}")
    frequency = images / counts.images
    if form == "irfs":
        frequency = np.sqrt(frequency * (objects / max(objects.sum(), 1)))
    with np.errstate(divide="ignore"):  # a class without objects, which is in no image
        ratio = threshold / frequency
    return np.maximum(1.0, ratio if form == "rfs_linear" else np.sqrt(ratio))


def repeat_factors(
    dataset_dicts: Sequence[dict[str, Any]],
    threshold: float,
    form: str = "rfs",
    alpha: float = 2.0,
) -> Tensor:
    """Factors of repeat-factor sampling from the columns of the records.

    The factor of an image is the largest of its classes, and 1 without objects. Crowds count as
    objects, as they do in Detectron2, whose factors those of the form rfs are.

    Args:
        dataset_dicts: D standard dicts.
        threshold: see `class_factors`.
        form: see `class_factors`.
        alpha: see `class_factors`.

    Returns:
        (D,) float32, at least 1: how often each image is shown in an epoch, on average.
    """
    objects = objects_of(dataset_dicts)
    if not len(objects.image):
        return torch.ones(objects.images)
    classes = int(objects.category.max()) + 1
    counts = count_classes(objects.image, objects.category, classes, objects.images)
    found = np.ones(objects.images)
    np.maximum.at(
        found, objects.image, class_factors(counts, threshold, form, alpha)[objects.category]
    )
    often = found.max() / np.median(found)
    if often > _OFTEN:
        logger.warning(
            f"DATALOADER.REPEAT_FORM {form}: one image is shown {often:,.0f} times as often as the "
            "median one; lower DATALOADER.REPEAT_THRESHOLD."
        )
    return torch.from_numpy(found).float()


def weighted_repeat_factors(
    dataset_dicts: Sequence[dict[str, Any]],
    sources: Sequence[str],
    weights: Mapping[str, float],
    threshold: float,
    form: str = "rfs",
    alpha: float = 2.0,
) -> Tensor:
    """Factors of repeat-factor sampling over all images, times the weight of their dataset.

    Args:
        dataset_dicts: D standard dicts.
        sources: D names of the datasets that they come from.
        weights: factor of a dataset, above 0; 1 where it has none.
        threshold: see `class_factors`.
        form: see `class_factors`.
        alpha: see `class_factors`.

    Returns:
        (D,) above 0: how often each image is shown in an epoch, on average.
    """
    factors = repeat_factors(dataset_dicts, threshold, form, alpha)
    weight = torch.tensor([float(weights.get(name, 1.0)) for name in sources])
    return factors * weight
