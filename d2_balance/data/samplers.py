"""Samplers of training images that Detectron2 does not have.

Weighted repeat-factor sampling gives image I of dataset d the factor w_d max_{c in I} r(c), with
r(c) = max(1, sqrt(t / f_c)) of Gupta et al., LVIS, arXiv:1908.03195, appendix B.2. f_c is the share
of images with class c among those of all sets together. (WeightedCategoryTrainingSampler, which
Detectron2 has, counts f in each set by itself: a class that is rare in one of them counts as rare.)

Class-aware sampling draws a class, then an image that contains it: each class is met equally
often, whatever its frequency. Source: Shen et al., Relay Backpropagation for Effective Learning of
Deep Convolutional Neural Networks, arXiv:1512.05830. Here draws are independent, where
the paper walks through shuffled lists; the expected share of each image is the same.
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

from .records import objects_of

logger = logging.getLogger(__name__)

_CHUNK = 4096  # images drawn at once


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
    pairs = np.unique(objects.category[kept] * size + objects.image[kept])  # class by class
    classes, images = np.divmod(pairs, max(size, 1))
    first = np.flatnonzero(np.diff(classes, prepend=-1))
    starts = np.append(first, len(pairs))
    return torch.from_numpy(starts), torch.from_numpy(images)


class ClassAwareTrainingSampler(TrainingSampler):
    """Endless image indices: a class drawn uniformly, then one of its images, uniformly.

    Only classes that occur are drawn. An image without annotation, or with crowds only, is never
    drawn. All ranks generate the same stream, of which rank r of n takes the indices r, r + n and
    so on, as with Detectron2's TrainingSampler.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        seed: the same on all ranks; None: one that the ranks agree on, drawn from numpy.

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
            f"{len(dataset_dicts)} images have no annotation and are never drawn."
        )

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        counts = self._starts.diff()  # (C,)
        for _ in itertools.count():
            drawn = torch.randint(len(counts), (_CHUNK,), generator=generator)
            # in float64, where u < 1 keeps u * count below count after rounding
            u = torch.rand(_CHUNK, generator=generator, dtype=torch.float64)
            place = self._starts[drawn] + (u * counts[drawn]).long()
            yield from self._images[place].tolist()


def repeat_factors(dataset_dicts: Sequence[dict[str, Any]], threshold: float) -> Tensor:
    """Factors of repeat-factor sampling, as Detectron2 has them, from the columns of the records.

    Crowds count as objects, as they do there.

    Args:
        dataset_dicts: D standard dicts.
        threshold: t, above 0.

    Returns:
        (D,) float32, at least 1: how often each image is shown in an epoch, on average.
    """
    objects = objects_of(dataset_dicts)
    if not len(objects.image):
        return torch.ones(objects.images)
    classes = int(objects.category.max()) + 1
    # each class of an image once
    image, label = np.divmod(np.unique(objects.image * classes + objects.category), classes)
    frequency = np.bincount(label) / objects.images
    with np.errstate(divide="ignore"):
        factor = np.maximum(1.0, np.sqrt(threshold / frequency))
    found = np.ones(objects.images)
    np.maximum.at(found, image, factor[label])
    return torch.from_numpy(found).float()


def weighted_repeat_factors(
    dataset_dicts: Sequence[dict[str, Any]],
    sources: Sequence[str],
    weights: Mapping[str, float],
    threshold: float,
) -> Tensor:
    """Factors of repeat-factor sampling over all images, times the weight of their dataset.

    Args:
        dataset_dicts: D standard dicts.
        sources: D names of the datasets that they come from.
        weights: factor of a dataset, above 0; 1 where it has none.
        threshold: t, above 0.

    Returns:
        (D,) above 0: how often each image is shown in an epoch, on average.
    """
    factors = repeat_factors(dataset_dicts, threshold)
    weight = torch.tensor([float(weights.get(name, 1.0)) for name in sources])
    return factors * weight
