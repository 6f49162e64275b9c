"""The COCO file of FCOS is Detectron2's lazy config fcos_R_50_FPN_1x.py."""

from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model

from d2_balance.engine import read_config
from d2_balance.losses import FocalLoss
from d2_balance.losses.iou import GIoULoss

FILE = Path(__file__).parents[2] / "configs/COCO-Detection/fcos_R_50_FPN_1x_focal.yaml"


@pytest.fixture(scope="module")
def lazy():
    return model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")


@pytest.fixture(scope="module")
def cfg():
    cfg = read_config(str(FILE))
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = "cpu", ()
    return cfg


def test_model_has_the_weights_and_the_settings_of_the_lazy_config(lazy, cfg):
    stock, ours = instantiate(lazy.model), build_model(cfg)
    expected = {name: value.shape for name, value in stock.state_dict().items()}
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes.pop("normalizer.loss_normalizer") == ()
    assert shapes == expected
    trained = {name for name, value in stock.named_parameters() if value.requires_grad}
    assert {name for name, value in ours.named_parameters() if value.requires_grad} == trained
    assert (ours.head.cls_score.bias == stock.head.cls_score.bias).all()  # the prior
    assert (ours.pixel_std == stock.pixel_std).all() and (ours.pixel_mean == stock.pixel_mean).all()
    for name in (
        "num_classes",
        "center_sampling_radius",
        "test_score_thresh",
        "test_topk_candidates",
        "test_nms_thresh",
        "max_detections_per_image",
    ):
        assert getattr(ours, name) == getattr(stock, name), name
    assert isinstance(ours.cls_loss, FocalLoss) and isinstance(ours.box_loss, GIoULoss)
    assert (ours.cls_loss.alpha, ours.cls_loss.gamma) == (
        stock.focal_loss_alpha,
        stock.focal_loss_gamma,
    )
    assert list(ours.head_in_features) == list(stock.head_in_features)


def test_schedule_and_data_are_those_of_the_lazy_config(lazy, cfg):
    solver, data = cfg.SOLVER, lazy.dataloader
    assert lazy.optimizer.lr == solver.BASE_LR
    assert (
        lazy.optimizer.momentum,
        lazy.optimizer.weight_decay,
    ) == (solver.MOMENTUM, solver.WEIGHT_DECAY)
    assert lazy.optimizer.params.weight_decay_norm == solver.WEIGHT_DECAY_NORM
    assert (
        data.train.total_batch_size,
        lazy.train.max_iter,
    ) == (solver.IMS_PER_BATCH, solver.MAX_ITER)
    multiplier = lazy.lr_multiplier
    assert multiplier.scheduler.milestones[:2] == list(solver.STEPS)
    assert multiplier.warmup_length == solver.WARMUP_ITERS / solver.MAX_ITER
    resize = data.train.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST
    assert data.test.mapper.augmentations[0].short_edge_length == cfg.INPUT.MIN_SIZE_TEST
    assert data.train.mapper.image_format == cfg.INPUT.FORMAT
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
