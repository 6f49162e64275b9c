"""BalancedFCOS: Detectron2's FCOS with stock settings, and every dense loss of the package."""

import inspect
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.events import EventStorage

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling import BalancedFCOS
from d2_balance.modeling.compatibility import HEADS
from d2_balance.modeling.criterion import watched
from d2_balance.modeling.meta_arch.fcos import centerness_targets

from ..conftest import CLASSES, make_inputs, small_cfg

STOCK_ARGUMENTS = inspect.signature(FCOS.__init__).parameters
DENSE = sorted(cls.name for cls in HEADS["FCOS"].cls_losses)
KEYS = ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]


def stock_fcos(cfg):
    """Detectron2's own model with the modules of ours."""
    arguments = BalancedFCOS.from_config(cfg)
    return FCOS(**{k: v for k, v in arguments.items() if k in STOCK_ARGUMENTS}).train()


def step(model, inputs):
    """Losses and gradients of one training step."""
    model.zero_grad()
    with EventStorage(0):
        losses = model(inputs)
        sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def capture(monkeypatch, model):
    """The Samples that the losses of the model see."""
    seen = []
    original = model.sample_losses
    monkeypatch.setattr(model, "sample_losses", lambda s: seen.append(s) or original(s))
    return seen


def statistics_keys(file):
    return ["MODEL.BALANCE.CLASS_COUNTS_FILE", file]


@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["objects", "one empty", "all empty"])
def test_losses_and_gradients_equal_stock(empty):
    cfg = small_cfg("fcos")
    stock, ours = stock_fcos(cfg), build_model(cfg)
    ours.load_state_dict(stock.state_dict(), strict=False)
    inputs = make_inputs(empty=empty)
    expected, expected_grads = step(stock, inputs)
    losses, grads = step(ours, inputs)
    assert list(losses) == list(expected) == KEYS
    assert (losses["loss_fcos_loc"] == 0) == (losses["loss_fcos_ctr"] == 0) == (len(empty) == 2)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert grad is not None and grads[name] is not None, name
        torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6, msg=name)


def test_normaliser_follows_stock_over_steps_and_is_resumed():
    cfg = small_cfg("fcos")
    stock, ours = stock_fcos(cfg), build_model(cfg)
    assert ours.loss_normalizer.item() == 300
    for seed in range(3):
        step(stock, make_inputs(seed=seed))
        step(ours, make_inputs(seed=seed))
        assert ours.loss_normalizer.item() == pytest.approx(stock.loss_normalizer)
    resumed = build_model(cfg)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.loss_normalizer == ours.loss_normalizer < 300


def test_named_stock_losses_equal_stock():
    cfg = small_cfg("fcos", "MODEL.BALANCE.CLS_LOSS", "Focal", "MODEL.BALANCE.BOX_LOSS", "GIoU")
    stock, ours = stock_fcos(cfg), build_model(cfg)
    ours.load_state_dict(stock.state_dict(), strict=False)
    expected, _ = step(stock, make_inputs())
    losses, _ = step(ours, make_inputs())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)


def test_inference_equals_stock():
    cfg = small_cfg("fcos", "MODEL.FCOS.SCORE_THRESH_TEST", 0.01)
    stock, ours = stock_fcos(cfg).eval(), build_model(cfg).eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    with torch.no_grad():
        for one, other in zip(stock(make_inputs()), ours(make_inputs()), strict=True):
            one, other = one["instances"], other["instances"]
            assert len(one) == len(other) > 0
            torch.testing.assert_close(other.scores, one.scores)
            torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor)


@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["objects", "one empty", "all empty"])
@pytest.mark.parametrize("loss", DENSE)
def test_every_dense_loss_trains(loss, empty, counts_file):
    keys = ["MODEL.BALANCE.CLS_LOSS", loss, *statistics_keys(counts_file)]
    model = build_model(small_cfg("fcos", *keys))
    inputs = make_inputs(empty=empty)
    losses, grads = step(model, inputs)
    assert list(losses) == KEYS
    assert all(value.isfinite() for value in losses.values()), losses
    head = {name: grad for name, grad in grads.items() if name.startswith("head.")}
    assert [name for name, grad in head.items() if grad is None] == []
    assert [name for name, grad in head.items() if not grad.isfinite().all()] == []
    if not empty:
        assert [name for name, grad in head.items() if (grad == 0).all()] == []
    with torch.no_grad():
        assert len(model.eval()(inputs)) == 2


