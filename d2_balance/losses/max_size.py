"""Max-size loss of Detic: the largest proposal of an image learns the image's class labels.

    k   = argmax over the proposals q of area(q)
    L_i = (1 / |Y|) sum_{c in Y} sum_j BCE(z_kj, [j = c])        sigmoid scores
    L_i = (1 / |Y|) sum_{c in Y} CE(z_k, c)                      softmax scores

Both are a cross-entropy with the soft target [j in Y] / |Y|: for each label the other labels of the
image are negatives.

Shapes: R proposals, image by image, N images, K classes, C columns, K or K + 1.

Source: Zhou et al., Detecting Twenty-thousand Classes using Image-level Supervision,
arXiv:2201.02605.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._samples import upcast


def largest_proposals(
    boxes: Tensor, image_index: Tensor, num_images: int, *, skip_last: bool = True
) -> Tensor:
    """Find the proposal of the largest area in every image; the first one of equal ones.

    Args:
        boxes: (R, 4) corners in pixels.
        image_index: (R,) int64 in [0, N), ascending.
        num_images: N.
        skip_last: whether the last proposal of an image does not count unless it is the only one,
            as in the authors' code; the paper takes all.

    Returns:
        (N,) int64 in [0, R], R for an image without proposals.
    """
    boxes = upcast(boxes)  # in half precision areas above 65,504 would all be the same
    place = torch.arange(len(boxes), device=boxes.device)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if skip_last:
        ends = place.new_full((num_images,), -1)
        first = ends.scatter_reduce(0, image_index, place, "amin", include_self=False)
        last = ends.scatter_reduce(0, image_index, place, "amax")
        skipped = (place == last[image_index]) & (place != first[image_index])
        area = area.masked_fill(skipped, -torch.inf)
    most = area.new_full((num_images,), -torch.inf)
    most = most.scatter_reduce(0, image_index, area, "amax")
    place = place.masked_fill(area != most[image_index], len(boxes))
    first = place.new_full((num_images,), len(boxes))
    return first.scatter_reduce(0, image_index, place, "amin")


def max_size_loss(
    logits: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    image_labels: Tensor,
    *,
    softmax: bool = False,
    skip_last: bool = True,
) -> Tensor:
    """Cross-entropy between the largest proposal of an image and the labels of the image.

    The authors weight the mean over images by 0.1, on the first 128 proposals by objectness.

    Args:
        logits: (R, C); half precision is raised to float32.
        boxes: (R, 4) corners in pixels.
        image_index: (R,) int64 in [0, N), ascending.
        image_labels: (N, K) bool, the classes that are in an image.
        softmax: whether the columns share a softmax. A column of background, the last of C = K + 1,
            is a negative for sigmoid scores as well; leave it out if the head does not use it.
        skip_last: see `largest_proposals`.

    Returns:
        (N,), 0 for an image without proposals or without labels.

    Raises:
        ValueError: there are more classes than columns.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 2.0, 2.0]])
        >>> logits = torch.tensor([[2.0, -1.0], [0.0, 0.0]])
        >>> labels = torch.tensor([[True, False]])
        >>> max_size_loss(logits, boxes, torch.tensor([0, 0]), labels)
        tensor([0.4402])
    """
    if image_labels.shape[1] > logits.shape[1]:
        raise ValueError(
            f"image_labels has {image_labels.shape[1]} classes; must be at most the "
            f"{logits.shape[1]} columns of logits."
        )
    logits = upcast(logits)
    chosen = largest_proposals(boxes, image_index, len(image_labels), skip_last=skip_last)
    given = image_labels.any(dim=1) & (chosen < len(logits))
    # one more sample for the images without proposals: the graph stays, with a gradient of zero
    z = F.pad(logits, (0, 0, 0, 1))[chosen]  # (N, C)
    target = F.pad(image_labels.to(z.dtype), (0, z.shape[1] - image_labels.shape[1]))
    target = target / target.sum(dim=1, keepdim=True).clamp(min=1)
    if softmax:
        loss = F.cross_entropy(z, target, reduction="none")
    else:
        loss = F.binary_cross_entropy_with_logits(z, target, reduction="none").sum(dim=1)
    return loss.masked_fill(~given, 0)
