"""From the dense predictions of a batch to the samples of its losses.

Shapes: N images, A anchors of an image, A_l of a level, K classes, R samples.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import cat
from detectron2.structures import Boxes
from torch import Tensor

from d2_balance.losses import Samples


def anchor_samples(
    anchors: list[Boxes],
    logits: list[Tensor],
    labels: Tensor,
    deltas: list[Tensor],
    gt_boxes: list[Tensor],
    *,
    num_classes: int,
    box_transform: Any,
    gt_index: Tensor | None = None,
    **known: Tensor | None,
) -> Samples:
    """Flatten the dense predictions of a batch and drop ignored anchors.

    Args:
        anchors: one Boxes per level, A in all.
        logits: per level (N, A_l, K).
        labels: (N, A) int64 in {-1, 0, ..., K}.
        deltas: per level (N, A_l, 4).
        gt_boxes: N tensors (A, 4) of the matched objects.
        num_classes: K.
        box_transform: what the deltas are made by.
        gt_index: (N, A) ids of the matched objects.
        **known: `verified` and `not_exhaustive` of `Samples`.

    Returns:
        R anchors that are not ignored, image by image.
    """
    valid, positive = labels >= 0, (labels >= 0) & (labels != num_classes)
    images = torch.arange(len(labels), device=labels.device).unsqueeze(1)  # (N, 1)
    level = torch.cat([labels.new_full((len(x),), i) for i, x in enumerate(anchors)])  # (A,)
    boxes = Boxes.cat(anchors).tensor  # (A, 4)
    return Samples(
        logits=cat(logits, dim=1)[valid],
        labels=labels[valid],
        num_classes=num_classes,
        image_index=images.expand_as(labels)[valid],
        num_images=len(labels),
        level=level.expand_as(labels)[valid],
        num_levels=len(anchors),
        pred_deltas=cat(deltas, dim=1)[positive],
        boxes=boxes.expand(len(labels), -1, -1)[positive],
        gt_boxes=torch.stack(gt_boxes)[positive],
        gt_index=None if gt_index is None else gt_index[positive],
        box_transform=box_transform,
        **known,
    )
