"""Sigmoid and softmax RoI heads, image-level labels, loading of weights."""

import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2_balance.losses import Samples
from d2_balance.modeling.criterion import watched

from ..conftest import CLASSES, make_inputs, small_cfg


def eql_cfg(kind, counts_file, *overrides):
    keys = ["MODEL.BALANCE.CLS_LOSS", "EQL", "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    return small_cfg(kind, *keys, *overrides)


def predictors(model):
    predictor = model.roi_heads.box_predictor
    return list(predictor) if isinstance(predictor, torch.nn.ModuleList) else [predictor]


def capture(monkeypatch, model):
    """The Samples that each classification loss of the model receives."""
    seen = []
    for module in [model, *([] if not hasattr(model, "roi_heads") else predictors(model))]:
        loss = getattr(module, "cls_loss", None)
        if loss is not None:
            original = loss.compute

            def compute(samples, original=original):
                seen.append(samples)
                return original(samples)

            monkeypatch.setattr(loss, "compute", compute)
    return seen


@pytest.mark.parametrize("kind", ["faster", "mask", "cascade"])
def test_sigmoid_heads_start_at_the_prior(kind, counts_file):
    model = build_model(eql_cfg(kind, counts_file))
    for predictor in predictors(model):
        bias = predictor.cls_score.bias
        assert torch.allclose(bias, torch.full_like(bias, -math.log(999)))


def test_first_loss_with_1203_classes_is_about_one():
    keys = ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE", "MODEL.ROI_HEADS.NUM_CLASSES", 1203]
    model = build_model(small_cfg("faster", *keys))
    with EventStorage(0):
        losses = model(make_inputs(empty=(0, 1)))
    # background RoIs only: 1203 * -log(1 - .001) = 1.2036, moved a little by the random weights
    assert losses["loss_cls"].item() == pytest.approx(1.2036, rel=0.05)


def test_softmax_head_keeps_a_bias_of_zero():
    model = build_model(small_cfg("faster"))
    assert (predictors(model)[0].cls_score.bias == 0).all()


@pytest.mark.parametrize(("column", "outputs"), [(True, CLASSES + 1), (False, CLASSES)])
def test_sigmoid_outputs_with_and_without_background_column(column, outputs, counts_file):
    cfg = eql_cfg("faster", counts_file, "MODEL.BALANCE.BACKGROUND_COLUMN", column)
    model = build_model(cfg)
    predictor = predictors(model)[0]
    assert predictor.cls_score.out_features == outputs
    with EventStorage(0):
        assert all(loss.isfinite() for loss in model(make_inputs()).values())
    model.eval()
    with torch.no_grad():
        model(make_inputs())
        scores = torch.zeros(5, outputs)
        proposals = [[0] * 3, [0] * 2]
        probs = predictor.predict_probs((scores, None), proposals)
    assert [tuple(p.shape) for p in probs] == [(3, CLASSES + 1), (2, CLASSES + 1)]
    assert (probs[0][:, -1] == 0).all() and (probs[0][:, :-1] == 0.5).all()


@pytest.mark.parametrize("column", [True, False])
def test_checkpoints_of_both_output_sizes_load(column, counts_file, tmp_path):
    # K + 1 outputs: any Detectron2 checkpoint; K outputs: the EQL authors' release
    source = build_model(small_cfg("mask", balanced=False))
    state = source.state_dict()
    score = "roi_heads.box_predictor.cls_score."
    if not column:
        for name in (score + "weight", score + "bias"):
            state[name] = state[name][:CLASSES]
    torch.save({"model": state}, tmp_path / "model.pth")
    cfg = eql_cfg("mask", counts_file, "MODEL.BALANCE.BACKGROUND_COLUMN", column)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    loaded = model.state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name
    frequency = model.roi_heads.box_predictor.cls_loss.class_frequency
    assert frequency.tolist() == [0.4, 0.12, 0.04, 0.008, 0.002, 0.001]


@pytest.mark.parametrize("kind", ["retinanet", "faster", "cascade"])
def test_image_level_labels_reach_the_loss(kind, counts_file, monkeypatch):
    # raw ids are 1-based: class 2 absent, class 4 present but not fully marked
    inputs = make_inputs(
        empty=(1,),
        neg_category_ids=[[2], [6]],
        not_exhaustive_category_ids=[[4], []],
    )
    model = build_model(eql_cfg(kind, counts_file))
    seen = capture(monkeypatch, model)
    with EventStorage(0):
        model(inputs)
    assert len(seen) == (3 if kind == "cascade" else 1)
    annotated = set(inputs[0]["instances"].gt_classes.tolist())
    for samples in seen:
        rows = [set(row.nonzero().flatten().tolist()) for row in samples.verified]
        assert rows == [annotated | {1, 3}, {5}]
        assert samples.not_exhaustive.nonzero().tolist() == [[0, 3]]
        assert set(samples.image_index.tolist()) == {0, 1}
        expected = samples.verified[samples.image_index]
        assert torch.equal(samples.sample_verified, expected)
    if kind != "retinanet":
        assert all(layer.verified is layer.not_exhaustive is None for layer in predictors(model))


def test_batches_without_image_level_labels_have_no_mask(counts_file, monkeypatch):
    model = build_model(eql_cfg("faster", counts_file))
    seen = capture(monkeypatch, model)
    with EventStorage(0):
        model(make_inputs())
    assert seen[0].verified is seen[0].not_exhaustive is None


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("kind", ["faster", "cascade"])
@pytest.mark.parametrize(("cls", "box"), [("SigmoidCE", "GHMR"), ("GHMC", "GIoU"), ("", "")])
def test_no_proposal_in_the_batch_gives_zero_with_a_gradient(kind, images, cls, box):
    keys = ["MODEL.BALANCE.CLS_LOSS", cls, "MODEL.BALANCE.BOX_LOSS", box]
    none = {"gt_classes": torch.empty(0).long(), "gt_boxes": Boxes(torch.empty(0, 4))}
    proposals = [
        Instances((64, 64), proposal_boxes=Boxes(torch.empty(0, 4)), **none) for _ in range(images)
    ]
    for layer in predictors(build_model(small_cfg(kind, *keys))):  # deltas (R, K * 4) and (R, 4)
        with EventStorage(0):
            losses = layer.losses(layer(torch.empty(0, 32)), proposals)
        assert {name: loss.item() for name, loss in losses.items()} == {
            "loss_cls": 0,
            "loss_box_reg": 0,
        }
        sum(losses.values()).backward()
        assert all((p.grad == 0).all() for p in layer.parameters())


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_samples_hold_the_positives_in_order(kind, monkeypatch):
    model = build_model(small_cfg(kind))
    seen = capture(monkeypatch, model)
    inputs = make_inputs(images=3, empty=(1,), seed=4)
    with EventStorage(0):
        model(inputs)
    samples = seen[0]
    assert isinstance(samples, Samples) and samples.images == 3
    pos = samples.pos
    assert len(pos) > 0 and samples.pred_deltas.shape == (len(pos), 4)
    boxes = torch.cat([x["instances"].gt_boxes.tensor for x in inputs])
    classes = torch.cat([x["instances"].gt_classes for x in inputs])
    if kind == "retinanet":
        assert torch.equal(samples.gt_boxes, boxes[samples.gt_index])
        assert torch.equal(samples.labels[pos], classes[samples.gt_index])
    owner = torch.tensor([0] * 3 + [2] * 3)
    for i, box in zip(pos.tolist(), samples.gt_boxes, strict=True):
        matches = (boxes == box).all(dim=1).nonzero().flatten()
        assert samples.image_index[i] in owner[matches]
        assert samples.labels[i] in classes[matches]


def test_class_specific_deltas_are_those_of_the_label(monkeypatch):
    model = build_model(small_cfg("faster"))
    predictor = predictors(model)[0]
    seen = capture(monkeypatch, model)
    with torch.no_grad():  # the delta of class k is k
        predictor.bbox_pred.weight.zero_()
        predictor.bbox_pred.bias.copy_(torch.arange(CLASSES).repeat_interleave(4).float())
    with EventStorage(0):
        model(make_inputs())
    samples = seen[0]
    expected = samples.labels[samples.pos].float().unsqueeze(1).expand(-1, 4)
    assert torch.equal(samples.pred_deltas, expected)


def test_cascade_stages_have_their_own_state_and_transform(counts_file):
    model = build_model(eql_cfg("cascade", counts_file, "MODEL.BALANCE.BOX_LOSS", "GHMR"))
    stages = predictors(model)
    with EventStorage(0):
        model(make_inputs())
    assert len({id(stage.box_loss) for stage in stages}) == 3
    assert len({stage.box2box_transform.weights for stage in stages}) == 3


def test_ghm_r_sees_unit_weights_in_roi_heads(monkeypatch):
    model = build_model(small_cfg("faster", "MODEL.BALANCE.BOX_LOSS", "GHMR"))
    predictor = predictors(model)[0]
    seen = capture(monkeypatch, model)
    targets = []
    with (
        EventStorage(0),
        watched(predictor, lambda samples, boxes, cls, box: targets.append(boxes[1])),
    ):
        model(make_inputs())
    weights = torch.tensor([10.0, 10, 5, 5])
    torch.testing.assert_close(targets[0] * weights, seen[0].target_deltas)


def test_half_precision_step(counts_file):
    for kind, loss in (("retinanet", "GHMC"), ("faster", "EQL"), ("retinanet", "DR")):
        keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, "MODEL.BALANCE.CLS_LOSS", loss]
        model = build_model(small_cfg(kind, *keys))
        with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
            # P7 must not be 1 x 1: torch's bfloat16 convolution returns NaN gradients there
            losses = model(make_inputs(size=160))
        sum(losses.values()).backward()
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
