"""Which proposals train a RoI head: a random sample, a proposal sampler's choice, or all of them.

A proposal sampler that reads losses or scores gets them from a mining pass: the head runs over all
labelled proposals under `no_grad` and in evaluation mode, so that dropout, the statistics of
normalisation layers, the state of the losses and the random generators of the training pass do not
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from d2_balance.data.mapper import MASKED
from d2_balance.losses._samples import paired_iou
from d2_balance.sampling import Candidates, ProposalSampler

if TYPE_CHECKING:  # what stands behind the mixin in the order of inheritance
    from detectron2.modeling.roi_heads import StandardROIHeads as StockHeads
else:
    StockHeads = object


class ProposalSampling(StockHeads):
    """Mixin for Detectron2's RoI heads; see `BalancedStandardROIHeads` for its arguments.

    Attributes:
        proposal_sampler: replaces the random sampling; None is Detectron2's.
        sampling_free: whether every proposal that is not ignored trains the box head.
        masks_per_image: if so, positives of an image that train mask and keypoint heads at most.
    """

    proposal_sampler: ProposalSampler | None
    sampling_free: bool
    masks_per_image: int
    num_classes: int

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.sampling_free and self.proposal_sampler is None:
            sampled: tuple[Tensor, Tensor] = super()._sample_proposals(
                matched_idxs, matched_labels, gt_classes
            )
            return sampled
        if len(gt_classes):
            labels = gt_classes[matched_idxs].masked_fill(matched_labels == 0, self.num_classes)
        else:
            labels = torch.full_like(matched_idxs, self.num_classes)
        kept = (matched_labels >= 0).nonzero().squeeze(1)
        return kept, labels[kept]

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        proposals = super().label_and_sample_proposals(proposals, targets)
        return proposals if self.proposal_sampler is None else self.select(proposals, 0)

    @torch.no_grad()
    def select(self, proposals: list[Instances], stage: int) -> list[Instances]:
        """The proposals that train one stage.

        Args:
            proposals: labelled proposals of each image.
            stage: cascade stage; 0 in other heads.

        Returns:
            Proposals of the same images; `sample_weight` is set if the proposal sampler weights.
        """
        assert self.proposal_sampler is not None
        candidates = self._candidates(self.proposal_sampler, proposals, stage)
        chosen = self.proposal_sampler(
            candidates, self.batch_size_per_image, self.positive_fraction
        )
        result = []
        for proposal, selection in zip(proposals, chosen, strict=True):
            proposal = proposal[selection.keep]
            if selection.weight is not None:
                proposal.sample_weight = selection.weight
            result.append(proposal)
        return result

    def run_head(self, proposals: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        """Scores (R, C) and deltas of all proposals of a batch, from the features of the batch."""
        raise NotImplementedError

    def head_modules(self, stage: int) -> tuple[nn.Module, Any]:
        """Box head and output layers of a stage."""
        raise NotImplementedError

    def mined(self, boxes: Sequence[Tensor], stage: int) -> None:
        """Called with the decoded boxes (R_i, 4) or (R_i, K * 4) of a mining pass."""

    def _candidates(
        self, sampler: ProposalSampler, proposals: list[Instances], stage: int
    ) -> list[Candidates]:
        fields = [
            {
                "boxes": p.proposal_boxes.tensor,
                "labels": p.gt_classes,
                "num_classes": self.num_classes,
                "iou": _overlap(p),
            }
            for p in proposals
        ]
        if sampler.needs_predictions:
            for own, mined in zip(fields, self._mine(proposals, stage), strict=True):
                own.update(mined)
        return [Candidates(**own) for own in fields]

    def _mine(self, proposals: list[Instances], stage: int) -> list[dict[str, Tensor]]:
        head, predictor = self.head_modules(stage)
        with _evaluating(head, predictor):
            predictions = self.run_head(proposals, stage)
            cls, box = predictor.losses_per_sample(predictions, proposals)
            probs = predictor.predict_probs(predictions, proposals)
            boxes = predictor.predict_boxes(predictions, proposals)
        self.mined(boxes, stage)
        sizes = [len(p) for p in proposals]
        result = []
        for c, b, prob, pred in zip(cls.split(sizes), box.split(sizes), probs, boxes, strict=True):
            score, column = prob[:, : self.num_classes].max(dim=1)
            pred = pred.view(len(pred), pred.shape[1] // 4, 4)
            if pred.shape[1] == 1:
                column = torch.zeros_like(column)
            index = torch.arange(len(pred), device=pred.device)
            result.append(
                {"cls_loss": c, "box_loss": b, "scores": score, "pred_boxes": pred[index, column]}
            )
        return result

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        return super()._forward_mask(features, self._capped(self._masked(instances)))

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        return super()._forward_keypoint(features, self._capped(instances))

    def _masked(self, instances: list[Instances]) -> list[Instances]:
        """Those that were matched with an object that has a mask, if some have none."""
        if not self.training:
            return instances
        return [one[one.get(MASKED)] if one.has(MASKED) else one for one in instances]

    def _capped(self, instances: list[Instances]) -> list[Instances]:
        """At most `masks_per_image` random positives of each image; background is dropped."""
        if not self.sampling_free or not self.training:
            return instances
        result = []
        for one in instances:
            positive = (one.gt_classes < self.num_classes).nonzero().squeeze(1)
            order = torch.randperm(len(positive), device=positive.device)
            result.append(one[positive[order[: self.masks_per_image]]])
        return result


def _overlap(proposal: Instances) -> Tensor:
    """(R,) IoU of labelled proposals with the objects they were matched with, 0 without objects."""
    boxes: Tensor = proposal.proposal_boxes.tensor
    if not proposal.has("gt_boxes"):
        return boxes.new_zeros(len(boxes))
    overlap: Tensor = paired_iou(boxes, proposal.gt_boxes.tensor)
    return overlap


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and random generators that go on as if they had not been used."""
    every = [m for module in modules for m in module.modules()]
    modes = [m.training for m in every]
    devices = {p.device for module in modules for p in module.parameters() if p.is_cuda}
    for module in every:
        module.training = False
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mode in zip(every, modes, strict=True):
            module.training = mode
