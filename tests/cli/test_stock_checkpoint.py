"""A checkpoint in Detectron2's own layout is calibrated by the commands, without training.

The expected detections are those of stock Detectron2, whose probabilities are calibrated by the
formulas.
"""

import json
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

from d2_balance import add_balance_config
from d2_balance.cli.main import main
from d2_balance.data import register_json
from d2_balance.data.class_counts import ClassCounts
from d2_balance.engine import BalancedTrainer

from ..conftest import CLASSES
from ..engine.conftest import write_dataset

NAMES = ("lvis_like_train", "lvis_like_val")
# Mask R-CNN R-18 FPN with the keys of Detectron2's LVIS configs
STOCK = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  MASK_ON: True
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    {DEPTH: 18, RES2_OUT_CHANNELS: 64, STEM_OUT_CHANNELS: 16, NORM: BN,
     OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], POST_NMS_TOPK_TEST: 20, POST_NMS_TOPK_TRAIN: 40}
  ROI_HEADS:
    {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 6,
     BATCH_SIZE_PER_IMAGE: 24, SCORE_THRESH_TEST: 0.0001}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, FC_DIM: 32, POOLER_RESOLUTION: 3}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 8, POOLER_RESOLUTION: 4}
DATASETS: {TRAIN: [lvis_like_train], TEST: [lvis_like_val]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}
SOLVER: {IMS_PER_BATCH: 2}
TEST: {DETECTIONS_PER_IMAGE: 300}
LOG: {IMAGES: 0}
SEED: 7
VERSION: 2
"""
NODE = "MODEL.BALANCE.CALIBRATION."


@pytest.fixture
def data(tmp_path):
    """(annotation file, image directory), under two names."""
    files = write_dataset(tmp_path / "data", images=6)
    for name in NAMES:
        register_json(name, *files)
    yield files
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def stock_cfg(*overrides):
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.merge_from_other_cfg(cfg.load_cfg(STOCK))
    cfg.merge_from_list(list(overrides))
    return cfg


def write_checkpoint(path, cfg):
    """Random weights under stock names, of scores that tell classes apart."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    layer = model.roi_heads.box_predictor.cls_score
    torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.normal_(layer.bias, std=0.5)
    torch.save({"model": model.state_dict()}, path)
    return model


def run_command(name, *arguments):
    assert main([name, *map(str, arguments)]) == 0


def expected_scores(model, cfg, calibrate, monkeypatch):
    """Scores of stock Detectron2 for every image, highest first, under other logits."""

    def predict_probs(self, predictions, proposals):
        logits = predictions[0].double()
        return list(calibrate(logits).float().split([len(p) for p in proposals]))

    monkeypatch.setattr(FastRCNNOutputLayers, "predict_probs", predict_probs)
    found = {}
    for batch in BalancedTrainer.build_test_loader(cfg, NAMES[1]):
        with torch.no_grad():
            outputs = model(batch)
        for record, output in zip(batch, outputs, strict=True):
            found[record["image_id"]] = output["instances"].scores.sort(descending=True).values
    return found


def scores_of(directory):
    (path,) = directory.rglob("predictions_*.json")
    found = {}
    for one in json.loads(path.read_text()):
        found.setdefault(one["image_id"], []).append(one["score"])
    return {image: torch.tensor(sorted(own, reverse=True)) for image, own in found.items()}


def softmax(logits, shift):
    return torch.cat([logits[:, :-1] + shift, logits[:, -1:]], dim=1).softmax(dim=1)


def sigmoid(probs):
    return torch.cat([probs, torch.zeros_like(probs[:, :1])], dim=1)


def formulas(cfg, statistics, activation):
    """Each method from its formula, for logits (R, K + 1)."""
    counts = ClassCounts.from_config(cfg)
    n, total = counts.image_count.double(), counts.num_images
    seen = n > 0
    adjusted = torch.where(seen, -(n.clamp(max=total - 1) / total).log(), 0.0)
    shift = torch.where(seen, -(n.clamp(max=total - 1) * CLASSES / total).log10(), 0.0)
    dimension = torch.tensor(statistics["fractal_dimension"]).double()
    if activation == "sigmoid":
        q = torch.log10(dimension.square().sum() / CLASSES / dimension.square())
        return {
            "": lambda z: sigmoid(z[:, :-1].sigmoid()),
            "logit_adjustment": lambda z: sigmoid((z[:, :-1] + adjusted).sigmoid()),
            "fracal": lambda z: sigmoid(z[:, :-1].sigmoid() * (z[:, :-1] + shift + q).sigmoid()),
        }
    mean = torch.tensor(statistics["logit_mean"]).double()
    std = torch.tensor(statistics["logit_variance"]).double().sqrt()

    def logn(z):
        own = (z[:, :-1] - mean + mean.min()) / std
        return torch.cat([own, z[:, -1:]], dim=1).softmax(dim=1)

    def fracal(z):
        p = softmax(z, shift)
        p = torch.cat([p[:, :-1] / dimension.square(), p[:, -1:]], dim=1)
        return p / p.sum(dim=1, keepdim=True)

    return {
        "": lambda z: z.softmax(dim=1),
        "logit_adjustment": lambda z: softmax(z, adjusted),
        "fracal": fracal,
        "logn": logn,
    }


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_every_calibration_of_a_stock_checkpoint(data, tmp_path, activation, monkeypatch, capsys):
    keys = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True] if activation == "sigmoid" else []
    stock = stock_cfg(*keys)
    weights, config = tmp_path / "model_final.pth", tmp_path / "lvis.yaml"
    model = write_checkpoint(weights, stock)
    config.write_text(STOCK)
    ours = ["MODEL.META_ARCHITECTURE", "BalancedRCNN", "MODEL.WEIGHTS", weights]
    ours += ["MODEL.ROI_HEADS.NAME", "BalancedStandardROIHeads"]
    ours += ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE"] if activation == "sigmoid" else []
    path = tmp_path / "calibration.json"
    arguments = ["--config-file", config, "--output", path, "--max-iter", 3, *ours]
    run_command("calibrate", *arguments)
    statistics = json.loads(path.read_text())
    assert math.isfinite(sum(statistics["logit_mean"]))
    seen = set()
    for name, calibrate in formulas(stock, statistics, activation).items():
        output = tmp_path / f"out{name}"
        opts = [*ours, *([NODE + "NAME", name] if name else []), "OUTPUT_DIR", output]
        opts += [NODE + "STATISTICS", path] if name in ("fracal", "logn") else []
        run_command("train", "--eval-only", "--config-file", config, *opts)
        with monkeypatch.context() as patch:
            expected = expected_scores(model, stock, calibrate, patch)
        found = scores_of(output)
        assert found.keys() == expected.keys()
        for image, scores in expected.items():
            torch.testing.assert_close(found[image], scores, rtol=1e-4, atol=1e-5)
        seen.add(tuple(found[min(found)].tolist()))
    assert len(seen) == (3 if activation == "sigmoid" else 4)  # none is another one
    if activation == "sigmoid":
        opts = [*ours, NODE + "NAME", "logn", NODE + "STATISTICS", path]
        opts += ["OUTPUT_DIR", tmp_path / "no"]
        with pytest.raises(SystemExit):
            main(list(map(str, ["train", "--eval-only", "--config-file", config, *opts])))
        assert "CLS_LOSS SigmoidCE has no plain softmax" in capsys.readouterr().err
