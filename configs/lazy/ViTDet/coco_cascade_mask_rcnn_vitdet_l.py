"""Cascade Mask R-CNN with ViT-L on COCO."""

from d2_balance.engine import balance_model

from ..common.vitdet import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
    use_cascade,
    use_size,
)

use_size("L", model, optimizer, train, lr_multiplier)
use_cascade(model)
balance_model(model, "coco_2017_train")
train.output_dir = "output/cascade_mask_rcnn_vitdet_l_coco"
