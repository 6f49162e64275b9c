"""ViTDet: a plain vision transformer as the backbone of Mask R-CNN and Cascade Mask R-CNN.

Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection,
arXiv:2203.16527. Training as in its appendix A.2: images jittered in scale and cut to 1024 x 1024,
64 images a step, AdamW with a learning rate that falls from layer to layer, and 100 epochs of COCO
(75 for ViT-H). The transformers start from MAE (arXiv:2111.06377).
"""

import copy
from functools import partial

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from d2_balance.engine import balance_model
from d2_balance.losses import FederatedLoss

_SIDE, _BATCH, _COCO_IMAGES, _LVIS_IMAGES = 1024, 64, 118_000, 100_170

# channels, blocks, heads, drop path rate, decay of the learning rate by layer, epochs, MAE weights
_SIZES = {
    "B": (768, 12, 12, 0.1, 0.7, 100, "mae_pretrain_vit_base.pth"),
    "L": (1024, 24, 16, 0.4, 0.8, 100, "mae_pretrain_vit_large.pth"),
    "H": (1280, 32, 16, 0.5, 0.9, 75, "mae_pretrain_vit_huge_p14to16.pth"),
}

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").AdamW
train = model_zoo.get_config("common/train.py").train

dataloader.train.total_batch_size = _BATCH
dataloader.train.mapper.update(
    image_format="RGB",
    recompute_boxes=True,  # the cut changes the objects
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=_SIDE, target_width=_SIDE),
        L(T.FixedSizeCrop)(crop_size=(_SIDE, _SIDE), pad=False),
    ],
)
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=_SIDE, max_size=_SIDE)
]
del dataloader.evaluator  # by dataset, with AP of groups

train.amp.enabled = True
train.ddp.fp16_compression = True
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01]),
    warmup_factor=0.001,
)


def vitdet(size, dataset, *, cascade=False):
    """Return model, dataloader, optimizer, lr_multiplier and train of one of the models.

    Args:
        size: transformer, "B", "L" or "H".
        dataset: "coco", or "lvis" (v1) with federated loss.
        cascade: True makes a Cascade Mask R-CNN.
    """
    _set_size(size, _LVIS_IMAGES if dataset == "lvis" else _COCO_IMAGES)
    if cascade:
        _make_cascade()
    if dataset == "lvis":
        _use_lvis()
        loss = L(FederatedLoss)(num_sampled=50, power=0.5)
        settings = {"num_classes": 1203, "test_score_thresh": 0.02, "test_topk_per_image": 300}
        balance_model(model, "lvis_v1_train", cls_loss=loss, **settings)
    else:
        balance_model(model, "coco_2017_train")
    name = "cascade_mask_rcnn" if cascade else "mask_rcnn"
    train.output_dir = f"output/{name}_vitdet_{size.lower()}_{dataset}"
    return model, dataloader, optimizer, lr_multiplier, train


def _set_size(name, images):
    """Set the transformer and the length of the training."""
    width, blocks, heads, drop_path, decay, epochs, weights = _SIZES[name]
    net, quarter = model.backbone.net, blocks // 4
    net.update(embed_dim=width, depth=blocks, num_heads=heads, drop_path_rate=drop_path)
    # the last block of each quarter sees the whole image, the others windows of 14 x 14
    net.window_block_indexes = [i for i in range(blocks) if (i + 1) % quarter]
    optimizer.params.lr_factor_func = partial(
        get_vit_lr_decay_rate, lr_decay_rate=decay, num_layers=blocks
    )
    optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
    train.init_checkpoint = (
        f"detectron2://ImageNetPretrained/MAE/{weights}?matching_heuristics=True"
    )
    train.max_iter = round(epochs * images / _BATCH)
    lr_multiplier.scheduler.milestones = [
        round(0.889 * train.max_iter),
        round(0.963 * train.max_iter),
    ]
    lr_multiplier.scheduler.num_updates = train.max_iter
    lr_multiplier.warmup_length = 250 / train.max_iter


def _make_cascade():
    """Make three stages of the box head, at an IoU of 0.5, 0.6 and 0.7."""
    heads = model.roi_heads
    box_head, predictor = heads.pop("box_head"), heads.pop("box_predictor")
    del heads.proposal_matcher
    predictor.update(cls_agnostic_bbox_reg=True, num_classes="${...num_classes}")
    heads._target_ = CascadeROIHeads
    heads.box_heads = [copy.deepcopy(box_head) for _ in range(3)]
    heads.box_predictors = [copy.deepcopy(predictor) for _ in range(3)]
    for stage, (centre, size) in zip(
        heads.box_predictors, ((10, 5), (20, 10), (30, 15)), strict=True
    ):
        stage.box2box_transform = L(Box2BoxTransform)(weights=(centre, centre, size, size))
    heads.proposal_matchers = [
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ]


def _use_lvis():
    """Train on LVIS v1: images of rare classes are repeated, with twice COCO's learning rate."""
    dataloader.train.dataset.names, dataloader.test.dataset.names = "lvis_v1_train", "lvis_v1_val"
    dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
        repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
            dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
        )
    )
    optimizer.lr = 2e-4