@pytest.mark.parametrize("loss", DENSE)
def test_every_dense_loss_is_finite_in_half_precision(loss, counts_file):
    keys = ["MODEL.BALANCE.CLS_LOSS", loss, *statistics_keys(counts_file)]
    keys += ["MODEL.BALANCE.BOX_LOSS", "GHMR" if loss == "GHMC" else "GIoU"]
    # P7 must not be 1 x 1: torch's bfloat16 convolution returns NaN gradients there
    keys += ["MODEL.FCOS.IN_FEATURES", "['p3', 'p4', 'p5']"]
    model = build_model(small_cfg("fcos", *keys))
    with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_inputs())
    sum(losses.values()).backward()
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    grads = [p.grad for p in model.head.parameters()]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("loss", [name for name, _ in BOX_LOSSES])
def test_every_box_loss_trains(loss):
    model = build_model(small_cfg("fcos", "MODEL.BALANCE.BOX_LOSS", loss))
    with torch.no_grad():  # predictions of 2 strides, so that losses on boxes have a gradient
        model.head.bbox_pred.bias.fill_(2.0)
    losses, grads = step(model, make_inputs(empty=(0,)))
    assert losses["loss_fcos_loc"].isfinite() and losses["loss_fcos_loc"] > 0
    assert grads["head.bbox_pred.bias"].isfinite().all()
    assert (grads["head.bbox_pred.bias"] != 0).all()


@pytest.mark.parametrize("loss", ["SmoothL1", "GHMR"])
def test_losses_on_deltas_see_strides_and_predictions_below_zero(loss):
    model = build_model(small_cfg("fcos", "MODEL.BALANCE.BOX_LOSS", loss))
    with torch.no_grad():
        model.head.bbox_pred.weight.zero_()
        model.head.bbox_pred.bias.fill_(-1.0)  # decoded to a box without area
    seen = []
    with watched(model, lambda samples, boxes, cls, box: seen.append((samples, boxes))):
        _, grads = step(model, make_inputs())
    ((samples, (pred, target)),) = seen
    assert (pred == -1).all()
    stride = samples.boxes[:, 2] - samples.boxes[:, 0]
    centre = (samples.boxes[:, :2] + samples.boxes[:, 2:]) / 2
    expected = torch.cat([centre - samples.gt_boxes[:, :2], samples.gt_boxes[:, 2:] - centre], 1)
    torch.testing.assert_close(target, expected / stride.unsqueeze(1))
    assert (target > 0).all()
    assert (grads["head.bbox_pred.bias"] < 0).all()  # the step raises all four distances


def test_centerness_targets_by_hand():
    # l t r b; sqrt(1/3 * 2/2) and sqrt(4/4 * 1/4)
    deltas = torch.tensor([[1.0, 2.0, 3.0, 2.0], [4.0, 4.0, 4.0, 1.0]])
    expected = torch.tensor([math.sqrt(1 / 3), 0.5])
    torch.testing.assert_close(centerness_targets(deltas), expected)


def test_samples_hold_every_point_with_ids_unique_over_the_batch(monkeypatch):
    model = build_model(small_cfg("fcos"))
    seen = capture(monkeypatch, model)
    inputs = make_inputs(images=3, empty=(1,), seed=4)
    step(model, inputs)
    (samples,) = seen
    points = sum(math.ceil(64 / stride) ** 2 for stride in (8, 16, 32, 64, 128))
    assert len(samples.labels) == 3 * points and samples.images == 3
    assert samples.num_levels == 5 and (samples.level[:64] == 0).all()
    boxes = torch.cat([x["instances"].gt_boxes.tensor for x in inputs])
    classes = torch.cat([x["instances"].gt_classes for x in inputs])
    assert samples.gt_index.min() >= 0 and samples.gt_index.max() > 2  # objects of both images
    assert torch.equal(samples.gt_boxes, boxes[samples.gt_index])
    assert torch.equal(samples.labels[samples.pos], classes[samples.gt_index])
    owner = torch.tensor([0] * 3 + [2] * 3)
    assert torch.equal(samples.image_index[samples.pos], owner[samples.gt_index])


def test_image_level_labels_reach_the_loss(counts_file, monkeypatch):
    inputs = make_inputs(
        empty=(1,), neg_category_ids=[[2], [6]], not_exhaustive_category_ids=[[4], []]
    )
    keys = ["MODEL.BALANCE.CLS_LOSS", "EQL", *statistics_keys(counts_file)]
    model = build_model(small_cfg("fcos", *keys))
    seen = capture(monkeypatch, model)
    step(model, inputs)
    annotated = set(inputs[0]["instances"].gt_classes.tolist())
    rows = [set(row.nonzero().flatten().tolist()) for row in seen[0].verified]
    assert rows == [annotated | {1, 3}, {5}]  # raw ids begin at 1
    assert seen[0].not_exhaustive.nonzero().tolist() == [[0, 3]]


