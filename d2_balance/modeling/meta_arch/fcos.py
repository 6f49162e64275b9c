"""FCOS with any dense loss of the package.

Source: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, arXiv:1904.01355, in the
form of arXiv:2006.09214, which Detectron2 has (centre sampling, GIoU, P6 and P7 from P5).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import ImageList, Instances
from torch import Tensor
from torch.nn import functional as F

from d2_balance.losses import BoxLoss, GIoULoss, Samples

from ..deformable import deformable_convolutions
from .dense import BalancedDense, loss_arguments


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet with an FPN whose P6 and P7 come from P5; RetinaNet's builder takes them from C5."""
    width = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=width,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(width, width, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@META_ARCH_REGISTRY.register()
class BalancedFCOS(BalancedDense, FCOS):
    """FCOS whose losses come from MODEL.BALANCE; stock (focal and GIoU) if the names are empty.

    Box deltas are the distances from the anchor point to the four sides in units of the level's
    stride, all above 0 in the targets. The transform has no weights to take off: for losses with
    `unit_weights`, such as GHM-R, the unit is the stride, where RetinaNet's is the anchor. A stock
    anchor is 4 strides wide, so that the same error in pixels is 4 times as large here. Losses on
    deltas see the raw predictions; decoding cuts them at 0, and losses on boxes have no gradient
    below that.

    The losses see every anchor point but background in ignore regions: FCOS itself ignores none.
    The centerness is trained as Detectron2 does, under every loss; at test time the score is the
    root of class score times centerness.

    The arguments are those of `BalancedDense`, and of Detectron2's FCOS.
    """

    head_name = "FCOS"
    initial_normalizer = 300.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor arguments from MODEL.FCOS and MODEL.BALANCE.

        Raises:
            ValueError: naming the key and what it must be.
        """
        node = cfg.MODEL.FCOS
        if not node.CENTER_SAMPLING_RADIUS > 0:
            raise ValueError(
                f"MODEL.FCOS.CENTER_SAMPLING_RADIUS is {node.CENTER_SAMPLING_RADIUS}; must be a "
                "number of strides above 0."
            )
        with deformable_convolutions(cfg):
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        unknown = [name for name in node.IN_FEATURES if name not in shapes]
        if unknown or not node.IN_FEATURES:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES is {node.IN_FEATURES}; must be some of "
                f"{', '.join(shapes)}, the outputs of the backbone."
            )
        inputs = [shapes[name] for name in node.IN_FEATURES]
        head = FCOSHead(
            input_shape=inputs,
            num_classes=node.NUM_CLASSES,
            conv_dims=[inputs[0].channels] * node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **loss_arguments(cfg, node.NUM_CLASSES, cls.head_name),
        }

    def default_box_loss(self) -> BoxLoss:
        return GIoULoss()

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        logits, deltas, centerness = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4, 1]
        )
        samples, positive = self.matched_samples(images, features, logits, deltas, gt_instances)
        return self.losses_with_centerness(samples, centerness, positive)

    def losses(self, *predictions: Any) -> dict[str, Tensor]:
        """As Detectron2's FCOS; without object ids and image-level labels."""
        *of_samples, centerness = predictions
        positive = self.positives(of_samples[2])  # of the labels
        return self.losses_with_centerness(self.samples(*of_samples), centerness, positive)

    def losses_with_centerness(
        self, samples: Samples, centerness: list[Tensor], positive: Tensor
    ) -> dict[str, Tensor]:
        """The losses of a batch under Detectron2's names.

        Args:
            samples: anchor points of the batch that are not ignored, image by image.
            centerness: per level (N, A_l, 1) logits.
            positive: (N, A) bool, the anchor points that are the positives of `samples`.

        Returns:
            "loss_fcos_cls", "loss_fcos_loc" and "loss_fcos_ctr", 0-d tensors with gradient.
        """
        losses = self.sample_losses(samples)
        logits = torch.cat(centerness, dim=1).squeeze(2)[positive]  # (P,)
        target = centerness_targets(samples.target_deltas)
        logits = logits.to(target.dtype)  # half precision is raised
        total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return {
            "loss_fcos_cls": losses["loss_cls"],
            "loss_fcos_loc": losses["loss_box_reg"],
            "loss_fcos_ctr": total / self.normalizer.value().to(total.dtype),
        }


def centerness_targets(deltas: Tensor) -> Tensor:
    """How close points are to the centres of their boxes (arXiv:1904.01355, equation 3).

    Args:
        deltas: (P, 4) distances to the left, upper, right and lower side, above 0.

    Returns:
        (P,) in (0, 1], 1 in the centre.
    """
    near, far = (f(deltas[:, :2], deltas[:, 2:]) for f in (torch.minimum, torch.maximum))
    return (near / far).prod(dim=1).sqrt()
