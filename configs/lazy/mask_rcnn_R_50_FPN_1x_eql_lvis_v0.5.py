"""Mask R-CNN R-50 FPN with EQL on LVIS v0.5, as configs/LVISv0.5-InstanceSegmentation has it."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2_balance.data import ImageLabels
from d2_balance.engine import dataset_quantity
from d2_balance.losses import EQLLoss
from d2_balance.modeling import BalancedFastRCNNOutputLayers, BalancedRCNN, BalancedStandardROIHeads

TRAIN, CLASSES = "lvis_v0.5_train", 1230

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model._target_ = BalancedRCNN
model.image_labels = L(ImageLabels)(dataset_names=[TRAIN], num_classes=CLASSES)
model.backbone.bottom_up.freeze_at = 2
heads = model.roi_heads
heads._target_ = BalancedStandardROIHeads
heads.num_classes = CLASSES
heads.box_predictor._target_ = BalancedFastRCNNOutputLayers
heads.box_predictor.update(test_score_thresh=0.0001, test_topk_per_image=300)
heads.box_predictor.cls_loss = L(EQLLoss)(
    class_frequency=L(dataset_quantity)(
        names=[TRAIN], num_classes=CLASSES, quantity="class_frequency"
    ),
    lambda_=0.00177,
    use_image_level_labels=False,
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = TRAIN
dataloader.test.dataset.names = "lvis_v0.5_val"
del dataloader.evaluator  # by dataset, with AP of groups
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy_mask_rcnn_eql_lvis"
