"""Balanced L1: values and gradients of the paper, also for beta other than 1."""

import math

import pytest
import torch

from d2_balance.losses import BalancedL1Loss

ALPHA, GAMMA = 0.5, 1.5
B = math.exp(GAMMA / ALPHA) - 1


def grad(x, **arguments):
    pred = torch.tensor([[x, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    BalancedL1Loss(**arguments)(pred, torch.zeros(1, 4).double()).sum().backward()
    return pred.grad[0, 0].item()


@pytest.mark.parametrize("x", [0.01, 0.3, 0.99])
def test_grad_of_inliers_is_the_papers(x):
    assert grad(x) == pytest.approx(ALPHA * math.log(B * x + 1))


@pytest.mark.parametrize("x", [1.0, 5.0])
def test_grad_of_outliers_is_gamma(x):
    assert grad(x) == pytest.approx(GAMMA)


@pytest.mark.parametrize("beta", [0.11, 0.5, 2.0])
def test_grad_is_zero_at_zero_and_continuous_at_beta(beta):
    # published code gives alpha (1 / beta - 1) at 0: 0.5 at beta .5, 4 at .11
    assert grad(1e-9, beta=beta) == pytest.approx(0, abs=1e-6)
    below, above = grad(beta * (1 - 1e-9), beta=beta), grad(beta * (1 + 1e-9), beta=beta)
    assert below == pytest.approx(above, rel=1e-6) == pytest.approx(GAMMA, rel=1e-6)


def test_value_is_continuous_at_one():
    # alpha / b (b + 1) ln(b + 1) - alpha = gamma + gamma / b - alpha, since ln(b + 1) = gamma/alpha
    def value(x):
        return BalancedL1Loss()(torch.full((1, 4), x).double(), torch.zeros(1, 4).double())[
            0, 0
        ].item()

    assert value(1 - 1e-7) == pytest.approx(value(1.0), abs=1e-5)
    assert value(1.0) == pytest.approx(GAMMA + GAMMA / B - ALPHA, abs=1e-6)


@pytest.mark.parametrize("name", ["alpha", "gamma", "beta"])
def test_arguments_must_be_positive(name):
    with pytest.raises(ValueError, match=f"BalancedL1: {name} is 0.0; must be"):
        BalancedL1Loss(**{name: 0.0})
