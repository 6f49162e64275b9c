"""Soft-NMS, and scores of masks by their probabilities.

Soft-NMS takes the box with the highest score, and lowers the scores of the boxes that overlap it
instead of dropping them:

    linear    s_i <- s_i (1 - o_i)          if o_i > iou_threshold
    gaussian  s_i <- s_i exp(-o_i^2 / sigma)

Boxes below `min_score` are dropped, and so on until none is left. Boxes of different classes do not
affect each other. Maskness multiplies a score by the mean probability of the pixels in the mask.

Shapes: B boxes, K classes.

Sources: Bodla et al., arXiv:1704.04503; maskness: Wang et al., SOLO, arXiv:1912.04488, as EVA-02
(arXiv:2303.11331) uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

METHODS = ("hard", "linear", "gaussian")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    max_per_class: int = 1000,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap a better one of their class.

    All classes advance together: step t takes the t-th box of every class.

    Args:
        boxes: (B, 4) x0 y0 x1 y1.
        scores: (B,).
        classes: (B,) int64.
        method: one of `METHODS`; "hard" drops what overlaps by more than `iou_threshold`.
        iou_threshold: overlap above which linear and hard act.
        sigma: width of the Gaussian, above 0.
        min_score: boxes whose score falls below it are dropped.
        max_per_class: boxes of a class that take part, those with the highest scores.
        offset: added to widths and heights; 1 counts pixels as the original does.

    Returns:
        Indices (B',) of the boxes that are left, and their scores (B',), highest first.

    Raises:
        ValueError: it is traced, which would fix the number of steps.
    """
    if torch.jit.is_tracing():
        refuse_soft_nms({"method": method})
    if not len(boxes):
        return classes.new_empty(0), scores
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(classes[order], stable=True)]  # class by class, best first
    _, counts = classes[order].unique_consecutive(return_counts=True)
    start = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - start.repeat_interleave(counts)
    group = torch.arange(len(counts), device=order.device).repeat_interleave(counts)
    kept = rank < max_per_class
    order, rank, group = order[kept], rank[kept], group[kept]
    width = int(counts.max().clamp(max=max_per_class))
    grid = order.new_full((len(counts), width), -1)  # (K', width) indices of boxes
    grid[group, rank] = order
    present = grid >= 0
    value = torch.where(present, scores[grid.clamp(min=0)], -torch.inf)
    box = boxes[grid.clamp(min=0)]
    return _decay(grid, box, value, method, iou_threshold, sigma, min_score, offset)


def refuse_soft_nms(arguments: Mapping[str, Any] | None) -> None:
    """Refuse to export soft-NMS.

    Args:
        arguments: of `soft_nms`; None is Detectron2's suppression, which can be exported.

    Raises:
        ValueError: naming the key and what it must be.
    """
    if arguments is not None:
        raise ValueError(
            f"MODEL.BALANCE.TEST_NMS.METHOD {arguments['method']!r} has a loop whose length "
            "depends on the data, and cannot be exported; must be 'hard'."
        )


def _decay(
    grid: Tensor,
    box: Tensor,
    value: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    index, score = [], []
    classes = torch.arange(len(grid), device=grid.device)
    for _ in range(grid.shape[1]):
        best, column = value.max(dim=1)  # ties: the first index
        live = best > -torch.inf
        index.append(grid[classes, column][live])
        score.append(best[live])
        value[classes, column] = -torch.inf
        overlap = _iou(box[classes, column].unsqueeze(1), box, offset)  # (K', width)
        if method == "gaussian":
            value = value * torch.exp(-overlap.square() / sigma)
        else:
            factor = torch.zeros_like(overlap) if method == "hard" else 1 - overlap
            value = torch.where(overlap > iou_threshold, value * factor, value)
        value = torch.where(value >= min_score, value, -torch.inf)  # NaN of 0 * inf as well
        if not bool((value > -torch.inf).any()):
            break
    scores, kept = torch.cat(score), torch.cat(index)
    order = torch.argsort(scores, descending=True, stable=True)
    return kept[order], scores[order]


def _iou(one: Tensor, many: Tensor, offset: float) -> Tensor:
    """(K, n) IoU of one box (K, 1, 4) with n boxes (K, n, 4) of its class."""
    low, high = (
        torch.maximum(one[..., :2], many[..., :2]),
        torch.minimum(one[..., 2:], many[..., 2:]),
    )
    inter = (high - low + offset).clamp(min=0).prod(dim=-1)
    area, other = ((b[..., 2:] - b[..., :2] + offset).prod(dim=-1) for b in (one, many))
    return inter / (area + other - inter).clamp(min=1e-12)


def soft_nms_detections(
    boxes: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    score_threshold: float | Tensor,
    max_detections: int,
    **arguments: Any,
) -> tuple[Instances, Tensor]:
    """Return the detections of one image, as Detectron2's `fast_rcnn_inference_single_image`.

    Args:
        boxes: (R, 4) or (R, K * 4).
        scores: (R, K + 1), the last column background.
        size: height and width of the image.
        score_threshold: a number, or (K,).
        max_detections: of the image; below 0 keeps all.
        **arguments: of `soft_nms`.

    Returns:
        The detections, and the index of the proposal of each.
    """
    valid = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    proposals = valid.nonzero().squeeze(1)
    boxes, scores = boxes[proposals], scores[proposals, :-1]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(size)
    boxes = clipped.tensor.view(len(proposals), boxes.shape[1] // 4, 4)  # (R, 1 or K, 4)
    proposal, classes = (scores > score_threshold).nonzero().unbind(1)
    chosen = boxes[proposal, 0 if boxes.shape[1] == 1 else classes]
    kept, score = soft_nms(chosen, scores[proposal, classes], classes, **arguments)
    if max_detections >= 0:
        kept, score = kept[:max_detections], score[:max_detections]
    result = Instances(
        size, pred_boxes=Boxes(chosen[kept]), scores=score, pred_classes=classes[kept]
    )
    return result, proposals[proposal[kept]]


def maskness(masks: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Return scores times the mean probability inside of the masks.

    Args:
        masks: (B, 1, H, W) mask probabilities of the predicted class.
        scores: (B,).
        threshold: pixels above it are inside.

    Returns:
        (B,); 0 where no pixel is inside.
    """
    inside = masks > threshold
    total = (masks * inside).flatten(1).sum(dim=1)
    return scores * total / inside.flatten(1).sum(dim=1).clamp(min=1)
