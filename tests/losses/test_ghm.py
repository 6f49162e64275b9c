"""GHM-C and GHM-R: densities, moving averages, edges, levels."""

import math
from types import SimpleNamespace

import pytest
import torch

from d2_balance.losses import GHMCLoss, GHMRLoss, Samples, SigmoidCELoss
from d2_balance.losses._kernels.density import GradientDensity, gradient_bins
from d2_balance.modeling.criterion import SampleNormalizer, detection_losses


def samples(logits, labels, num_classes, **fields):
    return Samples(logits=logits, labels=labels, num_classes=num_classes, **fields)


def slow_ghm_c(logits, labels, num_classes, bins, momentum, acc):
    """The paper's loop over bins (unit regions), with the released code's moving average."""
    onehot = torch.zeros_like(logits)
    for row, label in enumerate(labels.tolist()):
        if label < num_classes:
            onehot[row, label] = 1
    norm = (logits.sigmoid() - onehot).abs()
    entries, used, total = [], 0, logits.numel()
    weights = torch.zeros_like(logits)
    for b in range(bins):
        inside = (norm >= b / bins) & (norm < (b + 1) / bins if b < bins - 1 else norm <= 1)
        count = int(inside.sum())
        if count:
            used += 1
            acc[b] = momentum * acc[b] + (1 - momentum) * count
            weights[inside] = total / acc[b]
    for z, y, w in zip(logits.flatten(), onehot.flatten(), weights.flatten(), strict=True):
        ce = math.log1p(math.exp(-abs(z))) + max(z, 0) - z * y
        entries.append(w / used * ce)
    return sum(entries) / total


def test_loss_equals_a_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    loss, acc = GHMCLoss(bins=8, momentum=0.75).double(), [0.0] * 8
    for _ in range(3):
        logits = torch.randn(20, 3, generator=generator, dtype=torch.float64) * 2
        labels = torch.randint(0, 4, (20,), generator=generator)
        expected = slow_ghm_c(logits, labels, 3, 8, 0.75, acc)
        assert loss(samples(logits, labels, 3)) == pytest.approx(float(expected), rel=1e-9)


def test_saturated_entries_fall_into_the_last_bin():
    # float32: sigmoid(30) rounds to 1, so g = 1 exactly for a negative
    assert gradient_bins(torch.tensor([0.0, 0.0999, 0.1, 0.999, 1.0]), 10).tolist() == [
        0,
        0,
        1,
        9,
        9,
    ]
    value = GHMCLoss(bins=10, momentum=0.0)(samples(torch.tensor([[30.0]]), torch.tensor([1]), 1))
    assert value == pytest.approx(30.0)  # one entry, one bin: its own cross-entropy


@pytest.mark.parametrize(
    ("momentum", "ratios"), [(0.75, [4.0, 2.286, 1.730, 1.463]), (0.7, [3.333, 1.961, 1.522])]
)
def test_official_average_starts_too_large_and_debiased_does_not(momentum, ratios):
    # a constant count R: S_t = R (1 - a^t), so weights are 1 / (1 - a^t) too large
    official = GradientDensity(1, momentum, "official")
    debiased = GradientDensity(1, momentum, "debiased")
    for ratio in ratios:
        for density in (official, debiased):
            density.update(torch.tensor([[40.0]]))
        assert 40 / official.density().item() == pytest.approx(ratio, abs=1e-3)
        assert 40 / debiased.density().item() == pytest.approx(1.0, abs=1e-12)


def test_debiased_counts_steps_of_each_bin():
    density = GradientDensity(2, 0.75, "debiased")
    density.update(torch.tensor([[40.0, 0.0]]))
    density.update(torch.tensor([[40.0, 5.0]]))
    assert density.density().tolist() == pytest.approx([40.0, 5.0])


def test_paper_average_moves_empty_bins_too():
    density = GradientDensity(2, 0.5, "paper")
    density.update(torch.tensor([[8.0, 4.0]]))
    density.update(torch.tensor([[8.0, 0.0]]))
    # bin 0: .5 * 4 + .5 * 8 = 6; bin 1: .5 * 2 + 0 = 1; scale is M * S with M = 2
    assert density.acc.tolist() == [6.0, 1.0]
    assert density.scales.tolist() == [[12.0, 2.0]]


@pytest.mark.parametrize("mode", ["official", "debiased", "paper"])
def test_nothing_counted_leaves_the_density_alone(mode):
    loss = GHMCLoss(bins=4, momentum=0.5, ema_mode=mode)
    loss(samples(torch.randn(5, 2), torch.tensor([0, 1, 2, 2, 2]), 2))
    before = loss.density.acc.clone()
    value = loss(samples(torch.zeros(0, 2), torch.zeros(0).long(), 2))
    assert value == 0 and torch.equal(loss.density.acc, before)


def test_levels_share_one_density_in_turn():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 2, generator=generator)
    labels = torch.randint(0, 3, (30,), generator=generator)
    level = torch.arange(30) // 10
    per_level = GHMCLoss(bins=5, momentum=0.5, per_level=True)
    value = per_level(samples(logits, labels, 2, level=level, num_levels=3))
    single = GHMCLoss(bins=5, momentum=0.5)
    parts = [single(samples(logits[level == i], labels[level == i], 2)) for i in range(3)]
    assert value == pytest.approx(float(sum(parts)), rel=1e-6)
    assert torch.equal(per_level.density.acc, single.density.acc)


