"""The schedule of beta and its hook."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2_balance.engine.hooks.beta_decay import BetaDecay, decayed_beta
from d2_balance.engine.setup.rules import RULES
from d2_balance.losses import GIoULoss, SmoothL1Loss
from d2_balance.utils.rules import check_values

from ..conftest import small_cfg

DECAY = "MODEL.BALANCE.BETA_DECAY."


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # b0 .11, a .02, K 10; iterations 0, 9, 10, 25
        ("floor", [0.11, 0.11, 0.09, 0.07]),  # floor(t / 10) = 0, 0, 1, 2
        ("sawtooth", [0.11, 0.0, 0.11, 0.01]),  # t mod 10 = 0, 9, 0, 5; .11 - .18 < 0
        ("linear", [0.11, 0.092, 0.09, 0.06]),  # t / 10 = 0, .9, 1, 2.5
    ],
)
def test_modes_follow_their_formula(mode, expected):
    values = [decayed_beta(0.11, t, mode=mode, amount=0.02, period=10) for t in (0, 9, 10, 25)]
    assert values == pytest.approx(expected, abs=1e-12)


def test_beta_stops_at_the_minimum_and_never_rises_to_it():
    def late(initial, minimum):
        return decayed_beta(initial, 10**6, mode="floor", amount=0.01, period=10, minimum=minimum)

    assert late(0.11, 0.0) == 0.0
    assert late(0.11, 0.03) == 0.03
    assert late(0.02, 0.03) == 0.02


def hook_at(model, iteration, **schedule):
    hook = BetaDecay(model, **{"mode": "floor", "amount": 0.01, "period": 100, **schedule})
    hook.trainer = SimpleNamespace(iter=iteration)
    return hook


def test_every_smooth_l1_is_moved_from_its_own_start_and_in_place():
    model = nn.ModuleList([SmoothL1Loss(beta=0.11), nn.Sequential(SmoothL1Loss(beta=1.0))])
    buffers = model[0].beta, model[1][0].beta
    hook_at(model, 250).before_step()  # floor(250 / 100) = 2 steps of .01
    assert [b.item() for b in buffers] == pytest.approx([0.09, 0.98])
    assert model[0].beta is buffers[0]


def test_the_value_does_not_depend_on_where_the_run_was_entered():
    straight, resumed = SmoothL1Loss(beta=0.11), SmoothL1Loss(beta=0.11)
    for iteration in range(0, 301):
        hook_at(nn.ModuleList([straight]), iteration).before_step()
    resumed.beta.fill_(123.0)
    hook_at(nn.ModuleList([resumed]), 300).before_step()
    assert torch.equal(straight.beta, resumed.beta)


def test_a_model_without_smooth_l1_is_refused():
    with pytest.raises(ValueError, match=r"BETA_DECAY.ENABLED.*set MODEL.BALANCE.BOX_LOSS"):
        hook_at(nn.ModuleList([GIoULoss()]), 0)


def test_switched_off_gives_no_hook():
    model = nn.ModuleList([SmoothL1Loss()])
    assert BetaDecay.from_config(small_cfg("retinanet"), model) is None


def test_the_hook_takes_every_key():
    overrides = [DECAY + "ENABLED", "True", DECAY + "MODE", "linear", DECAY + "AMOUNT", "0.03"]
    overrides += [DECAY + "PERIOD", "10", DECAY + "MIN", "0.02"]
    model = nn.ModuleList([SmoothL1Loss(beta=0.11)])
    hook = BetaDecay.from_config(small_cfg("retinanet", *overrides), model)
    for iteration, beta in ((5, 0.11 - 0.015), (1000, 0.02)):
        hook.trainer = SimpleNamespace(iter=iteration)
        hook.before_step()
        assert model[0].beta.item() == pytest.approx(beta)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("MODE", "cosine", "'floor', 'sawtooth', 'linear'"),
        ("AMOUNT", "-0.1", "at least 0"),
        ("PERIOD", "0", "integer of at least 1"),
        ("MIN", "-0.5", "at least 0"),
    ],
)
def test_values_out_of_range_are_named(key, value, allowed):
    cfg = small_cfg("retinanet", DECAY + "ENABLED", "True", DECAY + key, value)
    with pytest.raises(ValueError, match=rf"MODEL.BALANCE.BETA_DECAY.{key} is .*{allowed}"):
        check_values(cfg, RULES)
    with pytest.raises(ValueError, match=key):
        BetaDecay.from_config(cfg, nn.ModuleList([SmoothL1Loss(beta=0.11)]))
