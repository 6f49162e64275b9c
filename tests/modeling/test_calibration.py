"""NorCal: values by hand, order of classes, what is refused."""

import pytest
import torch
from detectron2.modeling import build_model

from d2_balance.modeling.postprocess.norcal import norcal

from ..conftest import make_inputs, small_cfg


def test_scores_by_hand():
    # .6 / 100^.5 = .06, .2 / 4^.5 = .1, background .2: divided by their sum .36
    probs = torch.tensor([[0.6, 0.2, 0.2]])
    value = norcal(probs, torch.tensor([100.0, 4.0]), 0.5)
    assert value[0].tolist() == pytest.approx([0.06 / 0.36, 0.1 / 0.36, 0.2 / 0.36])


def test_gamma_zero_changes_nothing_and_zeros_stay():
    probs = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(norcal(probs, torch.tensor([9.0, 0.0]), 0.0), probs)
    assert norcal(probs, torch.tensor([9.0, 0.0]), 1.0)[:, 1].tolist() == [0, 0]


def test_a_model_without_it_and_with_it(counts_file):
    keys = ["MODEL.BALANCE.NORCAL.GAMMA", 1.0, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    keys += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    plain = build_model(small_cfg("faster", *keys[4:])).eval()
    torch.nn.init.normal_(plain.roi_heads.box_predictor.cls_score.weight, std=1e-4)
    ours = build_model(small_cfg("faster", *keys)).eval()
    ours.load_state_dict(plain.state_dict())  # the counts are no part of the weights
    with torch.no_grad():
        before, after = (m(make_inputs(images=1))[0]["instances"] for m in (plain, ours))
    # the scores are almost equal: the least frequent class comes first with calibration
    assert before.pred_classes.bincount(minlength=6)[5] < len(before)
    assert (after.pred_classes[:5] == 5).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BALANCE.NORCAL.GAMMA", -1.0], "NORCAL.GAMMA is -1.0; must be a number of at"),
        (
            ["MODEL.BALANCE.NORCAL.GAMMA", 0.5, "MODEL.BALANCE.CLS_LOSS", "SigmoidCE"],
            "NORCAL.GAMMA calibrates .* and CLS_LOSS SigmoidCE is a sigmoid loss; set it to 0",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, message, counts_file):
    keys = [*overrides, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg("faster", *keys))
