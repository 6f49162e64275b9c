"""Anchors on data: pi* by hand, reach against all anchors, and sizes that reach more."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from d2_balance.analysis.anchors import anchor_report, sample_images
from d2_balance.analysis.table import DataTable
from d2_balance.data.priors.sample_counts import sample_counters

from ..conftest import small_cfg
from .conftest import annotations, coco


def one_level(*overrides):
    """RetinaNet with one anchor of 32 x 32 pixels every 8 pixels, images of 64 x 64."""
    cfg = small_cfg("retinanet", "MODEL.RETINANET.IN_FEATURES", ["p3"], *overrides)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    return cfg


def test_best_prior_by_hand(table):
    report = anchor_report(one_level(), table([[1]], sizes=(64, 64), box=(16, 16, 32, 32)))
    # 8 x 8 anchors. The one on the object has IoU 1, its four neighbours 24 * 32 = 768 pixels of
    # 2048 - 768: 0.6; diagonal ones 24 * 24 / (2048 - 576) = 0.39 and all others are negative.
    (level,) = report.levels
    assert (level.name, level.positives, level.samples) == ("p3", 5, 64)
    assert report.prior.prior == pytest.approx(5 / (64 * 2))  # two classes
    assert report.missed()[1] == 0 and np.isnan(report.missed()[0])
    assert report.edge == (64, 64) and report.images == 1


def test_images_are_resized_as_in_training(table):
    # the same image at half the size
    small = anchor_report(one_level(), table([[1]], sizes=(32, 32), box=(8, 8, 16, 16)))
    assert small.levels[0].positives == 5


@pytest.mark.parametrize(
    "overrides",
    [
        ("retinanet",),
        ("faster",),
        ("faster", "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("faster", "MODEL.RPN.BOUNDARY_THRESH", 0),
    ],
)
def test_best_iou_equals_that_over_all_anchors(overrides):
    counter = next(iter(sample_counters(small_cfg(*overrides)).values()))
    size = (93, 141)  # padded to another one
    corner = torch.rand(300, 2) * torch.tensor([130.0, 85.0])
    side = torch.rand(300, 2) ** 2 * 90 + 1
    limit = torch.tensor([141.0, 93.0])
    boxes = torch.cat([corner, torch.minimum(corner + side, limit)], dim=1)
    anchors = Boxes.cat(counter._grid(size))
    if "MODEL.RPN.BOUNDARY_THRESH" in overrides:
        anchors = anchors[anchors.inside_box(size)]
    wanted = pairwise_iou(Boxes(boxes), anchors).amax(dim=1)
    torch.testing.assert_close(counter.best_iou(size, boxes), wanted, rtol=0, atol=2e-6)


def two_sizes(count=30):
    """Class 0 in boxes of 90 pixels, class 1 in boxes of 24 pixels, on images of 128 x 128."""
    data = coco([[0, 1]] * count, sizes=(128, 128))
    for number, annotation in enumerate(data["annotations"]):
        side = 90 if annotation["category_id"] == 1 else 24
        annotation["bbox"] = [7 + number % 13, 20 + number % 7, side, side]
    return DataTable.from_annotations("made", annotations(data))


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_sizes_are_suggested_that_reach_what_was_out_of_reach(kind):
    cfg = small_cfg(kind, "INPUT.MIN_SIZE_TRAIN", (128,))
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[48], [96], [192], [384], [768]]
    found = two_sizes()
    report = anchor_report(cfg, found)
    assert report.threshold == 0.5  # in the RPN too: from there on RoI heads train it
    assert report.missed().tolist() == [0, 1]
    assert report.missed(suggested=True)[1] < 0.1 and report.missed(suggested=True)[0] <= 0.02
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = report.suggested
    again = anchor_report(cfg, found)
    np.testing.assert_array_equal(again.reached, report.suggested_reached)
    assert again.suggested is None  # and they stay


def test_a_single_object_changes_no_sizes():
    cfg = small_cfg("retinanet", "INPUT.MIN_SIZE_TRAIN", (128,))
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[48], [96], [192], [384], [768]]
    data = two_sizes(60)
    data.crowd[np.flatnonzero(data.label == 1)[1:]] = True  # one small object is left
    report = anchor_report(cfg, data)
    assert report.missed()[1] == 1 and report.objects.tolist() == [60, 1]
    assert report.suggested is None


def test_points_have_levels_and_no_reach():
    cfg = small_cfg("fcos", "INPUT.MIN_SIZE_TRAIN", (128,))
    report = anchor_report(cfg, two_sizes())
    assert [level.name for level in report.levels] == ["p3", "p4", "p5", "p6", "p7"]
    assert report.part == "FCOS" and report.reached is None and report.suggested is None


def test_a_sample_shows_every_class(random_table):
    chosen = sample_images(random_table, 20, 0)
    assert len(chosen) == 20
    shown = random_table.label[np.isin(random_table.image, chosen)]
    assert set(shown.tolist()) == set(random_table.label.tolist())
