"""Standard and Cascade RoI heads with balanced output layers.

Both differ from Detectron2's in the output layers and in the choice of proposals, and hand the
output layers two things that Detectron2 drops: the image-level labels and the ids of the matched
objects. Mask and keypoint heads stay stock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
    cascade_rcnn,
    roi_heads,
)
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from d2_balance.data.mapper import MASKED
from d2_balance.sampling import ProposalSampler

from ..build import (
    build_anchor_sampler,
    build_proposal_sampler,
    cosine_arguments,
    normalized_masks,
    renamed,
)
from ..compatibility import check_anchor_sampler, check_pairing
from ..image_context import (
    check_ioa,
    classes_of_ids,
    ids_as_classes,
    number_objects,
    without_covered_background,
)
from ..postprocess.calibration import LogN
from ..postprocess.soft_nms import maskness as masked_scores
from ..scripting import Scriptable
from .cosine import NormalizedConv2d
from .fast_rcnn import BalancedFastRCNNOutputLayers
from .proposal_sampling import ProposalSampling


class BalancedROIHeads(Scriptable, ProposalSampling):
    """What both heads share; in front of Detectron2's class in the order of inheritance.

    Args:
        proposal_sampler: chooses the proposals that train; None is Detectron2's random sampling.
        sampling_free: whether all proposals train that are not ignored.
        masks_per_image: if so, positives of an image that train mask and keypoint heads at most.
        ignore_ioa: background proposals of which a region of `images.ignore_boxes` holds that
            fraction of the area do not count, in any stage; in (0, 1].
        maskness: scores are multiplied by the mean probability of the pixels of their mask above
            it, in (0, 1); 0 is off.
        **kwargs: as Detectron2's class.

    Raises:
        ValueError: the losses and settings cannot work together.
    """

    training_only = ("proposal_sampler",)

    @configurable
    def __init__(
        self,
        *,
        proposal_sampler: ProposalSampler | None = None,
        sampling_free: bool = False,
        masks_per_image: int = 128,
        ignore_ioa: float = 0.5,
        maskness: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_ioa(ignore_ioa)
        if not 0 <= maskness < 1 or (maskness and not self.mask_on):
            raise ValueError(
                f"MODEL.BALANCE.MASKNESS is {maskness} and MODEL.MASK_ON {self.mask_on}; must be a "
                "threshold in (0, 1) of a model with masks, or 0."
            )
        self.maskness = maskness
        self.ignore_ioa = ignore_ioa
        self._regions: list[Tensor] | None = None  # of the batch
        self.proposal_sampler = proposal_sampler
        self.sampling_free, self.masks_per_image = sampling_free, masks_per_image
        self._features: list[Tensor] = []  # of the batch, for the mining pass
        for stage, layers in enumerate(self._output_layers()):
            if isinstance(layers.calibration, LogN):
                layers.calibration.of_stage(stage)
            check_pairing(
                "RoI heads",
                layers.cls_loss,
                layers.box_loss,
                proposal_sampler=proposal_sampler,
                sampling_free=sampling_free,
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ours = {"FastRCNNOutputLayers": BalancedFastRCNNOutputLayers}
        with renamed(vars(roi_heads), **ours), renamed(vars(cascade_rcnn), **ours):
            ret: dict[str, Any] = super().from_config(cfg, input_shape)
        if normalized_masks(cfg):
            ret["mask_head"].predictor = _normalized(ret["mask_head"], cfg)
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        check_anchor_sampler("RoI heads", build_anchor_sampler(cfg, num_classes))
        ret["proposal_sampler"] = build_proposal_sampler(cfg, num_classes)
        ret["sampling_free"] = cfg.MODEL.BALANCE.SAMPLING_FREE
        ret["masks_per_image"] = cfg.MODEL.BALANCE.MASKS_PER_IMAGE
        ret["ignore_ioa"] = cfg.MODEL.BALANCE.IGNORE_IOA
        ret["maskness"] = cfg.MODEL.BALANCE.MASKNESS
        return ret

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """As Detectron2's; with `maskness` the scores are new, and the best come first."""
        instances = super().forward_with_given_boxes(features, instances)
        if not self.maskness:
            return instances
        result = []
        for one in instances:
            if one.has("scores") and one.has("pred_masks"):
                one.scores = masked_scores(one.pred_masks, one.scores, self.maskness)
                one = one[one.scores.argsort(descending=True, stable=True)]
            result.append(one)
        return result

    def __prepare_scriptable__(self) -> nn.Module:
        if self.maskness:
            raise ValueError(
                f"MODEL.BALANCE.MASKNESS {self.maskness} cannot be scripted; must be 0, or trace "
                "the model."
            )
        return super().__prepare_scriptable__()

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        if targets is not None:
            number_objects(targets)
        self._features = [features[f] for f in self.box_in_features]
        self._regions = getattr(images, "ignore_boxes", None)
        with self._image_labels(
            getattr(images, "verified", None), getattr(images, "not_exhaustive", None)
        ):
            try:
                return super().forward(images, features, proposals, targets)
            finally:
                self._features, self._regions = [], None

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """As Detectron2's; background inside an ignore region is never sampled."""
        proposals = self._outside(proposals, targets, self.proposal_matcher)
        return super().label_and_sample_proposals(proposals, targets)

    def _outside(
        self, proposals: list[Instances], targets: list[Instances], matcher: Matcher
    ) -> list[Instances]:
        return without_covered_background(
            proposals, targets, self._regions, matcher, self.ignore_ioa
        )

    def _output_layers(self) -> list[Any]:
        predictor = self.box_predictor
        return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]

    @contextmanager
    def _image_labels(
        self, verified: Tensor | None, not_exhaustive: Tensor | None
    ) -> Iterator[None]:
        layers = self._output_layers()
        for layer in layers:
            layer.verified, layer.not_exhaustive = verified, not_exhaustive
        try:
            yield
        finally:
            for layer in layers:
                layer.verified = layer.not_exhaustive = None


