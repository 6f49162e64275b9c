"""The balanced RPN: stock where nothing is named, and every loss that works with one class."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_balance.engine.setup.validate import check_losses, check_losses_are_used
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.build import one_class_losses
from d2_balance.modeling.proposal_generator.rpn import BalancedRPN

from ..conftest import make_inputs, small_cfg
from .test_parity import step

BALANCED = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
CLS = sorted(name for name, _ in one_class_losses(CLS_LOSSES))
BOX = sorted(name for name, _ in one_class_losses(BOX_LOSSES))


def rpn_cfg(*overrides):
    return small_cfg("faster", *BALANCED, *overrides)


def key(name):
    return f"MODEL.BALANCE.RPN.{name}"


def rpn_step(model, **inputs):
    """RPN losses of one step, and the gradients they leave in the RPN head."""
    torch.manual_seed(3)
    with EventStorage(0):
        losses = model(make_inputs(**inputs))
    losses = {name: value for name, value in losses.items() if "rpn" in name}
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_loc"]
    sum(losses.values()).backward()
    return losses, [p.grad for p in model.proposal_generator.rpn_head.parameters()]


def watch(rpn):
    """The list that every batch of samples is put into."""
    seen = []
    rpn.samples = lambda *args: seen.append(BalancedRPN.samples(rpn, *args)) or seen[-1]
    return seen


@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["objects", "one empty", "all empty"])
@pytest.mark.parametrize(
    "stock_keys",
    [(), ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", "MODEL.RPN.LOSS_WEIGHT", 0.5)],
    ids=["stock", "giou"],
)
def test_losses_and_gradients_equal_stock(stock_keys, empty):
    stock = build_model(small_cfg("faster", *stock_keys))
    ours = build_model(rpn_cfg(*stock_keys))
    assert type(ours.proposal_generator) is BalancedRPN
    ours.load_state_dict(stock.state_dict(), strict=False)
    expected, expected_grads = step(stock, make_inputs(empty=empty))
    losses, grads = step(ours, make_inputs(empty=empty))
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("sampling_free", [True, False])
@pytest.mark.parametrize("name", CLS)
def test_every_loss_of_one_class_trains_the_rpn(name, sampling_free):
    torch.manual_seed(0)
    model = build_model(rpn_cfg(key("CLS_LOSS"), name, key("SAMPLING_FREE"), sampling_free))
    assert model.proposal_generator.cls_loss.name == name
    for empty in ((), (0, 1)):
        model.zero_grad()
        losses, grads = rpn_step(model, empty=empty)
        assert all(value.isfinite() for value in losses.values()), losses
        assert all(grad.isfinite().all() for grad in grads)
        assert empty == (0, 1) or (losses["loss_rpn_cls"] > 0 and grads[0].abs().sum() > 0)


@pytest.mark.parametrize("name", BOX)
def test_every_box_loss_trains_the_rpn(name):
    losses, grads = rpn_step(build_model(rpn_cfg(key("BOX_LOSS"), name)))
    assert losses["loss_rpn_loc"] > 0 and all(grad.isfinite().all() for grad in grads)


def test_ghm_per_level_gets_the_levels():
    values = {}
    for per_level in (True, False):
        torch.manual_seed(0)
        keys = [
            key("CLS_LOSS"),
            "GHMC",
            key("GHMC.PER_LEVEL"),
            per_level,
            key("SAMPLING_FREE"),
            True,
        ]
        model = build_model(rpn_cfg(*keys))
        seen = watch(model.proposal_generator)
        losses, _ = rpn_step(model, empty=(0, 1))
        values[per_level] = losses["loss_rpn_cls"].item()
    # nothing is ignored in two empty images: 3 anchors for each cell of strides 4 to 64
    assert seen[0].level.bincount().tolist() == [6 * cells for cells in (256, 64, 16, 4, 1)]
    assert seen[0].num_levels == 5
    assert values[True] != pytest.approx(values[False], rel=0.1)


def test_arguments_of_the_rpn_are_its_own():
    model = build_model(
        rpn_cfg(
            key("CLS_LOSS"), "Focal", key("FOCAL.GAMMA"), 1.0, "MODEL.BALANCE.CLS_LOSS", "Focal"
        )
    )
    assert model.proposal_generator.cls_loss.gamma == 1.0
    assert model.roi_heads.box_predictor.cls_loss.gamma == 2.0


def test_without_sampling_every_anchor_that_is_not_ignored_counts():
    """Focal loss with gamma 0, alpha -1 is cross-entropy: p = 0.5 everywhere gives log 2 each."""
    keys = [key("CLS_LOSS"), "Focal", key("FOCAL.GAMMA"), 0.0, key("FOCAL.ALPHA"), -1.0]
    model = build_model(rpn_cfg(*keys, key("SAMPLING_FREE"), True))
    rpn = model.proposal_generator
    torch.nn.init.zeros_(rpn.rpn_head.objectness_logits.weight)
    seen = watch(rpn)
    losses, _ = rpn_step(model, images=1)
    count = len(seen[0].labels)
    # strides 4, 8, 16, 32, 64 of 64 x 64 pixels, 3 anchors each, less the ignored ones
    cells = 256 + 64 + 16 + 4 + 1
    assert 256 < count <= 3 * cells
    positives = max(int((seen[0].labels == 0).sum()), 1)
    mean = 0.9 * 100 + 0.1 * positives  # the moving average after its first step
    assert losses["loss_rpn_cls"].item() == pytest.approx(count * 0.6931472 / mean, rel=1e-5)


def test_weights_are_of_the_rpn_alone():
    torch.manual_seed(0)
    plain, _ = rpn_step(build_model(rpn_cfg()))
    torch.manual_seed(0)
    keys = [
        key("CLS_LOSS_WEIGHT"),
        3.0,
        key("BOX_LOSS_WEIGHT"),
        5.0,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
        2.0,
    ]
    heavy, _ = rpn_step(build_model(rpn_cfg(*keys)))
    torch.testing.assert_close(heavy["loss_rpn_cls"], 3 * plain["loss_rpn_cls"])
    torch.testing.assert_close(heavy["loss_rpn_loc"], 10 * plain["loss_rpn_loc"])


def test_guided_scaling_brings_the_loss_to_the_size_of_the_box_loss():
    keys = [key("SAMPLING_FREE"), True, key("GUIDED_SCALE"), 2.0, key("CLS_LOSS_WEIGHT"), 7.0]
    losses, _ = rpn_step(build_model(rpn_cfg(*keys)))
    torch.testing.assert_close(losses["loss_rpn_cls"], 2 * losses["loss_rpn_loc"])


def test_prior_is_the_first_score():
    model = build_model(rpn_cfg(key("PRIOR_PROB"), 2e-4))
    bias = model.proposal_generator.rpn_head.objectness_logits.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 2e-4))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("EQL", "frequency"),
        ("SoftmaxCE", "is a softmax loss"),
        ("EQLv2", "needs outputs besides"),
        ("Nonsense", "is unknown"),
    ],
)
def test_losses_that_need_classes_are_refused(name, why):
    with pytest.raises(ValueError, match=f"{name}.*{why}|{why}.*{name}") as error:
        build_model(rpn_cfg(key("CLS_LOSS"), name))
    assert "MODEL.BALANCE.RPN.CLS_LOSS" in str(error.value) and "GHMC" in str(error.value)
    with pytest.raises(ValueError, match=why):  # before the model is built, too
        check_losses(rpn_cfg(key("CLS_LOSS"), name))


@pytest.mark.parametrize(
    "overrides",
    [
        (key("PRIOR_PROB"), 0.0),
        (key("PRIOR_PROB"), 1.0),
        (key("GUIDED_SCALE"), -1.0),
        (key("CLS_LOSS"), "GHMC", key("GHMC.BINS"), 0),
    ],
)
def test_bad_values_are_refused_with_their_key(overrides):
    with pytest.raises(ValueError, match=r"MODEL\.BALANCE\.RPN\.(PRIOR_PROB|GUIDED_SCALE|GHMC)"):
        build_model(rpn_cfg(*overrides))


def test_keys_of_the_rpn_need_the_balanced_rpn():
    cfg = small_cfg("faster", key("GHMC.BINS"), 20, key("CLS_LOSS"), "GHMC")
    with pytest.raises(ValueError, match=r"RPN\.CLS_LOSS.*set MODEL.PROPOSAL_GENERATOR.NAME Balan"):
        check_losses_are_used(cfg)
    check_losses_are_used(rpn_cfg(key("CLS_LOSS"), "GHMC"))
    with pytest.raises(ValueError, match=r"BalancedRetinaNet has no RPN"):
        check_losses_are_used(small_cfg("retinanet", key("CLS_LOSS"), "GHMC"))
