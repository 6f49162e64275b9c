"""The region proposal network with any loss of the package that works with one class.

Shapes: A anchors of an image, A_l of a level, N images, R samples, P positives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2_balance.data.priors.foreground import ForegroundPrior
from d2_balance.data.priors.sample_counts import RPN as RPN_NAME
from d2_balance.losses import BoxLoss, ClassificationLoss, Samples, SigmoidCELoss
from d2_balance.reweight import GuidedScale
from d2_balance.sampling import AnchorSampler
from d2_balance.utils.distributed import world_size

from ..anchor_samples import anchor_samples
from ..build import (
    build_anchor_sampler,
    build_box_loss,
    build_cls_loss,
    build_guided,
    stock_box_loss,
)
from ..compatibility import check_pairing
from ..criterion import ImagePositives, LossHead, Normalizer, PositiveEMA
from ..image_context import check_ioa, ignore_background
from ..prior_init import load_prior, set_class_prior
from ..scripting import Scriptable


class ImageNormalizer(Normalizer):
    """A fixed number of samples for each image of all ranks: the RPN's denominator in Detectron2.

    Args:
        samples_per_image: above 0.
    """

    total: Tensor

    def __init__(self, samples_per_image: int) -> None:
        super().__init__()
        self.samples_per_image = samples_per_image
        self.register_buffer("total", torch.ones((), dtype=torch.float64), persistent=False)

    def count(self, samples: Samples) -> Tensor:
        return torch.full_like(self.total, self.samples_per_image * samples.images)

    def update(self, total: Tensor) -> None:
        self.total.copy_(total.clamp(min=1))

    def value(self) -> Tensor:
        return self.total / world_size()


@PROPOSAL_GENERATOR_REGISTRY.register()
class BalancedRPN(LossHead, Scriptable, RPN):
    """RPN whose losses come from MODEL.BALANCE.RPN; stock if the names are empty.

    Detectron2's `loss_weight` multiplies the weights of both losses, before guided scaling, which
    leaves the classification loss at `guided` times the weighted box loss.

    Args:
        cls_loss: sigmoid loss that works with one class; None is cross-entropy.
        box_loss: box loss; None is the stock `box_reg_loss_type`.
        cls_weight: factor of the classification loss.
        box_weight: factor of the box loss.
        guided: scales the classification loss to the box loss; None leaves it.
        sampling_free: False samples `batch_size_per_image` anchors of each image and divides by
            their number; True trains on all anchors that are not ignored and divides by a moving
            average of the positives.
        anchor_sampler: keeps some of all anchors that are not ignored by their classification
            loss, and the denominator is the number of positives; None samples at random.
        prior_prob: initial probability of an object, in (0, 1).
        prior: counted prior, instead of `prior_prob`.
        ignore_ioa: background anchors of which a region of `images.ignore_boxes` holds that
            fraction of the area do not count, in (0, 1].
        **kwargs: as Detectron2's RPN.

    Raises:
        ValueError: the losses and settings cannot work together, or prior_prob is out of range.
    """

    @configurable
    def __init__(
        self,
        *,
        cls_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        guided: GuidedScale | None = None,
        sampling_free: bool = False,
        anchor_sampler: AnchorSampler | None = None,
        prior_prob: float = 0.5,
        prior: ForegroundPrior | None = None,
        ignore_ioa: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_ioa(ignore_ioa)
        self.ignore_ioa = ignore_ioa
        self._regions: list[Tensor] | None = None  # of the batch
        self.cls_loss = cls_loss or SigmoidCELoss()
        self.box_loss = box_loss or stock_box_loss(self.box_reg_loss_type, self.smooth_l1_beta)
        self.cls_weight = cls_weight * self.loss_weight.get("loss_rpn_cls", 1.0)
        self.box_weight = box_weight * self.loss_weight.get("loss_rpn_loc", 1.0)
        self.guided = guided
        self.reweighters = nn.ModuleList()
        self.sampling_free, self.anchor_sampler = sampling_free, anchor_sampler
        check_pairing(
            "the RPN",
            self.cls_loss,
            self.box_loss,
            guided=guided is not None,
            sampling_free=sampling_free,
            anchor_sampler=anchor_sampler,
        )
        self.normalizer: Normalizer = ImageNormalizer(self.batch_size_per_image)
        if anchor_sampler is not None:
            self.normalizer = ImagePositives()
        elif sampling_free:
            self.normalizer = PositiveEMA()
        if not 0 < prior_prob < 1:
            raise ValueError(
                f"MODEL.BALANCE.RPN.PRIOR_PROB is {prior_prob}; must be a number in (0, 1)."
            )
        if prior is not None or prior_prob != 0.5:  # 0.5 is the head's own bias
            classifier: Any = getattr(self.rpn_head, "objectness_logits", None)
            if getattr(classifier, "bias", None) is None:
                raise ValueError(
                    "MODEL.BALANCE.RPN.PRIOR_PROB and MODEL.BALANCE.PRIOR_FILE set the bias of "
                    f"`objectness_logits`, which {type(self.rpn_head).__name__} "
                    "(MODEL.RPN.HEAD_NAME) does not have; must be StandardRPNHead."
                )
            nn.init.constant_(classifier.bias, -math.log((1 - prior_prob) / prior_prob))
            if prior is not None:
                set_class_prior(self, classifier, prior, RPN_NAME, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret: dict[str, Any] = super().from_config(cfg, input_shape)
        node = cfg.MODEL.BALANCE.RPN
        ret["cls_loss"] = build_cls_loss(cfg, 1, RPN_NAME)
        ret["box_loss"] = build_box_loss(cfg, 1, RPN_NAME)
        ret["cls_weight"], ret["box_weight"] = node.CLS_LOSS_WEIGHT, node.BOX_LOSS_WEIGHT
        ret["guided"] = build_guided(cfg, RPN_NAME)
        ret["sampling_free"] = node.SAMPLING_FREE
        ret["anchor_sampler"] = build_anchor_sampler(cfg, 1, RPN_NAME)
        ret["prior_prob"] = node.PRIOR_PROB
        ret["prior"] = load_prior(cfg)
        ret["ignore_ioa"] = cfg.MODEL.BALANCE.IGNORE_IOA
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> Any:
        """As Detectron2's RPN; the regions of `images.ignore_boxes` are known meanwhile."""
        self._regions = getattr(images, "ignore_boxes", None)
        try:
            return super().forward(images, features, gt_instances)
        finally:
            self._regions = None

    def _subsample_labels(self, label: Tensor) -> Tensor:
        return label  # sampled below, once the regions are known

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As Detectron2's RPN; background anchors inside an ignore region are never sampled."""
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        if self._regions is not None:
            labels = ignore_background(
                labels, Boxes.cat(anchors), self._regions, 0, self.ignore_ioa
            )
        if not self.sampling_free and self.anchor_sampler is None:
            labels = [super(BalancedRPN, self)._subsample_labels(label) for label in labels]
        return labels, boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Same arguments and result as Detectron2's RPN, which also logs how many were sampled."""
        losses = self.sample_losses(
            self.samples(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        )
        return {"loss_rpn_cls": losses["loss_cls"], "loss_rpn_loc": losses["loss_box_reg"]}

    def samples(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> Samples:
        """Flatten the dense predictions of a batch and drop anchors that do not count.

        Args:
            anchors: one Boxes per level, A in all.
            pred_objectness_logits: per level (N, A_l).
            gt_labels: N vectors (A,), -1 ignored, 0 background, 1 object.
            pred_anchor_deltas: per level (N, A_l, 4).
            gt_boxes: N tensors (A, 4), of the matched objects.

        Returns:
            R samples of one class, image by image.
        """
        labels = torch.stack(gt_labels).long()  # (N, A)
        return anchor_samples(
            anchors,
            [x.unsqueeze(2) for x in pred_objectness_logits],
            torch.where(labels < 0, labels, 1 - labels),  # of one class: object 0, background 1
            pred_anchor_deltas,
            gt_boxes,
            num_classes=1,
            box_transform=self.box2box_transform,
        )
