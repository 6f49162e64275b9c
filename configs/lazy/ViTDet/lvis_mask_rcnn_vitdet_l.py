"""Mask R-CNN with ViT-L and federated loss on LVIS v1."""

from detectron2.config import LazyCall as L

from d2_balance.engine import balance_model
from d2_balance.losses import FederatedLoss

from ..common.vitdet import (
    _LVIS_IMAGES,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
    use_lvis,
    use_size,
)

use_size("L", model, optimizer, train, lr_multiplier, _LVIS_IMAGES)
use_lvis(dataloader, optimizer)
balance_model(
    model,
    "lvis_v1_train",
    num_classes=1203,
    cls_loss=L(FederatedLoss)(num_sampled=50, power=0.5),
    test_score_thresh=0.02,
    test_topk_per_image=300,
)
train.output_dir = "output/mask_rcnn_vitdet_l_lvis"