def test_box_levels_share_one_density_in_turn():
    generator = torch.Generator().manual_seed(3)
    pred, target = torch.randn(2, 30, 4, generator=generator) * 0.1
    level = torch.arange(30) // 10
    inputs = {
        "logits": torch.zeros(31, 2),
        "labels": torch.cat([torch.tensor([2]), torch.zeros(30).long()]),  # one negative row first
        "level": torch.cat([torch.tensor([2]), level]),
        "num_levels": 4,  # the last level has no positive, and adds nothing
    }
    transform = SimpleNamespace(get_deltas=lambda boxes, gt: target, weights=(1.0, 1.0, 1.0, 1.0))
    batch = Samples(
        **inputs,
        num_classes=2,
        pred_deltas=pred,
        boxes=pred,
        gt_boxes=pred,
        box_transform=transform,
    )
    per_level, single = (GHMRLoss(bins=5, momentum=0.5, per_level=x) for x in (True, False))
    found = detection_losses(batch, SigmoidCELoss(), per_level, [], SampleNormalizer())[
        "loss_box_reg"
    ]
    parts = [single(pred[level == i], target[level == i]) for i in range(3)]
    assert found == pytest.approx(float(sum(parts)), rel=1e-6)
    assert torch.equal(per_level.density.acc, single.density.acc)
    per_level.eval(), single.eval()  # each part counts its own bins against the same density
    found = detection_losses(batch, SigmoidCELoss(), per_level, [], SampleNormalizer().eval())
    parts = [single(pred[level == i], target[level == i]) for i in range(3)]
    assert found["loss_box_reg"] == pytest.approx(float(sum(parts)), rel=1e-6)
    assert torch.equal(per_level.density.acc, single.density.acc)


def test_joint_histogram_differs_from_levels():
    logits = torch.randn(30, 2, generator=torch.Generator().manual_seed(2))
    labels = torch.full((30,), 2)
    fields = {"level": torch.arange(30) // 10, "num_levels": 3}
    joint = GHMCLoss(bins=5)(samples(logits, labels, 2, **fields))
    split = GHMCLoss(bins=5, per_level=True)(samples(logits, labels, 2, **fields))
    assert split > 2 * joint  # three level losses are added


def test_ghm_r_without_positives_is_zero_and_keeps_the_density():
    loss = GHMRLoss(bins=4)
    loss(torch.randn(6, 4), torch.zeros(6, 4))
    before = loss.density.acc.clone()
    pred = torch.zeros(0, 4, requires_grad=True)
    value = loss(pred, torch.zeros(0, 4))
    value.backward()
    assert value == 0 and torch.equal(loss.density.acc, before)


def test_ghm_r_of_one_coordinate_by_hand():
    # d = .3 of four, mu = .4: sqrt(.09 + .16) - .4 = .1 in bin floor(.3 / .5 * 10) = 6;
    # three zeros in bin 0. Two bins: (0 / 3 + .1 / 1) / 2 = .05
    loss = GHMRLoss(mu=0.4, bins=10, momentum=0.0)
    value = loss(torch.tensor([[0.3, 0, 0, 0]], dtype=torch.float64), torch.zeros(1, 4).double())
    assert value == pytest.approx(0.05, abs=1e-12)
    assert loss.density.acc.tolist() == [3, 0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_easy_and_hard_bins_weigh_the_same():
    # 99 easy negatives and one hard one: GHM gives the hard entry half of the weight
    logits = torch.cat([torch.full((99, 1), -6.0), torch.full((1, 1), 4.0)]).requires_grad_()
    labels = torch.full((100,), 1)
    GHMCLoss(bins=10, momentum=0.0)(samples(logits, labels, 1)).backward()
    weight = logits.grad.squeeze(1) / logits.detach().sigmoid().squeeze(1)
    assert weight[:99].sum() == pytest.approx(weight[99].item(), rel=1e-5)


def test_stats_name_dead_bins():
    loss = GHMCLoss(bins=10, momentum=0.0)
    loss(samples(torch.full((8, 1), -5.0), torch.full((8,), 1), 1))
    stats = loss.log_values()
    assert stats["dead_bins"] == 9
    assert stats["density"].tolist() == [8] + [0] * 9


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"bins": 0}, "bins"),
        ({"bins": 2.5}, "bins"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"ema_mode": "none"}, "ema_mode"),
    ],
)
@pytest.mark.parametrize("cls", [GHMCLoss, GHMRLoss])
def test_arguments_out_of_range_are_named(cls, arguments, name):
    with pytest.raises(ValueError, match=f"{cls.name}: {name} is .*; must be"):
        cls(**arguments)


def test_mu_must_be_positive():
    with pytest.raises(ValueError, match="GHMR: mu is 0; must be a number above 0"):
        GHMRLoss(mu=0)


@pytest.mark.parametrize("bins", [256, 257])
def test_logits_that_are_no_numbers_give_a_loss_that_is_none(bins):
    """The trainer then names the loss; counting bins must not fail before."""
    logits = torch.full((3, 2), torch.nan, requires_grad=True)
    samples = Samples(logits=logits, labels=torch.tensor([0, 1, 2]), num_classes=2)
    assert GHMCLoss(bins=bins)(samples).isnan()
