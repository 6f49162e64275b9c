"""What RetinaNet and FCOS share: the losses of a dense head, and the samples that they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2_balance.data.image_labels import ImageLabels
from d2_balance.data.model_classes import fill_metadata
from d2_balance.data.priors.foreground import ForegroundPrior
from d2_balance.losses import BoxLoss, ClassificationLoss, FocalLoss, Samples
from d2_balance.reweight import GuidedScale
from d2_balance.sampling import AnchorSampler

from ..anchor_samples import anchor_samples
from ..build import (
    build_anchor_sampler,
    build_box_loss,
    build_calibration,
    build_cls_loss,
    build_guided,
    build_proposal_sampler,
    build_reweighters,
    build_test_nms,
    calibration_name,
    check_class_quantities,
)
from ..compatibility import check_pairing
from ..criterion import ImagePositives, LossHead, Normalizer, PositiveEMA
from ..image_context import (
    LabelledImages,
    check_ioa,
    classes_of_ids,
    ids_as_classes,
    ignore_background,
    number_objects,
)
from ..postprocess.soft_nms import refuse_soft_nms, soft_nms
from ..prior_init import load_prior, set_class_prior, set_class_thresholds, wanted_thresholds
from ..scripting import Scriptable


def loss_arguments(cfg: CfgNode, num_classes: int, head: str) -> dict[str, Any]:
    """The constructor arguments of `BalancedDense` that MODEL.BALANCE sets.

    Raises:
        ValueError: naming the key.
    """
    fill_metadata(cfg)
    build_proposal_sampler(cfg, num_classes, head)  # raises: dense heads have no proposals
    _refuse_roi_keys(cfg, head)
    prior = load_prior(cfg)
    return {
        "cls_loss": build_cls_loss(cfg, num_classes),
        "box_loss": build_box_loss(cfg, num_classes),
        "reweighters": build_reweighters(cfg, num_classes),
        "cls_weight": cfg.MODEL.BALANCE.CLS_LOSS_WEIGHT,
        "box_weight": cfg.MODEL.BALANCE.BOX_LOSS_WEIGHT,
        "guided": build_guided(cfg),
        "anchor_sampler": build_anchor_sampler(cfg, num_classes),
        "prior": prior,
        "class_thresholds": wanted_thresholds(cfg, prior),
        "image_labels": ImageLabels(cfg.DATASETS.TRAIN, num_classes),
        "ignore_ioa": cfg.MODEL.BALANCE.IGNORE_IOA,
        "calibration": build_calibration(cfg, num_classes, "sigmoid"),
        "calibration_name": calibration_name(cfg),
        "test_nms": build_test_nms(cfg),
    }


def _refuse_roi_keys(cfg: CfgNode, head: str) -> None:
    """Refuse keys that only RoI heads read."""
    balance = cfg.MODEL.BALANCE
    for key, value, off in (
        ("CLASSIFIER", balance.CLASSIFIER, "linear"),
        ("MASK_PREDICTOR", balance.MASK_PREDICTOR, "conv"),
        ("DISALIGN", balance.DISALIGN, False),
        ("MASKNESS", balance.MASKNESS, 0),
    ):
        if value != off:
            raise ValueError(
                f"MODEL.BALANCE.{key} {value} works in RoI heads and {head} has none; must be "
                f"{off}."
            )


class BalancedDense(LossHead, Scriptable, LabelledImages, nn.Module):
    """Base of the dense detectors, in front of Detectron2's class in the order of inheritance.

    The normaliser is a buffer counted across all ranks (`loss_normalizer`), so that a resumed run
    continues with it. With an anchor sampler it is the number of positives of the batch.

    Subclasses set the class attributes and implement the default of the box loss:
        head_name: entry of `compatibility.HEADS` and of `data.priors.sample_counts.PARTS`.
        initial_normalizer: positives that the normaliser starts with.

    Args:
        cls_loss: sigmoid classification loss; None is the stock loss.
        box_loss: box loss; None is the stock loss.
        reweighters: modules that weight samples.
        cls_weight: factor of the classification loss.
        box_weight: factor of the box loss.
        guided: scales the classification loss to the size of the box loss; None leaves it.
        anchor_sampler: keeps some anchors by their classification loss; None keeps all.
        prior: counts that set the initial bias of the classifier; None leaves that of the head.
        class_thresholds: whether the counts also set a score threshold for each class at test time;
            or K thresholds.
        image_labels: turns the inputs' LVIS image-level labels into a mask; None gives no mask.
        ignore_ioa: background anchors of which a region of the input's `ignore_boxes` holds that
            fraction of the area do not count, in (0, 1].
        calibration: changes the class logits at test time, see `build_calibration`; None is off.
        calibration_name: what `calibration` is, as `Parts` has it.
        test_nms: arguments of `soft_nms` at test time; None is Detectron2's suppression.
        **kwargs: as Detectron2's class.

    Raises:
        ValueError: the losses and settings cannot work together.
    """

    head_name: str
    initial_normalizer: float
    # of Detectron2's classes
    num_classes: int
    head: Any
    anchor_generator: Any
    box2box_transform: Any
    label_anchors: Callable[..., tuple[list[Tensor], list[Tensor]]]
    _transpose_dense_predictions: Callable[..., list[list[Tensor]]]
    focal_loss_alpha: float
    focal_loss_gamma: float

    reweighters: nn.ModuleList
    normalizer: Normalizer

    @configurable
    def __init__(
        self,
        *,
        cls_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        reweighters: nn.ModuleList | None = None,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        guided: GuidedScale | None = None,
        anchor_sampler: AnchorSampler | None = None,
        prior: ForegroundPrior | None = None,
        class_thresholds: bool | Sequence[float] = False,
        image_labels: ImageLabels | None = None,
        ignore_ioa: float = 0.5,
        calibration: nn.Module | None = None,
        calibration_name: str = "",
        test_nms: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_ioa(ignore_ioa)
        self.ignore_ioa = ignore_ioa
        self.cls_loss = cls_loss or self.default_cls_loss()
        self.box_loss = box_loss or self.default_box_loss()
        self.reweighters = reweighters or nn.ModuleList()
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self.guided, self.anchor_sampler = guided, anchor_sampler
        self.image_labels = image_labels
        self.normalizer = (
            PositiveEMA(self.initial_normalizer) if anchor_sampler is None else ImagePositives()
        )
        check_pairing(
            self.head_name,
            self.cls_loss,
            self.box_loss,
            list(self.reweighters),
            guided=guided is not None,
            anchor_sampler=anchor_sampler,
            calibration=calibration_name,
        )
        self.calibration, self.test_nms = calibration, test_nms
        check_class_quantities(self.cls_loss, self.num_classes)
        if prior is not None:
            set_class_prior(self, self.head.cls_score, prior, self.head_name, self.num_classes)
        set_class_thresholds(self, class_thresholds, prior, self.head_name, self.num_classes)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        """As Detectron2's, on calibrated logits."""
        if self.calibration is not None:
            logits, *others = predictions
            predictions = [[self._calibrated(x) for x in logits], *others]
        detections: list[Instances] = super().forward_inference(  # type: ignore[misc]
            images, features, predictions
        )
        return detections

    def _calibrated(self, logits: Tensor) -> Tensor:
        """(N, A * K, H, W) calibrated logits of one level."""
        n, _, height, width = logits.shape
        assert self.calibration is not None
        split = logits.view(n, -1, self.num_classes, height, width).movedim(2, -1)
        calibrated: Tensor = self.calibration(split)
        return calibrated.movedim(-1, 2).reshape(logits.shape)

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """As Detectron2's, with `test_nms`."""
        if self.test_nms is None:
            stock: Instances = super().inference_single_image(  # type: ignore[misc]
                anchors, box_cls, box_delta, image_size
            )
            return stock
        found = self._decode_multi_level_predictions(  # type: ignore[operator]
            anchors,
            box_cls,
            box_delta,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        kept, scores = soft_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, **self.test_nms
        )
        detections: Instances = found[kept]
        detections.scores = scores
        return detections[: self.max_detections_per_image]

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_soft_nms(self.test_nms)
        if self.calibration is not None:
            raise ValueError(
                "MODEL.BALANCE.CALIBRATION of dense heads cannot be scripted; trace the model."
            )
        return super().__prepare_scriptable__()

    def default_cls_loss(self) -> ClassificationLoss:
        """Detectron2's classification loss of these models as one of ours."""
        return FocalLoss(alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma)

    def default_box_loss(self) -> BoxLoss:
        """Detectron2's box loss of this model as one of ours."""
        raise NotImplementedError

    @property
    def loss_normalizer(self) -> Tensor:
        """0-d moving average of the number of positives of all ranks."""
        return self.normalizer.get_buffer("loss_normalizer")

    @torch.no_grad()
    def match_anchors(
        self,
        anchors: list[Boxes],
        gt_instances: list[Instances],
        regions: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Labels, matched boxes and the matched object's id of every anchor.

        Background anchors inside one of the (M, 4) ignore regions of their image get label -1.

        Returns:
            N label vectors (A,), N box tensors (A, 4), and ids (N, A), unique over the batch.
        """
        number_objects(gt_instances)
        ids, boxes = self.label_anchors(anchors, ids_as_classes(gt_instances, self.num_classes))
        labels, index = classes_of_ids(torch.stack(ids), gt_instances, self.num_classes)
        if regions is not None:
            every = Boxes.cat(anchors)
            ioa = self.ignore_ioa
            labels = torch.stack(
                ignore_background(list(labels), every, regions, self.num_classes, ioa)
            )
        return list(labels), boxes, index

    def matched_samples(
        self,
        images: ImageList,
        features: list[Tensor],
        pred_logits: list[Tensor],
        pred_deltas: list[Tensor],
        gt_instances: list[Instances],
    ) -> tuple[Samples, Tensor]:
        """Match the objects of a batch to the anchors, and gather the samples with their ids.

        Args:
            images: as `preprocess_image` returns them.
            features: feature maps, one per level.
            pred_logits: per level (N, A_l, K).
            pred_deltas: per level (N, A_l, 4).
            gt_instances: N sets of objects.

        Returns:
            Samples, and (N, A) bool: the anchors that are its positives.
        """
        anchors = self.anchor_generator(features)
        regions = getattr(images, "ignore_boxes", None)
        labels, gt_boxes, gt_index = self.match_anchors(anchors, gt_instances, regions)
        known = {name: getattr(images, name, None) for name in ("verified", "not_exhaustive")}
        samples = self.samples(
            anchors, pred_logits, labels, pred_deltas, gt_boxes, gt_index, **known
        )
        return samples, self.positives(labels)

    def positives(self, gt_labels: list[Tensor]) -> Tensor:
        """(N, A) bool of N label vectors (A,) in {-1, 0, ..., K}."""
        labels = torch.stack(gt_labels)
        return (labels >= 0) & (labels != self.num_classes)

    def samples(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        gt_index: Tensor | None = None,
        verified: Tensor | None = None,
        not_exhaustive: Tensor | None = None,
    ) -> Samples:
        """See `anchor_samples`; `gt_labels` are N vectors (A,)."""
        return anchor_samples(
            anchors,
            pred_logits,
            torch.stack(gt_labels),
            pred_deltas,
            gt_boxes,
            num_classes=self.num_classes,
            box_transform=self.box2box_transform,
            gt_index=gt_index,
            verified=verified,
            not_exhaustive=not_exhaustive,
        )