def test_reweighters_and_guided_scaling_change_the_losses_they_are_for():
    weights = build_model(small_cfg("fcos")).state_dict()
    results = {}
    for name, keys in {
        "plain": [],
        "ISR": ["MODEL.BALANCE.REWEIGHTERS", ["ISR"]],
        "CARL": ["MODEL.BALANCE.REWEIGHTERS", ["CARL"]],
        "guided": ["MODEL.BALANCE.GUIDED_SCALE", 2.0],
    }.items():
        model = build_model(small_cfg("fcos", *keys))
        model.load_state_dict(weights, strict=False)
        results[name], grads = step(model, make_inputs())
        assert all(grad.isfinite().all() for grad in grads.values())
    plain = {key: value.item() for key, value in results["plain"].items()}
    for name in ("ISR", "CARL", "guided"):
        assert results[name]["loss_fcos_ctr"].item() == pytest.approx(plain["loss_fcos_ctr"])
    assert results["CARL"]["loss_fcos_cls"].item() == pytest.approx(plain["loss_fcos_cls"])
    assert results["CARL"]["loss_fcos_loc"] > 1.5 * plain["loss_fcos_loc"]  # added, not replaced
    assert results["ISR"]["loss_fcos_loc"].item() == pytest.approx(plain["loss_fcos_loc"])
    guided = results["guided"]
    assert guided["loss_fcos_cls"].item() == pytest.approx(2 * guided["loss_fcos_loc"].item())


def test_ghm_c_counts_level_by_level(monkeypatch):
    keys = ["MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.BALANCE.GHMC.PER_LEVEL", True]
    model = build_model(small_cfg("fcos", *keys))
    density, counts = model.cls_loss.density, []
    update = density.update
    monkeypatch.setattr(density, "update", lambda total: (counts.append(total), update(total)))
    step(model, make_inputs())
    assert density.scales.shape == (5, 30)
    assert counts[0][-1].sum() == 2 * CLASSES  # the last level: one point in each image


@pytest.mark.parametrize("loss", ["GHMC", "EQL", "EFL"])
def test_state_of_the_losses_is_saved(loss, counts_file):
    keys = ["MODEL.BALANCE.CLS_LOSS", loss, "MODEL.BALANCE.BOX_LOSS", "GHMR"]
    cfg = small_cfg("fcos", *keys, *statistics_keys(counts_file))
    model, resumed = build_model(cfg), build_model(cfg)
    step(model, make_inputs())
    resumed.load_state_dict(model.state_dict())
    one, _ = step(model, make_inputs(seed=1))
    other, _ = step(resumed, make_inputs(seed=1))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    assert model.box_loss.density.acc.sum() > 0


def test_p6_and_p7_come_from_p5():
    cfg = small_cfg("fcos")
    ours = build_backbone(cfg, ShapeSpec(channels=3))
    assert ours.top_block.in_feature == "p5"
    assert ours.top_block.p6.in_channels == 16
    assert {name: shape.stride for name, shape in ours.output_shape().items()} == {
        "p3": 8,
        "p4": 16,
        "p5": 32,
        "p6": 64,
        "p7": 128,
    }


def test_softmax_losses_are_refused_by_name(counts_file):
    refused = sorted({name for name, _ in CLS_LOSSES} - set(DENSE))
    assert "SoftmaxCE" in refused
    for name in refused:
        keys = ["MODEL.BALANCE.CLS_LOSS", name, *statistics_keys(counts_file)]
        with pytest.raises(ValueError, match=rf"CLS_LOSS {name} .*FCOS.*Focal"):
            build_model(small_cfg("fcos", *keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["CENTER_SAMPLING_RADIUS", 0.0], r"CENTER_SAMPLING_RADIUS is 0.0; must be .* above 0"),
        (["IN_FEATURES", ["p2"]], r"IN_FEATURES is \['p2'\]; must be some of p3, p4, p5"),
        (["IN_FEATURES", []], r"IN_FEATURES is \[\]; must be some of p3"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    keys[0] = f"MODEL.FCOS.{keys[0]}"
    with pytest.raises(ValueError, match=rf"MODEL\.FCOS\.{message}"):
        build_model(small_cfg("fcos", *keys))
