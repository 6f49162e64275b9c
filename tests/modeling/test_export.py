"""Scripted and traced models give what the eager ones give."""

import copy

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor

from d2_balance.losses import CLS_LOSSES

from ..conftest import make_inputs, small_cfg

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}
THRESHOLDS = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
ROI_LOSSES = [name for name, _ in CLS_LOSSES]


def built(kind, *overrides):
    model = build_model(small_cfg(kind, *THRESHOLDS, *overrides)).eval()
    for name, parameter in model.named_parameters():
        if "cls_score" in name and parameter.dim() > 1:
            # scores that differ, and none so close to 1 that they are equal
            torch.nn.init.normal_(parameter, std=1e-4 if parameter.dim() == 4 else 0.3)
    return model


def eager(model, images):
    """Detections in the size of the network's input, which is where scripted models stop."""
    with torch.no_grad():
        if hasattr(model, "inference"):
            return model.inference(images, do_postprocess=False)
        batch = model.preprocess_image(images)
        features = model.backbone(batch.tensor)
        features = [features[name] for name in model.head_in_features]
        return model.forward_inference(batch, features, model.head(features))


def scripted(model, images):
    form = scripting_with_instances(model, FIELDS)
    with torch.no_grad():
        return form.inference(images, None, False) if hasattr(form, "inference") else form(images)


def assert_equal(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        assert len(other.scores) > 5
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.pred_classes, other.pred_classes)
        if other.has("pred_masks"):
            assert torch.equal(one.pred_masks, other.pred_masks)


@pytest.mark.parametrize("kind", ["retinanet", "faster", "mask"])
def test_scripted_model_equals_the_eager_one(kind):
    model = built(kind)
    images = [{"image": record["image"]} for record in make_inputs()]
    weights = copy.deepcopy(model.state_dict())
    expected = eager(model, images)
    assert_equal(scripted(model, images), expected)
    # the model that was scripted is as it was, and trains
    assert model.state_dict().keys() == weights.keys()
    assert_equal(eager(model, images), expected)


@pytest.mark.parametrize("name", ROI_LOSSES)
def test_scores_of_every_loss_are_scripted(name, counts_file):
    keys = ["MODEL.BALANCE.CLS_LOSS", name, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    model = built("faster", *keys)
    images = [{"image": record["image"]} for record in make_inputs()]
    assert_equal(scripted(model, images), eager(model, images))


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster", "mask", "cascade"])
def test_traced_model_equals_the_eager_one(kind):
    model = built(kind, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0)
    images = [{"image": make_inputs()[0]["image"]}]
    adapter = TracingAdapter(model, images, lambda model, inputs: eager(model, inputs))
    other = make_inputs(seed=5)[0]["image"]
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    for image in (images[0]["image"], other):
        with torch.no_grad():
            outputs = adapter.outputs_schema(traced(image))
        assert_equal(outputs, eager(model, [{"image": image}]))


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("faster", ("CLASSIFIER", "cosine")),
        ("mask", ("MASK_PREDICTOR", "normalized")),
        ("faster", ("DISALIGN", True)),
        ("faster", ("TEST_NMS.METHOD", "gaussian")),
        ("retinanet", ("CALIBRATION.NAME", "logit_adjustment")),
    ],
)
def test_what_cannot_be_scripted_says_so(kind, override, counts_file):
    key, value = override
    keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, "MODEL.BALANCE." + key, value]
    with pytest.raises(ValueError, match="cannot be (scripted; trace the model|exported)"):
        scripting_with_instances(built(kind, *keys), FIELDS)
