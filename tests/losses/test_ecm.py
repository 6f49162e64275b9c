"""ECM loss against the authors' figures, their formula with loops, and its edge cases."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import ECMLoss, Samples
from d2_balance.losses.ecm import class_odds, ecm_loss, margin_and_weight

REFERENCE = Path(__file__).parent.parent / "reference" / "ecm.npz"


@pytest.fixture
def ref():
    return {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}


def loss_of(ref):
    return ECMLoss(class_count=ref["image_count"], fg_bg_ratio=float(ref["fg_bg_ratio"]))


def test_value_gradient_weights_and_margins_equal_the_authors_figures(ref):
    loss, logits = loss_of(ref), ref["logits"].clone().requires_grad_()
    keep = ref["labels"] >= 0
    samples = Samples(logits=logits[keep], labels=ref["labels"][keep], num_classes=9)
    value = loss(samples).sum() / keep.sum()
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, ref["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, ref["grad"], rtol=1e-6, atol=1e-9)
    margin, weight = margin_and_weight(loss.odds)
    torch.testing.assert_close(weight, ref["class_weight"], rtol=1e-6, atol=0)
    expected = ref["margin_neg"] - ref["margin_pos"]  # of e^-z and of e^z
    torch.testing.assert_close(margin, expected, rtol=1e-6, atol=1e-9)


def test_scores_equal_the_authors_figures(ref):
    found = loss_of(ref).probabilities(ref["test_logits"])
    torch.testing.assert_close(found, ref["test_scores"], rtol=1e-6, atol=1e-9)


def test_loss_equals_the_released_form_with_loops():
    count, rho = [50, 4, 1], 6.3313
    whole = [*count, rho * sum(count)]
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    found = ECMLoss(class_count=count)(Samples(logits=logits, labels=labels, num_classes=3))
    for i, label in enumerate(labels.tolist()):
        for j, n in enumerate(whole):
            a = (sum(whole) - n) / n
            up = math.exp(logits[i, j]) * (1 + a**-0.25)
            down = math.exp(-logits[i, j]) * (1 + a**0.25)
            p = up / (up + down)
            expected = -a * math.log(1 + 1 / a) * math.log(p if j == label else 1 - p)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_gradient_is_that_of_the_plain_formula():
    torch.manual_seed(0)
    loss = ECMLoss(class_count=[50, 4, 1])
    logits = (torch.randn(30, 4, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(0, 4, (30,))
    target = torch.nn.functional.one_hot(labels, 4).double()
    plain, fast = ecm_loss(logits, target, loss.odds), loss(logits, labels)
    upstream = torch.rand(30, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plain * upstream).sum(), logits)
    (found,) = torch.autograd.grad((fast * upstream).sum(), logits)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_class_without_images_counts_as_one():
    assert torch.equal(class_odds(torch.tensor([5, 0]), 2.0), class_odds(torch.tensor([5, 1]), 2.0))


def test_weights_keep_their_digits_for_rare_classes():
    # omega = a log(1 + 1/a) = 1 - 1/(2a) + ...; float32 gives 0.9464 and 1.0095 here
    count = torch.full((1203,), 1000.0)
    count[0] = 1
    _, weight = margin_and_weight(class_odds(count, 6.3313))
    assert weight[0].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("name", "value"), [("class_count", [-1.0]), ("fg_bg_ratio", 0.0)])
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"ECM: {name} is .*; must be"):
        ECMLoss(**{"class_count": [1.0, 2.0], name: value})
