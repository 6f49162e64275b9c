"""RetinaNet with any dense loss of the package."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import ImageList, Instances
from torch import Tensor

from d2_balance.losses import BoxLoss

from ..build import stock_box_loss
from ..deformable import deformable_convolutions
from .dense import BalancedDense, loss_arguments


@META_ARCH_REGISTRY.register()
class BalancedRetinaNet(BalancedDense, RetinaNet):
    """RetinaNet whose losses come from MODEL.BALANCE; stock if the names are empty.

    The stock losses are focal loss and the `box_reg_loss_type` of Detectron2's RetinaNet. The
    arguments are those of `BalancedDense`, and of Detectron2's RetinaNet.
    """

    head_name = "RetinaNet"
    initial_normalizer = 100.0
    box_reg_loss_type: str
    smooth_l1_beta: float

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        with deformable_convolutions(cfg):
            ret: dict[str, Any] = super().from_config(cfg)
        return ret | loss_arguments(cfg, cfg.MODEL.RETINANET.NUM_CLASSES, cls.head_name)

    def default_box_loss(self) -> BoxLoss:
        return stock_box_loss(self.box_reg_loss_type, self.smooth_l1_beta)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        samples, _ = self.matched_samples(images, features, logits, deltas, gt_instances)
        return self.sample_losses(samples)

    def losses(self, *predictions: Any) -> dict[str, Tensor]:
        """As Detectron2's RetinaNet; without object ids and image-level labels."""
        return self.sample_losses(self.samples(*predictions))
