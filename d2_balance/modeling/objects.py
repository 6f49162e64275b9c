"""Ids of the matched objects, which Detectron2's matching drops.

Its matching functions hand on the class of the matched object and nothing else. They are asked with
ids in place of classes: an id above K cannot be taken for background (K) or ignored (-1).
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor


def number_objects(targets: list[Instances]) -> None:
    """Sets `gt_index` of every object: 0, 1, ... through the batch.

    Detectron2 gathers all fields that begin with gt_ when it samples proposals.
    """
    first = 0
    for target in targets:
        count = len(target)
        target.gt_index = torch.arange(first, first + count, device=target.gt_classes.device)
        first += count


def ids_as_classes(targets: list[Instances], num_classes: int) -> list[Instances]:
    """Targets with the boxes of the numbered `targets`, and their ids in place of the classes."""
    return [
        Instances(t.image_size, gt_boxes=t.gt_boxes, gt_classes=t.gt_index + num_classes + 1)
        for t in targets
    ]


def classes_of_ids(
    found: Tensor, targets: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """What matching with `ids_as_classes` found, told apart.

    Args:
        found: labels of any shape: an id, K for background or -1 for ignored.
        targets: the numbered targets.
        num_classes: K.

    Returns:
        Labels in {-1, 0, ..., K}, and ids, negative where there is no object; as `found`.
    """
    index = found - (num_classes + 1)
    classes = torch.cat([t.gt_classes for t in targets])
    if not len(classes):
        return found, index
    return torch.where(index >= 0, classes[index.clamp(min=0)], found), index
