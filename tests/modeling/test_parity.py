"""With stock settings the balanced models are Detectron2's: losses and parameter gradients."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..conftest import STOCK, make_inputs, small_cfg


def step(model, inputs):
    """Losses and gradients of one training step with fixed proposal sampling."""
    torch.manual_seed(3)
    with EventStorage(0):
        losses = model(inputs)
        sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["objects", "one empty", "all empty"])
@pytest.mark.parametrize("kind", sorted(STOCK))
def test_losses_and_gradients_equal_stock(kind, empty):
    stock = build_model(small_cfg(kind, balanced=False))
    ours = build_model(small_cfg(kind))
    ours.load_state_dict(stock.state_dict(), strict=False)
    inputs = make_inputs(empty=empty)
    expected, expected_grads = step(stock, inputs)
    losses, grads = step(ours, inputs)
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", sorted(STOCK))
def test_stock_losses_named_explicitly_equal_stock(kind):
    names = ("Focal", 0.1) if kind == "retinanet" else ("SoftmaxCE", 0.0)
    overrides = ["MODEL.BALANCE.CLS_LOSS", names[0], "MODEL.BALANCE.BOX_LOSS", "SmoothL1"]
    overrides += ["MODEL.BALANCE.SMOOTHL1.BETA", names[1]]
    stock = build_model(small_cfg(kind, balanced=False))
    ours = build_model(small_cfg(kind, *overrides))
    ours.load_state_dict(stock.state_dict(), strict=False)
    expected, _ = step(stock, make_inputs())
    losses, _ = step(ours, make_inputs())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(STOCK))
def test_giou_equals_stock(kind):
    keys = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"]
    keys += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"]
    stock = build_model(small_cfg(kind, *keys, balanced=False))
    weights = {name: value.clone() for name, value in stock.state_dict().items()}
    expected, _ = step(stock, make_inputs())
    for ours in (
        build_model(small_cfg(kind, *keys)),
        build_model(small_cfg(kind, "MODEL.BALANCE.BOX_LOSS", "GIoU")),
    ):
        ours.load_state_dict(weights, strict=False)
        losses, _ = step(ours, make_inputs())
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(STOCK))
def test_inference_equals_stock(kind):
    stock = build_model(small_cfg(kind, balanced=False)).eval()
    ours = build_model(small_cfg(kind)).eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    with torch.no_grad():
        for one, other in zip(stock(make_inputs()), ours(make_inputs()), strict=True):
            one, other = one["instances"], other["instances"]
            torch.testing.assert_close(other.scores, one.scores)
            torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor)


def test_normaliser_follows_stock_over_steps():
    stock = build_model(small_cfg("retinanet", balanced=False))
    ours = build_model(small_cfg("retinanet"))
    for seed in range(3):
        step(stock, make_inputs(seed=seed))
        step(ours, make_inputs(seed=seed))
        assert ours.loss_normalizer.item() == pytest.approx(stock.loss_normalizer)


@pytest.mark.parametrize("kind", ["retinanet", "mask", "cascade"])
def test_one_seed_gives_stock_weights_and_the_same_steps_keep_them(kind):
    """Bit for bit; RetinaNet's focal loss is summed in another order."""
    models = []
    for balanced in (False, True):
        torch.manual_seed(7)
        model = build_model(small_cfg(kind, balanced=balanced)).train()
        start = {name: value.clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        for seed in range(3):
            torch.manual_seed(seed)  # sampling of anchors and proposals
            optimizer.zero_grad()
            with EventStorage():
                losses = model(make_inputs(seed=seed))
            sum(losses.values()).backward()
            optimizer.step()
        models.append((start, dict(model.named_parameters()), losses))
    (stock_start, stock, stock_losses), (start, ours, losses) = models
    assert stock.keys() == ours.keys()
    assert sum(not torch.equal(start[name], value) for name, value in stock.items()) > 50
    for name in stock:
        assert torch.equal(start[name], stock_start[name]), name
    tolerance = 1e-7 if kind == "retinanet" else 0
    for name, value in stock_losses.items():
        # the value alone is summed in another order
        torch.testing.assert_close(losses[name], value, atol=1e-7, rtol=1e-6)
    for name, value in stock.items():
        # 1.2e-7 of a weight is its last digit
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=1.2 * tolerance)
