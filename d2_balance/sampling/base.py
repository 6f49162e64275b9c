"""Samplers: which proposals train a RoI head, and which anchors a dense head or the RPN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from d2_balance.losses import Samples
from d2_balance.utils.registry import Named, Registry

PROPOSAL_SAMPLERS = Registry("PROPOSAL_SAMPLERS")
PROPOSAL_SAMPLERS.__doc__ = (
    "Proposal samplers; the names are what MODEL.BALANCE.PROPOSAL_SAMPLER accepts."
)
ANCHOR_SAMPLERS = Registry("ANCHOR_SAMPLERS")
ANCHOR_SAMPLERS.__doc__ = (
    "Anchor samplers; the names are what MODEL.BALANCE.ANCHOR_SAMPLER accepts."
)


@dataclass(frozen=True)
class Candidates:
    """The labelled proposals of one image, before sampling; no ignored ones.

    Args:
        boxes: (R, 4) proposals, x0 y0 x1 y1 in pixels.
        labels: (R,) int64 in [0, K]; K is background.
        num_classes: K.
        iou: (R,) IoU of each proposal with the object that it overlaps most, in [0, 1].
        cls_loss: (R,) classification loss of a forward pass under `no_grad`. None: there was none.
        box_loss: (R,) box loss of that pass, 0 for background.
        scores: (R,) highest class probability of that pass, in [0, 1].
        pred_boxes: (R, 4) box that goes with `scores`, decoded.
    """

    boxes: Tensor
    labels: Tensor
    num_classes: int
    iou: Tensor
    cls_loss: Tensor | None = None
    box_loss: Tensor | None = None
    scores: Tensor | None = None
    pred_boxes: Tensor | None = None

    @cached_property
    def positive(self) -> Tensor:
        """Indices of the positives, ascending."""
        return (self.labels < self.num_classes).nonzero().squeeze(1)

    @cached_property
    def negative(self) -> Tensor:
        """Indices of the background proposals, ascending."""
        return (self.labels == self.num_classes).nonzero().squeeze(1)


@dataclass(frozen=True)
class Selection:
    """What a proposal sampler keeps of one image.

    Args:
        keep: (S,) int64, indices into the candidates, each at most once.
        weight: (S,) weights of the classification loss. None: all 1.
    """

    keep: Tensor
    weight: Tensor | None = None


class ProposalSampler(nn.Module, Named):
    """Base of all proposal samplers, which replace Detectron2's random sampling."""

    needs_predictions: bool = False
    """True: it reads losses and scores, from a forward pass under `no_grad` over all candidates."""

    def __init__(self) -> None:  # the signature that the config is made from: no arguments
        super().__init__()

    def forward(
        self, candidates: list[Candidates], batch_size: int, positive_fraction: float
    ) -> list[Selection]:
        """Sample proposals of a batch.

        Args:
            candidates: one for each of N images.
            batch_size: proposals per image, ROI_HEADS.BATCH_SIZE_PER_IMAGE.
            positive_fraction: largest fraction of positives, ROI_HEADS.POSITIVE_FRACTION.

        Returns:
            N selections.
        """
        return [self.select(c, batch_size, positive_fraction) for c in candidates]

    def select(self, c: Candidates, batch_size: int, positive_fraction: float) -> Selection:
        """Sample proposals of one image; arguments as for `forward`."""
        raise NotImplementedError


class AnchorSampler(nn.Module, Named):
    """Base of all anchor samplers, which keep some anchors by their classification loss.

    The criterion then divides by the positives of the batch, each image with at least one.
    """

    def __init__(self) -> None:  # the signature that the config is made from: no arguments
        super().__init__()

    def forward(self, samples: Samples, loss: Tensor) -> Tensor:
        """Choose anchors of a batch.

        Args:
            samples: R anchors that are not ignored.
            loss: (R,) classification loss of each, without a graph.

        Returns:
            (R,) bool, those that train.
        """
        raise NotImplementedError


def random_subset(indices: Tensor, count: int) -> Tensor:
    """At most `count` of the indices (n,), at random without replacement."""
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


def sample_positives(candidates: Candidates, batch_size: int, positive_fraction: float) -> Tensor:
    """Positives as Detectron2 samples them: at most a fraction of the batch, at random."""
    return random_subset(candidates.positive, int(batch_size * positive_fraction))
