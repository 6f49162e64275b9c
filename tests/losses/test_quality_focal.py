"""QFL and VFL: targets from decoded boxes, values by hand."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from d2_balance.losses import QFLLoss, Samples, VFLLoss
from d2_balance.losses._samples import paired_iou


def one_object(logit, shift):
    """A row of class 0 whose predicted box is `shift` pixels right of its 10 x 10 object."""
    box = torch.tensor([[0.0, 0, 10, 10]])
    return Samples(
        logits=torch.tensor([[logit, 0.0]]).requires_grad_(),
        labels=torch.tensor([0]),
        num_classes=2,
        pred_deltas=torch.tensor([[shift / 10, 0.0, 0.0, 0.0]]),
        boxes=box,
        gt_boxes=box,
        box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
    )


def test_quality_is_the_iou_of_the_decoded_box():
    # 5 pixels off: intersection 50, union 150, IoU 1/3
    assert one_object(0.0, 5.0).iou.item() == pytest.approx(1 / 3, abs=1e-6)
    assert one_object(0.0, 0.0).iou.item() == pytest.approx(1.0)
    assert one_object(0.0, 50.0).iou.item() == 0.0


def test_qfl_by_hand():
    # p = .5, q = 1/3: (1/6)^2 * log 2, BCE at logit 0 is log 2 whatever q; other class: .25 log 2
    value = QFLLoss()(one_object(0.0, 5.0))[0].tolist()
    assert value == pytest.approx([math.log(2) / 36, math.log(2) / 4], rel=1e-5)


def test_vfl_by_hand():
    # object: q BCE = log 2 / 3; other class: .75 * .25 * log 2
    value = VFLLoss()(one_object(0.0, 5.0))[0].tolist()
    assert value == pytest.approx([math.log(2) / 3, 0.75 * 0.25 * math.log(2)], rel=1e-5)


def test_loss_is_smallest_where_the_score_is_the_quality():
    at = math.log((1 / 3) / (2 / 3))  # sigmoid(at) = 1/3
    for loss in (QFLLoss(), VFLLoss()):
        best = loss(one_object(at, 5.0))[0, 0]
        assert best < loss(one_object(at + 0.5, 5.0))[0, 0]
        assert best < loss(one_object(at - 0.5, 5.0))[0, 0]


def test_quality_carries_no_gradient_into_the_box():
    samples = one_object(0.0, 5.0)
    samples.pred_deltas.requires_grad_()
    assert not samples.iou.requires_grad


def test_degenerate_boxes_have_no_overlap():
    boxes = torch.tensor([[0.0, 0, 0, 0], [5.0, 5, 2, 2]])
    assert paired_iou(boxes, torch.tensor([[0.0, 0, 4, 4], [0.0, 0, 9, 9]])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (QFLLoss, {"beta": -1.0}, "beta"),
        (VFLLoss, {"alpha": -1.0}, "alpha"),
        (VFLLoss, {"gamma": -1.0}, "gamma"),
    ],
)
def test_arguments_out_of_range_are_named(cls, arguments, name):
    with pytest.raises(ValueError, match=f"{cls.name}: {name} is -1.0; must be"):
        cls(**arguments)
