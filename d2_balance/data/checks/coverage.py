"""What training never sees: classes without an object, and images that are left out."""

import logging
from collections.abc import Sequence
from typing import Any

from d2_balance.utils.arrays import unique
from d2_balance.utils.text import plural

from ..records import objects_of

_SHOWN = 10

logger = logging.getLogger(__name__)


def classes_with_objects(dataset_dicts: Sequence[dict[str, Any]]) -> set[int]:
    """Indices of the classes that have an object; crowds do not count."""
    objects = objects_of(dataset_dicts)
    return set(unique(objects.category[~objects.crowd]).tolist())


def log_unseen_classes(
    trained: set[int], tested: set[int], names: Sequence[str], sets: tuple[str, str]
) -> list[str]:
    """Warn of classes that are evaluated and have no object in training.

    Args:
        trained: classes with objects in the training sets.
        tested: classes with objects in a validation set.
        names: class names by index.
        sets: what to call training and validation.

    Returns:
        Names of these classes.
    """
    unseen = [names[k] for k in sorted(tested - trained)]
    if unseen:
        more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
        logger.warning(
            f"{plural(len(unseen), 'class')} of {sets[1]} without an object in {sets[0]}, where AP "
            f"will be 0: {', '.join(unseen[:_SHOWN])}{more}; add training images of them, or take "
            "them out of both files"
        )
    return unseen


def log_left_out_negatives(dataset_dicts: Sequence[dict[str, Any]], name: str) -> int:
    """Say how many images have verified image-level labels and are left out for want of objects.

    Detectron2 leaves images without objects out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is
    False. The published LVIS results were trained so, hence this is no warning.

    Returns:
        Their number.
    """
    objects = objects_of(dataset_dicts)
    count = int((objects.labelled & ~objects.with_objects()).sum())
    if count:
        logger.info(
            f"{count} images of {name} have image-level labels and no object to train on; they "
            "are left out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        )
    return count
