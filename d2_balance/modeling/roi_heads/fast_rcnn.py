"""Fast R-CNN's output layers with any classification and box loss of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
    fast_rcnn_inference,
)
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2_balance.data.model_classes import ACTIVATIONS, fill_metadata
from d2_balance.data.priors.foreground import ForegroundPrior
from d2_balance.data.priors.sample_counts import ROI_HEADS
from d2_balance.losses import BoxLoss, ClassificationLoss, Samples, SoftmaxCELoss
from d2_balance.losses._base import per_sample
from d2_balance.reweight import GuidedScale

from ..build import (
    build_box_loss,
    build_calibration,
    build_cls_loss,
    build_guided,
    build_reweighters,
    build_test_nms,
    calibration_name,
    check_class_quantities,
    class_quantity,
    classifier_arguments,
    stock_box_loss,
)
from ..compatibility import check_pairing
from ..criterion import LossHead, PositiveNormalizer, SampleNormalizer, box_inputs
from ..postprocess.norcal import norcal
from ..postprocess.soft_nms import refuse_soft_nms, soft_nms_detections
from ..prior_init import (
    load_prior,
    set_class_prior,
    set_class_thresholds,
    set_softmax_prior,
    wanted_thresholds,
)
from ..scripting import Scriptable, without_attributes
from .cosine import CosineLinear
from .disalign import DisAlign
from .feature_memory import FeatureMemory


class BalancedFastRCNNOutputLayers(LossHead, Scriptable, FastRCNNOutputLayers):
    """Output layers whose losses come from MODEL.BALANCE; stock if the names are empty.

    Losses without a softmax start every class at `prior_prob`: with a bias of zero the first
    sigmoid loss is K log 2 per RoI, 834 for the 1203 classes of LVIS v1.

    Args:
        input_shape: shape of the RoI features.
        cls_loss: classification loss; None is softmax cross-entropy.
        box_loss: box loss; None is the stock `box_reg_loss_type`.
        reweighters: modules that weight samples.
        cls_weight: factor of the classification loss.
        box_weight: factor of the box loss.
        guided: scales the classification loss to the box loss, which then is a mean over positives
            (as is the classification loss, whose own scale drops out); None leaves it.
        prior_prob: initial probability of every class outside of a softmax, in (0, 1).
        prior: counts that set the initial bias instead of prior_prob, of softmax losses as well.
        class_thresholds: whether the counts also set a score threshold for each class at test time;
            or K thresholds.
        norcal_gamma: exponent of the calibration at test time (see `norcal`), 0 is off.
        class_count: (K,) training images of each class, needed if norcal_gamma is above 0.
        calibration: changes the class logits at test time, see `build_calibration`; None is off.
        calibration_name: what `calibration` is, as `Parts` has it.
        classifier: "linear" or "cosine", see `CosineLinear`.
        cosine: arguments of the cosine classifier.
        disalign: whether the class logits of a trained model are aligned, see `DisAlign`.
        test_nms: arguments of `soft_nms` at test time; None is Detectron2's suppression.
        background_column: True keeps Detectron2's K + 1 outputs outside of a softmax, the last of
            which is not used; False has K outputs.
        **kwargs: as Detectron2's FastRCNNOutputLayers.

    Raises:
        ValueError: the losses and settings cannot work together, or prior_prob is out of range.
    """

    cls_score: Any  # of Detectron2's class, or ours
    training_only = (*LossHead.training_only, "memory")

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        cls_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        reweighters: nn.ModuleList | None = None,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        guided: GuidedScale | None = None,
        prior_prob: float = 0.001,
        prior: ForegroundPrior | None = None,
        class_thresholds: bool | Sequence[float] = False,
        background_column: bool = True,
        norcal_gamma: float = 0.0,
        class_count: Tensor | None = None,
        calibration: nn.Module | None = None,
        calibration_name: str = "",
        classifier: str = "linear",
        cosine: Mapping[str, Any] | None = None,
        disalign: bool = False,
        test_nms: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if self.use_sigmoid_ce or self.use_fed_loss:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE and USE_FED_LOSS choose a loss of Detectron2; "
                "set both to False and name the loss in MODEL.BALANCE.CLS_LOSS (SigmoidCE)."
            )
        self.cls_loss = cls_loss or SoftmaxCELoss()
        self.box_loss = box_loss or stock_box_loss(self.box_reg_loss_type, self.smooth_l1_beta)
        self.reweighters = reweighters or nn.ModuleList()
        self.cls_weight = cls_weight
        self.box_weight = box_weight * self.loss_weight.get("loss_box_reg", 1.0)
        self.guided, self.anchor_sampler = guided, None
        self.normalizer = SampleNormalizer() if guided is None else PositiveNormalizer()
        # image-level labels of the batch, set by the RoI heads
        self.verified: Tensor | None = None
        self.not_exhaustive: Tensor | None = None
        self.memory: FeatureMemory | None = None  # see `build_memories`
        softmax = self.cls_loss.activation == "softmax"
        check_pairing(
            "RoI heads",
            self.cls_loss,
            self.box_loss,
            list(self.reweighters),
            guided=guided is not None,
            calibration=calibration_name or ("norcal" if norcal_gamma else ""),
        )
        check_class_quantities(self.cls_loss, self.num_classes)
        outputs = self.cls_loss.num_outputs(self.num_classes)
        if not softmax and background_column:
            outputs = max(outputs, self.num_classes + 1)
        self._set_classifier(outputs, classifier, cosine or {})
        self.align = DisAlign(self.cls_score.in_features, self.num_classes) if disalign else None
        self.calibration, self.test_nms = calibration, test_nms
        if not softmax:
            if not 0 < prior_prob < 1:
                raise ValueError(f"MODEL.BALANCE.PRIOR_PROB: {prior_prob} is not in (0, 1).")
            nn.init.constant_(self.cls_score.bias, self.cls_loss.logit(prior_prob))
        if prior is not None and softmax:
            set_softmax_prior(self, self.cls_score, prior, ROI_HEADS, self.num_classes)
        elif prior is not None:
            arguments = (prior, ROI_HEADS, self.num_classes, self.cls_loss.logit)
            set_class_prior(self, self.cls_score, *arguments)
        set_class_thresholds(self, class_thresholds, prior, ROI_HEADS, self.num_classes)

        # see `_load_from_state_dict`; the name is that of versions with two kinds of scores
        form = torch.tensor(ACTIVATIONS.index(self.cls_loss.activation), dtype=torch.uint8)
        self.register_buffer("sigmoid_scores", form)
        self._other_scores = ""
        self.norcal_gamma = norcal_gamma
        if norcal_gamma < 0:
            raise ValueError(
                f"MODEL.BALANCE.NORCAL.GAMMA is {norcal_gamma}; must be a number of at least 0."
            )
        if norcal_gamma:
            # of this dataset, not of the run whose weights are loaded
            self.register_buffer("class_count", class_count, persistent=False)

    def _set_classifier(self, outputs: int, classifier: str, cosine: Mapping[str, Any]) -> None:
        features = self.cls_score.in_features
        if classifier == "cosine":
            self.cls_score = CosineLinear(features, outputs, **cosine)
        elif outputs != self.cls_score.out_features:
            self.cls_score = nn.Linear(features, outputs)
            nn.init.normal_(self.cls_score.weight, std=0.01)
            nn.init.zeros_(self.cls_score.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        ret: dict[str, Any] = super().from_config(cfg, input_shape)
        fill_metadata(cfg)
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        ret["cls_loss"] = build_cls_loss(cfg, num_classes)
        ret["box_loss"] = build_box_loss(cfg, num_classes)
        ret["reweighters"] = build_reweighters(cfg, num_classes)
        ret["cls_weight"] = cfg.MODEL.BALANCE.CLS_LOSS_WEIGHT
        ret["box_weight"] = cfg.MODEL.BALANCE.BOX_LOSS_WEIGHT
        ret["guided"] = build_guided(cfg)
        ret["prior_prob"] = cfg.MODEL.BALANCE.PRIOR_PROB
        ret["prior"] = load_prior(cfg)
        ret["class_thresholds"] = wanted_thresholds(cfg, ret["prior"])
        ret["background_column"] = cfg.MODEL.BALANCE.BACKGROUND_COLUMN
        ret["norcal_gamma"] = cfg.MODEL.BALANCE.NORCAL.GAMMA
        activation = "softmax" if ret["cls_loss"] is None else ret["cls_loss"].activation
        if ret["norcal_gamma"] > 0 and activation == "sigmoid":
            ret["norcal_gamma"] = 0.0  # `calibration` includes it
        ret["calibration"] = build_calibration(cfg, num_classes, activation)
        ret["calibration_name"] = calibration_name(cfg)
        ret |= classifier_arguments(cfg)
        ret["disalign"] = cfg.MODEL.BALANCE.DISALIGN
        ret["test_nms"] = build_test_nms(cfg)
        if ret["norcal_gamma"] > 0:
            ret["class_count"] = class_quantity(cfg, "class_count", num_classes)
        return ret

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Notice weights that were trained for other scores; weights of others do not tell."""
        key = prefix + "sigmoid_scores"
        own: Tensor = self.sigmoid_scores
        trained = ACTIVATIONS[int(state_dict.get(key, own))]
        self._other_scores = "" if trained == self.cls_loss.activation else trained
        state_dict[key] = own.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def class_logits(self, scores: Tensor) -> Tensor:
        """The columns of (R, C) scores that the loss uses."""
        return scores[:, : self.cls_loss.num_outputs(self.num_classes)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (R, C) and deltas (R, 4) or (R, K * 4); the memory keeps those of its samples."""
        scores, deltas = super().forward(x)
        if self.align is not None:
            scores = self.align(scores, x.flatten(1))
        return (scores, deltas) if self.memory is None else self.memory.split(scores, deltas)

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Same arguments and result as Detectron2's FastRCNNOutputLayers."""
        self._other_scores = ""  # the weights are trained for ours from here on
        samples = self.samples(predictions, proposals)
        if self.cls_loss.activation == "softmax":
            guess = self.cls_loss.probabilities(samples.logits)
        else:  # a sample counts as background if all classes have scores below 0.5
            half = self.cls_loss.logit(0.5)
            guess = F.pad(samples.logits[:, : self.num_classes], (0, 1), value=half)
        _log_classification_stats(guess.detach(), samples.labels)
        losses = self.sample_losses(samples if self.memory is None else self.memory.join(samples))
        if self.memory is not None:
            self.memory.remember(samples)
        return losses

    @torch.no_grad()
    def losses_per_sample(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted losses of every proposal, to choose from; no state changes.

        Args:
            predictions: as in `losses`.
            proposals: as in `losses`.

        Returns:
            Classification loss (R,), and box loss (R,), which is 0 for background.
        """
        samples = self.samples(predictions, proposals).upcast()
        cls = per_sample(self.cls_loss.compute(samples))
        positive = per_sample(self.box_loss.compute(*box_inputs(samples, self.box_loss)))
        box = positive.new_zeros(len(cls)).index_copy(0, samples.pos, positive)
        return self.cls_weight * cls, self.box_weight * box

    def samples(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> Samples:
        """Gather the sampled proposals of a batch.

        Args:
            predictions: scores (R, C) and deltas (R, 4) or (R, K * 4).
            proposals: per image, with `proposal_boxes`, `gt_classes` and, if the image has
                objects, `gt_boxes`; `gt_index` if the heads set it.

        Returns:
            R samples, image by image.
        """
        scores, deltas = predictions
        device = scores.device
        if not len(proposals):
            proposals = [Instances((0, 0), gt_classes=torch.empty(0, device=device).long())]
            boxes = gt_boxes = deltas.new_empty((0, 4))
        else:
            boxes = cat([p.proposal_boxes.tensor for p in proposals])  # (R, 4)
            # an image without objects has no gt_boxes, and no positives that would need them
            gt_boxes = cat(
                [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
            )
        labels = cat([p.gt_classes for p in proposals])  # (R,)
        image = cat([labels.new_full((len(p),), i) for i, p in enumerate(proposals)])
        pos = (labels < self.num_classes).nonzero().squeeze(1)  # (P,)
        # torch cannot infer a size by -1 if R is 0
        deltas = deltas.view(len(deltas), deltas.shape[1] // 4, 4)  # (R, 1 or K, 4)
        column = labels[pos] if deltas.shape[1] > 1 else torch.zeros_like(pos)
        weight = None
        if any(p.has("sample_weight") for p in proposals):
            weight = cat([p.sample_weight for p in proposals])
        ids = None
        if any(p.has("gt_index") for p in proposals):
            index = [p.gt_index if p.has("gt_index") else p.gt_classes for p in proposals]
            ids = cat(index)[pos]
        return Samples(
            logits=self.class_logits(scores),
            labels=labels,
            num_classes=self.num_classes,
            image_index=image,
            num_images=len(proposals),
            sample_weight=weight,
            verified=self.verified,
            not_exhaustive=self.not_exhaustive,
            pred_deltas=deltas[pos, column],
            boxes=boxes[pos],
            gt_boxes=gt_boxes[pos],
            gt_index=ids,
            box_transform=self.box2box_transform,
        )

    def probabilities(self, scores: Tensor) -> Tensor:
        """(R, K + 1) class probabilities, the last column background, of (R, C) scores.

        Raises:
            ValueError: the loaded weights were trained with other scores than the loss has.
        """
        if self._other_scores:
            raise ValueError(
                f"the weights were trained for {self._other_scores} scores and "
                f"MODEL.BALANCE.CLS_LOSS {self.cls_loss.name} has {self.cls_loss.activation} "
                "scores; set the CLS_LOSS that they were trained with."
            )
        logits = self.class_logits(scores)
        if self.calibration is not None:
            classes, others = logits[:, : self.num_classes], logits[:, self.num_classes :]
            logits = torch.cat([self.calibration(classes.float()), others.float()], dim=1)
        probs = self.cls_loss.probabilities(logits)
        if self.norcal_gamma:
            probs = norcal(probs, self.class_count, self.norcal_gamma)
        return probs

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """As Detectron2's, with `test_nms`."""
        boxes = self.predict_boxes(predictions, proposals)
        scores = self.predict_probs(predictions, proposals)
        return self.detections(boxes, scores, [p.image_size for p in proposals])

    def detections(
        self, boxes: Sequence[Tensor], scores: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Suppress overlapping boxes and keep the best; arguments as `fast_rcnn_inference`."""
        settings = self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image
        if self.test_nms is None:
            instances, kept = fast_rcnn_inference(boxes, scores, sizes, *settings)
            return instances, kept
        threshold, _, limit = settings
        results = [
            soft_nms_detections(b, s, size, threshold, limit, **self.test_nms)
            for b, s, size in zip(boxes, scores, sizes, strict=True)
        ]
        return [instances for instances, _ in results], [kept for _, kept in results]

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        """Class probabilities, (R_i, K + 1) for each image, the last column background."""
        # len() would turn the numbers of the traced image into constants of an exported model
        sizes = [p.__len__() for p in proposals]
        return list(self.probabilities(predictions[0]).split(sizes))

    def __prepare_scriptable__(self) -> nn.Module:
        if self.align is not None:
            raise ValueError("MODEL.BALANCE.DISALIGN True cannot be scripted; trace the model.")
        refuse_soft_nms(self.test_nms)
        copied = without_attributes(self, self.training_only, _ScriptedOutputLayers)
        # losses with outputs of their own compute scores in ways that TorchScript cannot read
        example = torch.randn(3, self.cls_score.out_features, device=self.cls_score.weight.device)
        copied.probabilities = torch.jit.trace(_Probabilities(self), example)
        return copied


class _Probabilities(nn.Module):
    def __init__(self, layers: BalancedFastRCNNOutputLayers) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, scores: Tensor) -> Tensor:
        return self.layers.probabilities(scores)


class _ScriptedOutputLayers(FastRCNNOutputLayers):
    """What TorchScript compiles instead of `BalancedFastRCNNOutputLayers`."""

    def predict_probs(
        self,
        predictions: tuple[Tensor, Tensor],
        proposals: list[Instances],
    ) -> list[Tensor]:
        probabilities: Tensor = self.probabilities(predictions[0])
        split: list[Tensor] = probabilities.split([len(p) for p in proposals], dim=0)
        return split
