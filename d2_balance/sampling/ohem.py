"""OHEM: only the hardest proposals train the RoI head.

A forward pass under `no_grad` gives every proposal i of an image its loss

    l_i = L_cls,i + [i is positive] L_box,i

Non-maximum suppression with l_i as score and an IoU of 0.7 removes neighbours, which would have
one loss; the B / N proposals of highest loss are kept, whatever their labels.

Source: Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining,
arXiv:1604.03540, section 4. The authors' code suppresses within each class and keeps the B hardest
of the whole batch, so that one image may take them all: `per_class_nms` and `scope="batch"`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from d2_balance.losses._base import check

from .base import PROPOSAL_SAMPLERS, Candidates, ProposalSampler, Selection


def hardest_first(
    boxes: Tensor, loss: Tensor, group: Tensor, nms_threshold: float
) -> tuple[Tensor, Tensor]:
    """Proposals that survive non-maximum suppression by loss.

    Args:
        boxes: (R, 4) x0 y0 x1 y1.
        loss: (R,); what is not a number counts as least hard.
        group: (R,) int64; boxes of different groups do not suppress each other.
        nms_threshold: IoU above which the easier of two is removed, in [0, 1].

    Returns:
        Indices (S,) from hard to easy, and their losses (S,).
    """
    loss = loss.masked_fill(loss.isnan(), -torch.inf)
    keep = batched_nms(boxes.float(), loss.float(), group, nms_threshold)
    return keep, loss[keep]


@PROPOSAL_SAMPLERS.register()
class OHEM(ProposalSampler):
    """Online hard example mining (arXiv:1604.03540) in RoI heads, each cascade stage by itself.

    Args:
        rois_per_image: B / N, proposals that are kept per image, at least 1; the paper's 128 in
            2 images. It replaces ROI_HEADS.BATCH_SIZE_PER_IMAGE.
        nms_threshold: IoU of the suppression, in [0, 1]; 1 suppresses nothing.
        scope: "image" keeps `rois_per_image` of every image (paper); "batch" keeps N times as
            many of all N images together (authors' code).
        per_class_nms: whether only proposals of one label suppress each other (authors' code).

    Raises:
        ValueError: an argument is out of range.
    """

    needs_predictions = True

    def __init__(
        self,
        *,
        rois_per_image: int = 64,
        nms_threshold: float = 0.7,
        scope: Literal["image", "batch"] = "image",
        per_class_nms: bool = False,
    ) -> None:
        super().__init__()
        check(self, "rois_per_image", rois_per_image, rois_per_image >= 1, "at least 1")
        check(self, "nms_threshold", nms_threshold, 0 <= nms_threshold <= 1, "a number in [0, 1]")
        check(self, "scope", scope, scope in ("image", "batch"), "one of image, batch")
        self.rois_per_image, self.nms_threshold = rois_per_image, nms_threshold
        self.scope, self.per_class_nms = scope, per_class_nms

    def forward(
        self, candidates: list[Candidates], batch_size: int, positive_fraction: float
    ) -> list[Selection]:
        kept = []
        for c in candidates:
            group = c.labels if self.per_class_nms else torch.zeros_like(c.labels)
            assert c.cls_loss is not None and c.box_loss is not None  # `needs_predictions`
            loss = c.cls_loss + c.box_loss
            kept.append(hardest_first(c.boxes, loss, group, self.nms_threshold))
        if self.scope == "image":
            return [Selection(keep[: self.rois_per_image]) for keep, _ in kept]
        return self._of_the_batch(kept)

    def _of_the_batch(self, kept: list[tuple[Tensor, Tensor]]) -> list[Selection]:
        indices, losses = (torch.cat(values) for values in zip(*kept, strict=True))
        image = torch.cat([i.new_full((len(i),), n) for n, (i, _) in enumerate(kept)])
        hardest = losses.argsort(descending=True, stable=True)[: self.rois_per_image * len(kept)]
        indices, image = indices[hardest], image[hardest]
        return [Selection(indices[image == n]) for n in range(len(kept))]
