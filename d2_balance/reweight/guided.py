"""Guided loss scaling: the box loss says how much the classification loss counts.

    r = L_box / L_cls   (no gradient),      L = L_box + w r L_cls,      value: (1 + w) L_box

The gradient of the second term is w L_box d(log L_cls): a constant factor of L_cls, such as the
number of anchors it was divided by, changes nothing. Without a bound r grows as L_cls vanishes.

Source: Chen et al., Is Heuristic Sampling Necessary in Training Deep Object Detectors?,
arXiv:1909.04868, section 3.3. Here r is bounded, and taken across all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2_balance.losses._base import check
from d2_balance.utils.distributed import sum_across_ranks


def guided_ratio(box: Tensor, cls: Tensor, max_ratio: float) -> Tensor:
    """r, without a graph.

    Args:
        box: 0-d box loss, at least 0.
        cls: 0-d classification loss.
        max_ratio: largest r, above 0.

    Returns:
        0-d float64 in [0, max_ratio]; max_ratio where cls is 0 and box is not.
    """
    box, cls = box.detach().double(), cls.detach().double()
    return (box / cls.clamp(min=1e-12)).clamp(min=0.0, max=max_ratio)


class GuidedScale(nn.Module):
    """Scales a classification loss to the size of the box loss (arXiv:1909.04868).

    A batch without a positive on any rank has no box loss; r is then 0, and it does not train the
    classifier.

    Buffer `ratio`, 0-d: r of the last batch; a value at `max_ratio` says that L_cls collapsed.

    Args:
        scale: w, at least 0; the authors use 1 in RetinaNet and RPN and 2 in RoI heads.
        max_ratio: bound of r, above 0.

    Raises:
        ValueError: an argument is out of range.
    """

    ratio: Tensor

    def __init__(self, scale: float = 1.0, max_ratio: float = 1e4) -> None:
        super().__init__()
        check(self, "scale", scale, scale >= 0, "a number of at least 0")
        check(self, "max_ratio", max_ratio, max_ratio > 0, "a number above 0")
        self.scale, self.max_ratio = scale, max_ratio
        self.register_buffer("ratio", torch.ones((), dtype=torch.float64), persistent=False)

    def forward(self, cls: Tensor, box: Tensor) -> Tensor:
        """The scaled classification loss; every rank must call it for every batch.

        Args:
            cls: 0-d classification loss of this rank.
            box: 0-d box loss of this rank.

        Returns:
            0-d, with the gradient of `cls` times w r.
        """
        cls_sum, box_sum = sum_across_ranks([cls, box])
        assert cls_sum is not None and box_sum is not None
        ratio = guided_ratio(box_sum, cls_sum, self.max_ratio)
        self.ratio.copy_(ratio)
        return cls * (self.scale * ratio).to(cls.dtype)

    def log_values(self) -> dict[str, Tensor]:
        return {"ratio": self.ratio}
