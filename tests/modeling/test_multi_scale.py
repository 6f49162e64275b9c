"""Test-time augmentation: equal to Detectron2's, with masks that are never all in memory."""

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes

from d2_balance.modeling.tta import (
    AugmentedRCNN,
    PastedMasks,
    SoftMasks,
    augmentation_config,
    check_test_augmentation,
)

from ..conftest import CLASSES, make_inputs, small_cfg

AUG = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 80)"]
SCORES = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0001"]


def model_of(kind, *overrides):
    cfg = small_cfg(kind, *AUG, *SCORES, "TEST.DETECTIONS_PER_IMAGE", "30", *overrides)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():  # scores that are apart from each other
        if "cls_score" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return cfg, model


def images():
    return [{**record, "height": 90, "width": 100} for record in make_inputs(images=2)]


@pytest.mark.parametrize(
    "kind, overrides",
    [
        ("mask", []),
        ("mask", ["MODEL.BALANCE.CLS_LOSS", "BAGS"]),
        ("faster", []),
        ("cascade", ["MODEL.MASK_ON", "True"]),
    ],
)
def test_equal_to_detectron2(kind, overrides, counts_file):
    overrides = [*overrides, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    cfg, model = model_of(kind, *overrides)
    with torch.no_grad():
        ours = AugmentedRCNN(cfg, model)(images())
        stock = GeneralizedRCNNWithTTA(cfg, model, batch_size=1)(images())
    for mine, theirs in zip(ours, stock, strict=True):
        mine, theirs = mine["instances"], theirs["instances"]
        assert len(mine) == len(theirs) > 5
        torch.testing.assert_close(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.testing.assert_close(mine.scores, theirs.scores)
        assert mine.pred_classes.tolist() == theirs.pred_classes.tolist()
        assert mine.has("pred_masks") == theirs.has("pred_masks") == (kind != "faster")
        if mine.has("pred_masks"):
            assert isinstance(mine.pred_masks, PastedMasks)
            assert torch.equal(mine.pred_masks.tensor, theirs.pred_masks)
            assert instances_to_coco_json(mine, 1)[0]["segmentation"]["size"] == [90, 100]


def test_scores_are_those_of_our_heads(counts_file):
    counts = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    cfg, model = model_of("faster", "MODEL.BALANCE.NORCAL.GAMMA", "2.0", *counts)
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight.zero_()
        predictor.cls_score.bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, 0, 0]))
        augmented = AugmentedRCNN(cfg, model)(images())
        predictor.norcal_gamma = 0.0
        plain = AugmentedRCNN(cfg, model)(images())
    best = [result[0]["instances"].pred_classes[0].item() for result in (augmented, plain)]
    assert best == [CLASSES - 1, 0]  # 1 and 400 training images


def test_masks_are_pasted_one_by_one():
    torch.manual_seed(0)
    soft, boxes = torch.rand(4, 7, 7), torch.rand(4, 4) * 20
    boxes[:, 2:] += 15
    pasted = SoftMasks(soft).to_bitmasks(Boxes(boxes), 50, 60).tensor
    expected = paste_masks_in_image(soft, boxes, (50, 60))
    assert len(pasted) == 4 and np.array_equal(pasted.tensor, expected)
    assert torch.equal(pasted[-1], expected[3]) and pasted[-1].shape == (50, 60)
    assert torch.equal(pasted[torch.tensor([2, 0])].tensor, expected[[2, 0]])
    assert torch.equal(pasted.to("cpu").tensor, expected)
    with pytest.raises(IndexError):
        pasted[4]
    assert SoftMasks(soft[:0]).to_bitmasks(boxes[:0], 5, 6).tensor.tensor.shape == (0, 5, 6)


def test_a_image_without_detections_has_no_masks():
    cfg, model = model_of("mask", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    with torch.no_grad():
        detections = AugmentedRCNN(cfg, model)(images())[0]["instances"]
    assert (
        len(detections) == len(detections.pred_masks) == 0
        and instances_to_coco_json(detections, 1) == []
    )


def test_the_loader_leaves_the_image_as_it_is():
    cfg = small_cfg("faster", *AUG)
    assert augmentation_config(cfg).INPUT.MIN_SIZE_TEST == 0 and cfg.INPUT.MIN_SIZE_TEST == 800


@pytest.mark.parametrize(
    "kind, overrides, message",
    [
        ("retinanet", [], "works with two-stage models, not with BalancedRetinaNet"),
        ("mask", ["MODEL.KEYPOINT_ON", "True"], "does not work with MODEL.KEYPOINT_ON"),
        ("mask", ["TEST.AUG.MIN_SIZES", "()"], r"TEST.AUG.MIN_SIZES is \(\)"),
        ("mask", ["TEST.AUG.IMS_PER_BATCH", "0"], "TEST.AUG.IMS_PER_BATCH is 0"),
    ],
)
def test_what_cannot_work_is_refused(kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_test_augmentation(small_cfg(kind, *AUG, *overrides))
    check_test_augmentation(small_cfg(kind, *overrides))  # not enabled: nothing to check
