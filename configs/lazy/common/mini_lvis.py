"""The built-in set mini_lvis, and a schedule of 40 iterations, for CPU minutes."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch.optim import SGD

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="mini_lvis_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=(96, 128), max_size=160, sample_style="choice"
                ),
                L(T.RandomFlip)(),
            ],
            image_format="BGR",
            use_instance_mask=False,
        ),
        total_batch_size=4,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="mini_lvis_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=128, max_size=160)],
            image_format="BGR",
        ),
        num_workers=0,
    ),
)
optimizer = L(SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[30], num_updates=40),
    warmup_factor=0.001,
    warmup_length=10 / 40,
    warmup_method="linear",
)
train = dict(max_iter=40, seed=1, init_checkpoint="", output_dir="output/lazy", device="cuda")
# keys under their names in YAML
run = dict(SOLVER=dict(CLIP_GRADIENTS=dict(ENABLED=True, CLIP_TYPE="norm", CLIP_VALUE=10.0)))
