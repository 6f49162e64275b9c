"""GHM in place of focal loss and smooth L1."""

from detectron2.config import LazyCall as L

from d2_balance.losses import GHMCLoss, GHMRLoss

from .retinanet_R_18_focal_mini_lvis import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    run,
    train,
)

model.cls_loss = L(GHMCLoss)(per_level=True)
model.box_loss = L(GHMRLoss)()
model.box_weight = 10.0
train.output_dir = "output/lazy_retinanet_ghm"
