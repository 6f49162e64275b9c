"""A small Mask R-CNN with EQL on the built-in set."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2_balance.data import ImageLabels
from d2_balance.engine import dataset_quantity
from d2_balance.losses import EQLLoss
from d2_balance.modeling import BalancedFastRCNNOutputLayers, BalancedRCNN, BalancedStandardROIHeads

from .common.mini_lvis import dataloader, lr_multiplier, optimizer, run, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model._target_ = BalancedRCNN
model.image_labels = L(ImageLabels)(dataset_names=["mini_lvis_train"], num_classes=30)

bottom_up = model.backbone.bottom_up
bottom_up.stem.norm = bottom_up.stages.norm = "BN"
bottom_up.stages.depth = 18
del bottom_up.stages.stride_in_1x1  # the blocks of depth 18 have no 1 x 1
model.backbone.update(out_channels=64, norm="GN")

rpn = model.proposal_generator
rpn.anchor_generator.sizes = [[12], [24], [48], [72], [96]]
rpn.head.in_channels = 64
rpn.update(pre_nms_topk=(200, 100), post_nms_topk=(100, 50))

heads = model.roi_heads
heads._target_ = BalancedStandardROIHeads
heads.update(num_classes=30, batch_size_per_image=64)
heads.box_head.update(input_shape=ShapeSpec(channels=64, height=7, width=7), fc_dims=[128, 128])
heads.box_predictor._target_ = BalancedFastRCNNOutputLayers
heads.box_predictor.input_shape = ShapeSpec(channels=128)
heads.box_predictor.cls_loss = L(EQLLoss)(
    class_frequency=L(dataset_quantity)(
        names=["mini_lvis_train"], num_classes=30, quantity="class_frequency"
    ),
    lambda_=0.03,
)
heads.mask_head.update(input_shape=ShapeSpec(channels=64, height=14, width=14), conv_dims=[32, 32])
dataloader.train.mapper.use_instance_mask = True
optimizer.lr = 0.02
train.output_dir = "output/lazy_mask_rcnn_eql"
