"""Checkpoints of stock Detectron2 with 80 classes go on learning other classes of real images."""

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2_balance.data import register_from_config
from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.setup.pretrained import LOADED, SHAPE

ROOT = Path(__file__).parents[2]
DATA = (ROOT / "../shared/data").resolve()
STOCK = {
    "BalancedRetinaNet": "RetinaNet",
    "BalancedRCNN": "GeneralizedRCNN",
    "BalancedStandardROIHeads": "StandardROIHeads",
}
RETINANET = "configs/bccd/retinanet_R_18_focal.yaml"
MASK = "configs/tiny_coco/mask_rcnn_R_18_eql.yaml"
BCCD = [
    ["fine_tune_train", str(DATA / "bccd/instances_train.json"), str(DATA / "bccd/images")],
    ["fine_tune_val", str(DATA / "bccd/instances_val.json"), str(DATA / "bccd/images")],
]
TINY = [
    ["fine_tune_train", str(DATA / "tiny_coco/lvis_style_train.json"), str(DATA / "tiny_coco")],
    ["fine_tune_val", str(DATA / "tiny_coco/lvis_style_val.json"), str(DATA / "tiny_coco")],
]
# the tensors whose shape depends on the number of classes
DENSE = {"head.cls_score.weight", "head.cls_score.bias"}
ROI = {
    f"roi_heads.{layer}.{tensor}"
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    for tensor in ("weight", "bias")
}


@pytest.fixture
def unregister():
    yield
    for name in ("fine_tune_train", "fine_tune_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def stock_cfg(cfg):
    """The same model as Detectron2 has it, with 80 classes."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = STOCK[cfg.MODEL.META_ARCHITECTURE]
    cfg.MODEL.ROI_HEADS.NAME = STOCK.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    return cfg


@pytest.mark.parametrize(
    ("config", "data", "classes", "with_classes"),
    [(RETINANET, BCCD, 3, DENSE), (RETINANET, TINY, 49, DENSE), (MASK, TINY, 49, ROI)],
    ids=["retinanet-bccd", "retinanet-tiny_coco", "mask-tiny_coco"],
)
def test_a_stock_checkpoint_is_fine_tuned(
    unregister, tmp_path, caplog, config, data, classes, with_classes
):
    if not DATA.exists():
        pytest.skip("../shared/data is not there")
    cfg = read_config(str(ROOT / config))
    cfg.DATASETS.REGISTER = data
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("fine_tune_train",), ("fine_tune_val",)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = False  # as the model zoo has it
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path / "out")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 2, 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 128
    register_from_config(cfg)

    torch.manual_seed(1)
    stock = build_model(stock_cfg(cfg))
    DetectionCheckpointer(stock, str(tmp_path)).save("stock", iteration=89999)
    before = stock.state_dict()
    cfg.MODEL.WEIGHTS = str(tmp_path / "stock.pth")

    trainer = BalancedTrainer(cfg)
    trainer.test = lambda cfg, model: {}
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with caplog.at_level("INFO", logger="d2_balance"):
        trainer.resume_or_load(resume=False)
    now = trainer.model.state_dict()
    rows = {row.name: row.status for row in trainer.weights}
    assert {name for name, status in rows.items() if status == SHAPE} == with_classes
    others = before.keys() - with_classes
    assert {name for name, status in rows.items() if status == LOADED} == others
    assert all(torch.equal(now[name], before[name]) for name in others)
    assert all(torch.equal(now[name], start[name]) for name in with_classes)
    assert f"{len(with_classes)} skipped (shape)" in caplog.text
    trained = next(name for name in with_classes if "cls_score.weight" in name)
    weights = now[trained].clone()
    trainer.train()
    assert torch.isfinite(now[trained]).all() and not torch.equal(now[trained], weights)
