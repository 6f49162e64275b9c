"""What is known of an image besides its objects, and the ids of the objects, on the way to heads.

- Image-level labels (LVIS): classes that were verified in an image.
- Ignore regions: boxes in which background does not count. An object that is not annotated, because
  the dataset leaves its class out, would train as background; where a second annotation file says
  that something is there, background anchors and proposals inside that box are left alone.
  Positives keep priority: only anchors and proposals that match no object are tested. A box is
  covered if max over regions of area(region and box) / area(box) >= threshold. The LVIS challenge
  report of the EQL authors (arXiv:2003.05176, appendix) has the idea and gives no threshold.
- Ids of the matched objects, which Detectron2's matching drops: it hands on the class of the
  matched object only. It is asked with ids instead of classes; an id above K cannot be taken for
  background (K) or ignored (-1).

Shapes: N images, A anchors or proposals and M regions of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

from d2_balance.data.ignore_regions import FIELD
from d2_balance.data.image_labels import ImageLabels


class LabelledImages:
    """Base of models whose heads look at ignore regions and image-level labels in training.

    Stands before Detectron2's class. An ImageList gets `ignore_boxes` (see `regions_of`), and, with
    `image_labels`, `verified` and `not_exhaustive`, (N, K) bool or None.
    """

    image_labels: ImageLabels | None

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        images = super().preprocess_image(batched_inputs)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            device = images.tensor.device
            images.ignore_boxes = regions_of(batched_inputs, device)
            if self.image_labels is not None:
                images.verified = self.image_labels.verified(batched_inputs, device)
                images.not_exhaustive = self.image_labels.not_exhaustive(batched_inputs, device)
        return images


def check_ioa(ioa: float) -> None:
    """Check the threshold of ignore regions.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < ioa <= 1:
        raise ValueError(
            f"MODEL.BALANCE.IGNORE_IOA is {ioa}; must be a fraction of a box's area in (0, 1]."
        )


def regions_of(
    batched_inputs: Sequence[dict[str, Any]], device: torch.device | str
) -> list[Tensor] | None:
    """Return the ignore regions of a batch.

    Args:
        batched_inputs: N outputs of a mapper; an image without the field has no region.
        device: where the boxes go.

    Returns:
        N tensors (M, 4), corners in pixels of the network's input; None if no image has any.
    """
    boxes = [torch.as_tensor(record.get(FIELD, ())).reshape(-1, 4) for record in batched_inputs]
    if not any(len(b) for b in boxes):
        return None
    return [b.to(device, torch.float32, non_blocking=True) for b in boxes]


def covered(boxes: Boxes, regions: Tensor, ioa: float) -> Tensor:
    """Return (A,) bool: boxes of which one region holds a fraction of at least `ioa`.

    Args:
        boxes: A boxes.
        regions: (M, 4).
        ioa: in (0, 1].
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    inside: Tensor = pairwise_ioa(Boxes(regions), boxes).amax(dim=0) >= ioa
    return inside


def ignore_background(
    labels: Sequence[Tensor],
    anchors: Boxes,
    regions: Sequence[Tensor] | None,
    background: int,
    ioa: float,
) -> list[Tensor]:
    """Return the labels of the anchors of a batch, -1 for background inside a region.

    Args:
        labels: N vectors (A,).
        anchors: A anchors, the same of every image.
        regions: N tensors (M, 4), or None if there is no region.
        background: its label.
        ioa: in (0, 1].
    """
    if regions is None:
        return list(labels)
    return [
        own.masked_fill((own == background) & covered(anchors, boxes, ioa), -1)
        for own, boxes in zip(labels, regions, strict=True)
    ]


def without_covered_background(
    proposals: Sequence[Instances],
    targets: Sequence[Instances],
    regions: Sequence[Tensor] | None,
    matcher: Matcher,
    ioa: float,
) -> list[Instances]:
    """Return the proposals without those that are background and inside a region.

    Args:
        proposals: of N images, with `proposal_boxes`.
        targets: of N images, with `gt_boxes`.
        regions: N tensors (M, 4), or None if there is no region.
        matcher: decides which proposals are background (0), each proposal by itself.
        ioa: in (0, 1].
    """
    if regions is None:
        return list(proposals)
    result = []
    for own, objects, boxes in zip(proposals, targets, regions, strict=True):
        if len(boxes):
            _, labels = matcher(pairwise_iou(objects.gt_boxes, own.proposal_boxes))
            own = own[~((labels == 0) & covered(own.proposal_boxes, boxes, ioa))]
        result.append(own)
    return result


def number_objects(targets: list[Instances]) -> None:
    """Set `gt_index` of every object: 0, 1, ... through the batch.

    Detectron2 gathers all fields that begin with gt_ when it samples proposals.
    """
    first = 0
    for target in targets:
        count = len(target)
        target.gt_index = torch.arange(first, first + count, device=target.gt_classes.device)
        first += count


def ids_as_classes(targets: list[Instances], num_classes: int) -> list[Instances]:
    """Return targets with the boxes of the numbered `targets` and their ids as classes."""
    return [
        Instances(t.image_size, gt_boxes=t.gt_boxes, gt_classes=t.gt_index + num_classes + 1)
        for t in targets
    ]


def classes_of_ids(
    labels: Tensor, targets: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Tell apart the classes and the ids in the labels of `ids_as_classes`.

    Args:
        labels: of any shape: an id, K for background or -1 for ignored.
        targets: the numbered targets.
        num_classes: K.

    Returns:
        Labels in {-1, 0, ..., K}, and ids, negative where there is no object; as `labels`.
    """
    index = labels - (num_classes + 1)
    classes = torch.cat([t.gt_classes for t in targets])
    if not len(classes):
        return labels, index
    return torch.where(index >= 0, classes[index.clamp(min=0)], labels), index
