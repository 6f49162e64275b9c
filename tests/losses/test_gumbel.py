"""Gumbel scores and GOL against the authors' figures, their formula with loops, and their ends."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import DropLoss, GOLLoss, GumbelCELoss, Samples, gumbel_ce_loss
from d2_balance.losses.drop_loss import STEPS

REFERENCE = Path(__file__).parent.parent / "reference" / "gumbel.npz"


@pytest.fixture
def ref():
    return {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}


def with_grad(compute, logits):
    logits = logits.clone().requires_grad_()
    value = compute(logits)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def learned(logits, target, low):
    """Where the release's clamps leave a gradient: see the module's docstring."""
    return (logits < 10) & (logits > torch.where(target > 0, low, -4.0))


def test_value_and_gradient_of_every_entry_equal_the_authors_figures(ref):
    logits, target = ref["logits"], ref["target"]
    assert ref["clamp"].tolist() == [-4, 10]
    found, grad = with_grad(lambda z: gumbel_ce_loss(z.clamp(-4, 10), target).clamp(max=20), logits)
    close(found, ref["loss"])
    inside = learned(logits, target, -2.99)  # e^2.996 = 20, where the release cuts the value
    assert inside.sum() > 0.5 * inside.numel()
    close(grad[inside], ref["grad"][inside])


def test_scores_equal_the_authors_figures(ref):
    close(GumbelCELoss().probabilities(ref["test_logits"])[:, :-1], ref["test_scores"])


@pytest.mark.parametrize("case", ["mixed", "no_foreground"])
def test_gol_equals_the_authors_figures(ref, case, monkeypatch):
    logits, labels, uniform = (ref[f"{case}_{name}"] for name in ("logits", "labels", "uniform"))
    noise = (uniform * STEPS).to(torch.int16)
    # by its module: the package exports a function of the same name
    module = importlib.import_module("d2_balance.losses.drop_loss")
    monkeypatch.setattr(module, "drop_noise", lambda _: noise)
    loss = GOLLoss(class_frequency=ref["class_frequency"], lambda_=float(ref["lambda_"]))

    def mean(z):
        return loss(Samples(logits=z, labels=labels, num_classes=8)).sum() / len(z)

    close(with_grad(lambda z: mean(z.clamp(-4, 10)), logits)[0], ref[f"{case}_loss"])
    target = Samples(logits=logits, labels=labels, num_classes=8).onehot
    # below -3.32 the BCE of torch divides by 1e-12 in place of p (1 - p)
    inside = learned(logits, target, -3.3)
    assert inside.sum() > 0.5 * inside.numel()
    close(with_grad(mean, logits)[1][inside], ref[f"{case}_grad"][inside])


def test_positives_keep_the_gradient_that_the_authors_clamps_take(ref):
    logits = ref["positive_logits"].unsqueeze(1)
    _, grad = with_grad(lambda z: gumbel_ce_loss(z, torch.ones_like(z)), logits)
    expected = [-math.exp(-max(z, -4.0)) for z in logits.squeeze(1).tolist()]
    assert grad.squeeze(1).tolist() == pytest.approx(expected, rel=1e-9)
    whole = logits.squeeze(1) > -3.32
    whole &= logits.squeeze(1) < 10
    close(grad.squeeze(1)[whole], ref["positive_grad"][whole])
    lost = (logits.squeeze(1) < -3.5) | (logits.squeeze(1) > 10)
    assert (ref["positive_grad"][lost].abs() < 1e-2).all()  # theirs


def test_loss_and_gradient_equal_the_formula_with_loops():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20, 3, dtype=torch.float64, generator=generator).clamp(min=-3)
    labels = torch.arange(20) % 4
    value, grad = with_grad(lambda z: GumbelCELoss()(z, labels), logits)
    for i, label in enumerate(labels.tolist()):
        for j in range(3):
            u = math.exp(-logits[i, j])
            expected = (u, -u) if j == label else (-math.log(-math.expm1(-u)), u / math.expm1(u))
            if j == label and u > math.exp(4):
                expected = (math.exp(4) * (-3 - logits[i, j].item()), -math.exp(4))
            assert value[i, j].item() == pytest.approx(expected[0], rel=1e-9)
            assert grad[i, j].item() == pytest.approx(expected[1], rel=1e-9)


def test_gol_weights_entries_as_drop_loss_does():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 4, (50,))
    frequency = [0.5, 0.1, 0.0001]
    torch.manual_seed(1)
    gol = GOLLoss(class_frequency=frequency)(logits, labels)
    plain = GumbelCELoss()(logits, labels)
    torch.manual_seed(1)
    drop = DropLoss(class_frequency=frequency)(logits, labels)
    assert torch.equal(gol == 0, drop == 0) and (gol == 0).any()
    torch.testing.assert_close(gol[gol != 0], plain[gol != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_logits_have_the_values_of_their_limits(dtype):
    logits = torch.tensor([[-1000.0], [-90.0], [-5.0], [50.0], [90.0], [1000.0]], dtype=dtype)
    value, grad = with_grad(lambda z: GumbelCELoss()(z, torch.ones(6).long()), logits)
    torch.testing.assert_close(value, logits.clamp(min=0))  # -log(1 - e^-u) = z + u/2 - ...
    torch.testing.assert_close(grad, (logits > 0).to(dtype))


def test_negatives_keep_their_digits_in_single_precision():
    logits = torch.linspace(-3, 20, 400).unsqueeze(1)
    labels = torch.ones(400).long()
    value, grad = with_grad(lambda z: GumbelCELoss()(z, labels), logits)
    exact, exact_grad = with_grad(lambda z: GumbelCELoss()(z, labels), logits.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=3e-6, atol=0)


@pytest.mark.parametrize("probability", [0.001, 0.5, 0.9])
def test_the_logit_of_a_probability_has_that_score(probability):
    loss = GumbelCELoss()
    logits = torch.tensor([[loss.logit(probability)]], dtype=torch.float64)
    assert loss.probabilities(logits)[0, 0].item() == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_logit", 1.0), ("lambda_", 2.0), ("threshold", "hard"), ("class_frequency", [2.0])],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"GOL: {name} is .*; must be"):
        GOLLoss(**{"class_frequency": [0.1], name: value})
