"""A small RetinaNet with focal loss on the built-in set."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2_balance.losses import FocalLoss
from d2_balance.modeling import BalancedRetinaNet

from .common.mini_lvis import dataloader, lr_multiplier, optimizer, run, train

model = model_zoo.get_config("common/models/retinanet.py").model
model._target_ = BalancedRetinaNet
model.num_classes = 30
model.cls_loss = L(FocalLoss)(alpha=0.25, gamma=2.0)

bottom_up = model.backbone.bottom_up
bottom_up.stem.norm = bottom_up.stages.norm = "BN"
bottom_up.stages.depth = 18
del bottom_up.stages.stride_in_1x1  # the blocks of depth 18 have no 1 x 1
model.backbone.update(out_channels=64, norm="GN")
model.backbone.top_block.in_channels = 512
model.anchor_generator.sizes = [[16], [32], [48], [64], [96]]
model.head.update(
    input_shape=[ShapeSpec(channels=64)] * 5, conv_dims=[64], norm="GN", num_anchors=3
)
train.output_dir = "output/lazy_retinanet_focal"
