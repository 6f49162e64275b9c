"""Objects without a mask train the box head only."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..conftest import make_inputs, small_cfg

CASCADE = ("MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads")
AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


def losses(model, inputs):
    torch.manual_seed(1)
    with EventStorage():
        return model.train()(inputs)


def flagged(flags):
    """Two images of two objects; `flags` say which of them have a mask, and noise is the rest."""
    inputs = make_inputs(2, 2)
    for record, own in zip(inputs, flags, strict=True):
        if own is not None:
            record["instances"].gt_has_mask = torch.tensor(own)
            masks = record["instances"].gt_masks.tensor
            masks[~torch.tensor(own)] = True  # wrong ones, which must not be seen
    return inputs


@pytest.mark.parametrize("keys", [(), (*CASCADE, *AGNOSTIC)])
def test_boxes_train_as_ever_and_wrong_masks_are_not_seen(keys):
    model = build_model(small_cfg("mask", *keys))
    plain = losses(model, flagged([None, None]))
    mixed = losses(model, flagged([[True, False], None]))
    other = losses(model, flagged([[True, True], None]))
    assert all(torch.equal(mixed[key], plain[key]) for key in plain if key != "loss_mask")
    assert torch.equal(other["loss_mask"], plain["loss_mask"])
    assert mixed["loss_mask"] != plain["loss_mask"]
    alone = losses(model, flagged([[False, False], None]))
    again = make_inputs(2, 2)
    again[0]["instances"].gt_has_mask = torch.tensor([False, False])
    assert torch.equal(losses(model, again)["loss_mask"], alone["loss_mask"])


def test_a_batch_without_masks_has_a_mask_loss_of_zero_with_gradient():
    model = build_model(small_cfg("mask"))
    result = losses(model, flagged([[False, False], [False, False]]))
    assert result["loss_mask"] == 0 and result["loss_cls"] > 0
    sum(result.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())


def test_sampling_free_heads_leave_them_out_before_the_cap():
    cfg = small_cfg("mask", "MODEL.BALANCE.SAMPLING_FREE", True)
    model = build_model(cfg)
    result = losses(model, flagged([[False, False], [False, False]]))
    assert result["loss_mask"] == 0


def test_at_test_every_detection_gets_a_mask():
    model = build_model(small_cfg("mask", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)).eval()
    with torch.no_grad():
        (result,) = model(make_inputs(1))
    assert result["instances"].has("pred_masks")
