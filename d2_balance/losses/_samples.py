"""The one argument that every classification loss and reweighter receives.

Shapes used throughout the package:
    R: samples of a batch (anchors or RoIs) that are not ignored
    K: foreground classes
    P: positive samples, those with a label below K
    N: images in the batch of this process
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CHECK_LABELS = "D2_BALANCE_CHECK_LABELS"


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Samples:
    """Predictions and targets of one head for one batch.

    `Samples(logits=..., labels=..., num_classes=K)` is enough for every loss that needs no boxes.

    Args:
        logits: (R, K) or, where the loss has a background column, (R, K + 1). Raw scores.
        labels: (R,) int64 in [0, K]; K is background. No ignored samples.
        num_classes: K.
        image_index: (R,) int64, index of the sample's image in [0, N). None: there is one image.
        num_images: N. None: read from `verified` or `image_index` (the latter is a host-device
            sync).
        level: (R,) int64, index of the sample's feature level. None: one level.
        num_levels: number of feature levels.
        sample_weight: (R,) weight of each sample, from the proposal sampler. None: all 1.
        verified: (N, K) bool, True where the presence or the absence of the class in the image was
            verified by annotators (LVIS image-level labels). None: unknown.
        not_exhaustive: (N, K) bool, True where the class is not annotated exhaustively in the
            image (`not_exhaustive_category_ids`); implies `verified`. None: unknown.
        pred_deltas: (P, 4) predicted box deltas of the positives, in their order.
        boxes: (P, 4) their anchors or proposals, x0 y0 x1 y1 in pixels.
        gt_boxes: (P, 4) their matched ground truth boxes, x0 y0 x1 y1 in pixels.
        gt_index: (P,) int64, id of the matched object, unique over the batch.
        box_transform: object with `get_deltas(boxes, gt_boxes)` and
            `apply_deltas(deltas, boxes)`, such as Detectron2's Box2BoxTransform.

    Raises:
        ValueError: a shape does not fit the others, or a label is out of range. On a GPU the range
            is checked only if the environment variable D2_BALANCE_CHECK_LABELS is 1, because that
            is a host-device sync.
    """

    logits: Tensor
    labels: Tensor
    num_classes: int
    image_index: Tensor | None = None
    num_images: int | None = None
    level: Tensor | None = None
    num_levels: int = 1
    sample_weight: Tensor | None = None
    verified: Tensor | None = None
    not_exhaustive: Tensor | None = None
    pred_deltas: Tensor | None = None
    boxes: Tensor | None = None
    gt_boxes: Tensor | None = None
    gt_index: Tensor | None = None
    box_transform: Any = None

    def __post_init__(self) -> None:
        shape = tuple(self.labels.shape)
        if self.logits.dim() != 2 or tuple(self.logits.shape[:1]) != shape:
            raise ValueError(
                f"Samples: logits must be (R, C) and labels (R,), not {tuple(self.logits.shape)} "
                f"and {shape}."
            )
        self._check_labels()
        for name in ("image_index", "level", "sample_weight"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"Samples: {name} must be {shape}, not {tuple(value.shape)}.")
        for name in ("verified", "not_exhaustive"):
            value = getattr(self, name)
            if value is not None and value.shape[-1] != self.num_classes:
                raise ValueError(
                    f"Samples: {name} must be (N, {self.num_classes}), not {tuple(value.shape)}."
                )

    def _check_labels(self) -> None:
        labels = self.labels
        if labels.dtype != torch.int64:
            raise ValueError(f"Samples: labels must be int64, not {labels.dtype}.")
        on_host = labels.device.type == "cpu" or os.environ.get(CHECK_LABELS) == "1"
        if not on_host or not labels.numel() or torch.compiler.is_compiling():
            return
        values = labels.numpy(force=True)
        low, high = values.min(), values.max()
        if low < 0 or high > self.num_classes:
            raise ValueError(
                f"Samples: labels must be in [0, {self.num_classes}], where {self.num_classes} is "
                f"background, not in [{low}, {high}]; samples that are ignored must be left out."
            )

    @cached_property
    def foreground(self) -> Tensor:
        """(R,) bool, True for positives."""
        return self.labels < self.num_classes

    @cached_property
    def pos(self) -> Tensor:
        """(P,) int64, indices of the positives, ascending.

        If there are boxes, P is known without a host-device sync.
        """
        known = (self.pred_deltas, self.boxes, self.gt_boxes, self.gt_index)
        count = next((len(value) for value in known if value is not None), None)
        if count is None:
            return self.foreground.nonzero().squeeze(1)
        slot = self.foreground.cumsum(0) - 1
        slot = torch.where(self.foreground, slot, count)  # all background shares a spare slot
        indices = torch.arange(len(slot), device=slot.device)
        return slot.new_zeros(count + 1).scatter_(0, slot, indices)[:count]

    @cached_property
    def column(self) -> Tensor:
        """(R, 1) int64 in [0, K), the label's column; for background the last one."""
        return self.labels.clamp(max=self.num_classes - 1).unsqueeze(1)

    @cached_property
    def hit(self) -> Tensor:
        """(R, 1) in the type of the logits, the target in `column`: 1 for positives, else 0."""
        return self.foreground.to(self.logits.dtype).unsqueeze(1)

    @cached_property
    def onehot(self) -> Tensor:
        """(R, K) in the type of the logits; zero for background."""
        zeros = self.logits.new_zeros(len(self.labels), self.num_classes)
        return zeros.scatter_(1, self.column, self.hit)

    @cached_property
    def class_counts(self) -> Tensor:
        """(K,) float64, positives of each class."""
        counts = self.labels.new_zeros(self.num_classes + 1, dtype=torch.float64)
        ones = counts.new_ones(()).expand_as(self.labels)
        return counts.scatter_add_(0, self.labels, ones)[:-1]

    @cached_property
    def images(self) -> int:
        """N, the number of images."""
        if self.num_images is not None:
            return self.num_images
        if self.verified is not None:
            return len(self.verified)
        return (
            1
            if self.image_index is None or not len(self.image_index)
            else int(self.image_index.max()) + 1
        )

    @cached_property
    def sample_verified(self) -> Tensor | None:
        """(R, K) bool, `verified` of each sample's image, or None."""
        if self.verified is None:
            return None
        if self.image_index is None:
            return self.verified[:1].expand(len(self.labels), -1)
        return self.verified[self.image_index]

    @cached_property
    def target_deltas(self) -> Tensor:
        """(P, 4) deltas that would move `boxes` onto `gt_boxes`."""
        deltas: Tensor = self.box_transform.get_deltas(self.boxes, self.gt_boxes)
        return deltas

    @cached_property
    def pred_boxes(self) -> Tensor:
        """(P, 4) decoded predictions of the positives, with gradient."""
        boxes: Tensor = self.box_transform.apply_deltas(self.pred_deltas, self.boxes)
        return boxes

    @cached_property
    def iou(self) -> Tensor:
        """(P,) IoU of the decoded predictions with their objects, detached; 1 without boxes."""
        if self.pred_deltas is None or self.gt_boxes is None:
            return self.logits.new_ones(len(self.pos))
        return paired_iou(self.pred_boxes.detach(), self.gt_boxes)

    def upcast(self) -> Samples:
        """The same samples with half and bfloat16 predictions raised to float32."""
        changed = {
            name: value.float()
            for name in ("logits", "pred_deltas")
            if (value := getattr(self, name)) is not None and value.dtype in _HALF
        }
        return dataclasses.replace(self, **changed) if changed else self


def upcast(x: Tensor) -> Tensor:
    """Raise half precision and bfloat16 to float32; other tensors are returned as they are."""
    return x.float() if x.dtype in _HALF else x


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of box i of one set with box i of the other.

    Args:
        boxes: (P, 4) x0 y0 x1 y1.
        others: (P, 4).

    Returns:
        (P,) in [0, 1].
    """
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    inter = (high - low).clamp(min=0).prod(dim=1)
    area, other = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) for b in (boxes, others))
    return inter / (area + other - inter).clamp(min=1e-12)
