"""Sampling-free training in the models: counted start, scaled losses, thresholds per class."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2_balance.data.priors.foreground import ForegroundPrior, PartCount
from d2_balance.engine.setup.validate import check_losses_are_used

from ..conftest import CLASSES, make_inputs, small_cfg

COUNTS = (40, 30, 20, 6, 3, 1)  # objects of each class, 100 in all
NAMES = tuple(f"class{i}" for i in range(CLASSES))
PARTS = {
    "RetinaNet": PartCount(20, 100, CLASSES),
    "FCOS": PartCount(20, 100, CLASSES),
    "RPN": PartCount(5, 1000, 1),
    "ROIHeads": PartCount(20, 100, CLASSES),
}
THRESHOLDS = torch.tensor([0.08, 0.06, 0.04, 0.012, 0.006, 0.002])  # 0.2 times the fraction
GUIDED = ("MODEL.BALANCE.GUIDED_SCALE", 2.0)


@pytest.fixture
def prior_file(tmp_path):
    path = str(tmp_path / "prior.json")
    ForegroundPrior(PARTS, COUNTS, NAMES, 10, 10).save(path)
    return path


def cfg_of(kind, prior_file, *overrides):
    generator = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
    return small_cfg(kind, "MODEL.BALANCE.PRIOR_FILE", prior_file, *generator, *overrides)


def predictors(model):
    layers = model.roi_heads.box_predictor
    return list(layers) if isinstance(layers, torch.nn.ModuleList) else [layers]


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_heads_start_at_the_counted_prior(kind, prior_file):
    model = build_model(cfg_of(kind, prior_file))
    bias = model.head.cls_score.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.2 / CLASSES))
    assert model.foreground_prior.item() == pytest.approx(0.2 / CLASSES)
    stock = build_model(small_cfg(kind, balanced=kind == "fcos"))
    model.load_state_dict(stock.state_dict(), strict=False)


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_rpn_and_roi_heads_start_at_the_counted_prior(kind, prior_file):
    model = build_model(cfg_of(kind, prior_file))
    bias = model.proposal_generator.rpn_head.objectness_logits.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.005))
    for layer in predictors(model):  # softmax: 20 % foreground, the same for each class
        expected = torch.tensor([0.2 / CLASSES] * CLASSES + [0.8])
        torch.testing.assert_close(layer.cls_score.bias.softmax(0), expected)
    for name in ("SigmoidCE", "GumbelCE"):
        model = build_model(cfg_of(kind, prior_file, "MODEL.BALANCE.CLS_LOSS", name))
        for layer in predictors(model):
            scores = layer.probabilities(layer.cls_score.bias.unsqueeze(0))[0, :CLASSES]
            torch.testing.assert_close(scores, torch.full_like(scores, 0.2 / CLASSES))


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster", "cascade"])
def test_thresholds_are_buffers_that_follow_the_model_and_are_not_saved(kind, prior_file):
    model = build_model(cfg_of(kind, prior_file, "MODEL.BALANCE.CLASS_THRESHOLDS", True))
    owners = predictors(model) if kind in ("faster", "cascade") else [model]
    for owner in owners:
        torch.testing.assert_close(owner.test_score_thresh, THRESHOLDS)
        assert dict(owner.named_buffers())["test_score_thresh"] is owner.test_score_thresh
    assert not any("test_score_thresh" in key for key in model.state_dict())
    with torch.no_grad():
        detections = model.eval()(make_inputs())
    assert all(
        (x["instances"].scores > THRESHOLDS[x["instances"].pred_classes]).all() for x in detections
    )
    assert model.to("meta") is model and owners[0].test_score_thresh.is_meta


def test_a_class_threshold_filters_its_class_alone_in_retinanet(prior_file):
    model = build_model(cfg_of("retinanet", prior_file, "MODEL.BALANCE.CLASS_THRESHOLDS", True))
    model.test_nms_thresh = 1.0
    scores = torch.full((1, 1, CLASSES), 0.01).logit()  # above two of the thresholds
    anchors = [Boxes(torch.tensor([[4.0, 4, 20, 20]]))]
    result = model.inference_single_image(
        anchors, [scores[0].sigmoid()], [torch.zeros(1, 4)], (64, 64)
    )
    assert sorted(result.pred_classes.tolist()) == [4, 5]


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_class_threshold_filters_its_class_alone_in_roi_heads(kind, prior_file):
    keys = ("MODEL.BALANCE.CLASS_THRESHOLDS", True, "MODEL.BALANCE.CLS_LOSS", "SigmoidCE")
    model = build_model(cfg_of(kind, prior_file, *keys)).eval()
    for layer in predictors(model):  # every proposal has a score of 0.01 in every class
        torch.nn.init.zeros_(layer.cls_score.weight)
        torch.nn.init.constant_(layer.cls_score.bias, torch.tensor(0.01).logit().item())
    with torch.no_grad():
        detections = model(make_inputs(images=1))[0]["instances"]
    assert set(detections.pred_classes.tolist()) == {4, 5}


def step(kind, prior_file, *overrides, empty=()):
    torch.manual_seed(0)
    model = build_model(cfg_of(kind, prior_file, *overrides))
    torch.manual_seed(3)
    with EventStorage(0):
        losses = model(make_inputs(empty=empty))
    sum(losses.values()).backward()
    return losses, model


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster", "cascade"])
def test_classification_losses_are_twice_the_box_losses(kind, prior_file):
    losses, model = step(kind, prior_file, *GUIDED)
    pairs = [(k, k.replace("cls", "box_reg")) for k in losses if k.startswith("loss_cls")]
    pairs += [("loss_fcos_cls", "loss_fcos_loc")] if kind == "fcos" else []
    assert len(pairs) == (3 if kind == "cascade" else 1)
    for cls, box in pairs:
        torch.testing.assert_close(losses[cls], 2 * losses[box])
        assert losses[cls] > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_images_without_objects_keep_the_graph(kind, prior_file):
    losses, model = step(kind, prior_file, *GUIDED, empty=(0, 1))
    assert losses["loss_cls"].item() == 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_roi_box_loss_is_a_mean_over_positives(prior_file):
    plain, model = step("faster", prior_file)
    count = model.roi_heads.box_predictor.normalizer.value()
    guided, model = step("faster", prior_file, *GUIDED)
    positives = model.roi_heads.box_predictor.normalizer.value()
    assert 0 < positives < count
    expected = plain["loss_box_reg"].double() * count / positives
    torch.testing.assert_close(guided["loss_box_reg"].double(), expected)


def test_everything_together_without_sampling(prior_file):
    keys = ("MODEL.BALANCE.SAMPLING_FREE", True, "MODEL.BALANCE.RPN.SAMPLING_FREE", True)
    keys += ("MODEL.BALANCE.RPN.GUIDED_SCALE", 1.0, "MODEL.BALANCE.CLASS_THRESHOLDS", True)
    losses, _ = step("mask", prior_file, *GUIDED, *keys)
    torch.testing.assert_close(losses["loss_rpn_cls"], losses["loss_rpn_loc"])
    torch.testing.assert_close(losses["loss_cls"], 2 * losses["loss_box_reg"])
    assert losses["loss_mask"].isfinite()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("retinanet", {"RPN": PARTS["RPN"]}, "has counts of RPN and the model needs those of Reti"),
        ("faster", {"RPN": PARTS["RPN"]}, "has counts of RPN and the model needs those of ROIH"),
        ("retinanet", {"RetinaNet": PartCount(20, 100, 3)}, "for 3 outputs of RetinaNet and 6 cl"),
    ],
)
def test_counts_of_another_model_are_refused(kind, change, message, tmp_path):
    path = str(tmp_path / "other.json")
    ForegroundPrior(change, COUNTS, NAMES, 10, 10).save(path)
    with pytest.raises(ValueError, match=message) as error:
        build_model(cfg_of(kind, path))
    assert "MODEL.BALANCE.PRIOR_FILE" in str(error.value) and path in str(error.value)


def test_a_missing_file_is_named_with_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL\.BALANCE\.PRIOR_FILE: .*nowhere\.json"):
        build_model(cfg_of("retinanet", str(tmp_path / "nowhere.json")))


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_thresholds_without_counts_are_refused(kind):
    with pytest.raises(ValueError, match="CLASS_THRESHOLDS True needs MODEL.BALANCE.PRIOR_FILE"):
        build_model(small_cfg(kind, "MODEL.BALANCE.CLASS_THRESHOLDS", True))


def test_softmax_losses_with_outputs_of_their_own_are_refused(prior_file, counts_file):
    keys = ("MODEL.BALANCE.CLS_LOSS", "Seesaw", "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file)
    with pytest.raises(ValueError, match="MODEL.BALANCE.PRIOR_FILE sets the start of softmax"):
        build_model(cfg_of("faster", prior_file, *keys))


def test_losses_with_a_scale_of_their_own_are_not_guided(prior_file):
    with pytest.raises(ValueError, match="GUIDED_SCALE .* GHMC has a scale of its own"):
        build_model(cfg_of("retinanet", prior_file, *GUIDED, "MODEL.BALANCE.CLS_LOSS", "GHMC"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("GUIDED_SCALE", 1.0), ("PRIOR_FILE", "x.json"), ("CLASS_THRESHOLDS", True)],
)
def test_keys_need_a_balanced_model(key, value):
    cfg = small_cfg("retinanet", f"MODEL.BALANCE.{key}", value, balanced=False)
    with pytest.raises(ValueError, match=f"{key} is set.*BalancedRetinaNet"):
        check_losses_are_used(cfg)
