"""Regions of an image in which background does not count.

An object that is not annotated, because the dataset leaves its class out, would train as
background. Where it is known from a second annotation file that something is there, background
anchors and proposals inside that box are left alone. Positives keep priority: only rows that match
no object are looked at.

Covered is a box of which one region holds at least a share of the area,
max over regions of area(region and box) / area(box) >= threshold. The LVIS challenge report of the
EQL authors (arXiv:2003.05176, appendix) has the idea and gives no threshold; 0.5 is ours.

Shapes: N images, A boxes and M regions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

from d2_balance.data.ignore_regions import FIELD

KEY = "MODEL.BALANCE.IGNORE_IOA"


def check_ioa(ioa: float) -> None:
    """Checks the threshold.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < ioa <= 1:
        raise ValueError(f"{KEY} is {ioa}; must be a share of a box's area in (0, 1].")


def regions_of(
    batched_inputs: Sequence[dict[str, Any]], device: torch.device | str
) -> list[Tensor] | None:
    """The regions of a batch.

    Args:
        batched_inputs: N outputs of a mapper; an image without the field has no region.
        device: where the boxes go.

    Returns:
        N tensors (M, 4), corners in pixels of the network's input; None where no image has any.
    """
    boxes = [torch.as_tensor(record.get(FIELD, ())).reshape(-1, 4) for record in batched_inputs]
    if not any(len(b) for b in boxes):
        return None
    return [b.to(device, torch.float32, non_blocking=True) for b in boxes]


def covered(boxes: Boxes, regions: Tensor, ioa: float) -> Tensor:
    """(A,) bool: boxes of which a region holds a share of at least `ioa`.

    Args:
        boxes: A boxes.
        regions: (M, 4).
        ioa: in (0, 1].
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return pairwise_ioa(Boxes(regions), boxes).amax(dim=0) >= ioa


def ignore_background(
    labels: Sequence[Tensor],
    anchors: Boxes,
    regions: Sequence[Tensor] | None,
    background: int,
    ioa: float,
) -> list[Tensor]:
    """Labels of the anchors of a batch, -1 for background inside a region.

    Args:
        labels: N vectors (A,).
        anchors: A anchors, the same of every image.
        regions: N tensors (M, 4); None: no region.
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
    """Proposals without those that are background and inside a region.

    Args:
        proposals: of N images, with `proposal_boxes`.
        targets: of N images, with `gt_boxes`.
        regions: N tensors (M, 4); None: no region.
        matcher: says which proposals are background (0); it looks at each proposal by itself.
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