def _normalized(mask_head: nn.Module, cfg: CfgNode) -> NormalizedConv2d:
    """Return a normalised layer that replaces the last one of a mask head."""
    last = getattr(mask_head, "predictor", None)
    if not isinstance(last, nn.Conv2d):
        raise ValueError(
            "MODEL.BALANCE.MASK_PREDICTOR 'normalized' replaces the last convolution, which "
            f"MODEL.ROI_MASK_HEAD.NAME {type(mask_head).__name__} does not have; must be 'conv'."
        )
    return NormalizedConv2d(
        last.in_channels, last.out_channels, last.kernel_size[0], **cosine_arguments(cfg)
    )


@ROI_HEADS_REGISTRY.register()
class BalancedStandardROIHeads(BalancedROIHeads, StandardROIHeads):
    """StandardROIHeads with `BalancedFastRCNNOutputLayers`; arguments as `BalancedROIHeads`."""

    def head_modules(self, stage: int) -> tuple[nn.Module, Any]:
        return self.box_head, self.box_predictor

    def run_head(self, proposals: list[Instances], stage: int) -> Any:
        boxes = [p.proposal_boxes for p in proposals]
        return self.box_predictor(self.box_head(self.box_pooler(self._features, boxes)))


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(BalancedROIHeads, CascadeROIHeads):
    """CascadeROIHeads with `BalancedFastRCNNOutputLayers`, each stage with a state of its own.

    A proposal sampler that reads losses or scores chooses for each stage among the boxes that the
    stage before made of all proposals, not of those it trained on.

    Arguments as `BalancedROIHeads`.
    """

    _refined: Sequence[Tensor] = ()  # boxes of the last mining pass

    def head_modules(self, stage: int) -> tuple[nn.Module, Any]:
        return self.box_head[stage], self.box_predictor[stage]

    def run_head(self, proposals: list[Instances], stage: int) -> Any:
        return self._run_stage(self._features, proposals, stage)

    def mined(self, boxes: Sequence[Tensor], stage: int) -> None:
        self._refined = boxes

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        if self.training or self.box_predictor[0].test_nms is None:
            return super()._forward_box(features, proposals, targets)
        # Detectron2's suppresses boxes inside of its loop over the stages
        maps = [features[name] for name in self.box_in_features]
        sizes = [p.image_size for p in proposals]
        boxes: list[Tensor] = []
        scores: list[list[Tensor]] = []
        for stage, layers in enumerate(self.box_predictor):
            if stage:
                proposals = self._create_proposals_from_boxes(boxes, sizes)
            predictions = self._run_stage(maps, proposals, stage)
            boxes = layers.predict_boxes(predictions, proposals)
            scores.append(layers.predict_probs(predictions, proposals))
        mean = [torch.stack(own).mean(dim=0) for own in zip(*scores, strict=True)]
        return layers.detections(boxes, mean, sizes)[0]

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        mines = self.proposal_sampler is not None and self.proposal_sampler.needs_predictions
        if mines:
            sizes = [p.image_size for p in proposals]
            proposals = self._create_proposals_from_boxes(self._refined, sizes)
        proposals = self._outside(proposals, targets, self.proposal_matchers[stage])
        marked = ids_as_classes(targets, self.num_classes)
        proposals = super()._match_and_label_boxes(proposals, stage, marked)
        for proposal in proposals:
            proposal.gt_classes, proposal.gt_index = classes_of_ids(
                proposal.gt_classes, targets, self.num_classes
            )
        return self.select(proposals, stage) if mines else proposals


@ROI_HEADS_REGISTRY.register()
class BalancedRes5ROIHeads(BalancedROIHeads, Res5ROIHeads):
    """Res5ROIHeads (C4 models) with `BalancedFastRCNNOutputLayers`.

    Arguments as `BalancedROIHeads`.

    The mask head trains on the features of the box head, on every positive: `masks_per_image` has
    no effect, and objects without a mask are refused if there is a mask head.
    """

    @property
    def box_in_features(self) -> list[str]:
        """Names of the feature maps that the heads read."""
        return list(self.in_features)

    def head_modules(self, stage: int) -> tuple[nn.Module, Any]:
        return self.res5, self.box_predictor

    def run_head(self, proposals: list[Instances], stage: int) -> Any:
        boxes = [p.proposal_boxes for p in proposals]
        features = self._shared_roi_transform(self._features, boxes)
        return self.box_predictor(features.mean(dim=[2, 3]))

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        if self.training and self.mask_on and any(t.has(MASKED) for t in targets or ()):
            raise ValueError(
                "BalancedRes5ROIHeads trains masks on the features of its boxes, and a training "
                "set has objects without a mask; set MODEL.MASK_ON False or take a model with FPN."
            )
        return super().forward(images, features, proposals, targets)
