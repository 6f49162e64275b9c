"""EQLv2 and EFL: state, weights, and the closed form of the gradient."""

import math

import pytest
import torch

from d2_balance.losses import (
    EFLLoss,
    EQLv2Loss,
    FocalLoss,
    Samples,
    SigmoidCELoss,
    SoftmaxEQLv2Loss,
)
from d2_balance.losses.efl import equalized_focal_loss


def samples(labels, num_classes, columns=None, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    logits = torch.randn(len(labels), columns or num_classes, generator=generator) * scale
    return Samples(logits=logits.double().requires_grad_(), labels=labels, num_classes=num_classes)


def test_eqlv2_starts_as_the_cross_entropy_with_an_objectness_task():
    batch = samples([0, 1, 2, 2], 2, columns=3)
    target = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        batch.logits, target, reduction="none"
    )
    torch.testing.assert_close(EQLv2Loss(num_classes=2)(batch), expected)


def test_eqlv2_after_one_step_absent_classes_weigh_little_as_negatives_and_much_as_positives():
    loss = EQLv2Loss(num_classes=3)
    loss(samples([0, 3, 3], 3, columns=4))
    positive, negative = loss.class_weights()
    # g = 0: f = 1 / (1 + exp(9.6)) = 6.8e-5, positives 1 + 4 (1 - f) = 5.0
    for absent in (1, 2):
        assert negative[absent].item() == pytest.approx(6.8e-5, rel=0.01)
        assert positive[absent].item() == pytest.approx(5.0, abs=1e-3)


def test_eqlv2_adds_up_weighted_gradients():
    loss = EQLv2Loss(num_classes=1)
    logits = torch.zeros(3, 2)  # p = .5 everywhere; one positive row, two background rows
    loss(Samples(logits=logits, labels=torch.tensor([0, 1, 1]), num_classes=1))
    assert loss.pos_grad.tolist() == [0.5] and loss.neg_grad.tolist() == [1.0]
    # g = .5: f = 1 / (1 + exp(-12 (.5 - .8))) = 1 / (1 + e^3.6) = .02660
    loss(Samples(logits=logits, labels=torch.tensor([0, 1, 1]), num_classes=1))
    f = 1 / (1 + math.exp(3.6))
    assert loss.neg_grad.item() == pytest.approx(1.0 + f)
    assert loss.pos_grad.item() == pytest.approx(0.5 + 0.5 * (1 + 4 * (1 - f)))


def test_eqlv2_scores_are_multiplied_by_not_background():
    probs = EQLv2Loss(num_classes=2).probabilities(torch.tensor([[0.0, 2.0, 1.0]]))
    background = 1 / (1 + math.exp(-1))
    expected = [0.5 * (1 - background), (1 - background) / (1 + math.exp(-2)), background]
    assert probs[0].tolist() == pytest.approx(expected)


def test_efl_starts_as_the_focal_loss():
    batch = samples([0, 1, 2, 2], 2)
    torch.testing.assert_close(EFLLoss(num_classes=2)(batch), FocalLoss()(batch))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_efl_adds_up_the_gradients_of_autograd(scale):
    batch = samples([0, 1, 2, 2, 1], 2, scale=scale)
    loss = EFLLoss(num_classes=2)
    loss.ratio.copy_(torch.tensor([1.0, 0.3125]))  # exponents 2 and 7.5
    value = equalized_focal_loss(batch.logits, batch.onehot, loss.class_gamma(), 0.25, 2.0)
    (grad,) = torch.autograd.grad(value.sum(), batch.logits)
    positive, negative, count = loss.batch_statistics(batch)[0]
    torch.testing.assert_close(positive, (grad.abs() * batch.onehot).sum(0), rtol=1e-9, atol=1e-15)
    expected = (grad.abs() * (1 - batch.onehot)).sum(0)
    torch.testing.assert_close(negative, expected, rtol=1e-9, atol=1e-15)
    assert count.tolist() == [3, 3]


def test_efl_gives_starved_classes_a_larger_exponent():
    loss = EFLLoss(num_classes=2)
    for seed in range(3):
        loss(samples([0] * 6 + [2] * 6, 2, seed=seed))
    starved, fed = loss.class_gamma()[1].item(), loss.class_gamma()[0].item()
    assert starved == pytest.approx(10.0) and 2.0 <= fed < starved


def test_efl_is_finite_where_the_release_overflows():
    # at z = 120 a negative has p_t = 0 in float32, and -log p_t of the release is infinite
    logits = torch.full((2, 1), 120.0, requires_grad=True)
    value = EFLLoss(num_classes=1)(
        Samples(logits=logits, labels=torch.tensor([1, 1]), num_classes=1)
    ).sum()
    (grad,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(2 * 0.75 * 120) and grad.isfinite().all()


def test_counts_survive_beyond_the_range_of_float32():
    loss = EQLv2Loss(num_classes=1)
    loss.neg_grad.fill_(2.0**25)
    loss(Samples(logits=torch.zeros(1, 2), labels=torch.tensor([1]), num_classes=1))
    assert loss.neg_grad.item() > 2.0**25


def test_sigmoid_part_of_background_rows_counts_all_classes():
    batch = samples([2, 2], 2, columns=3)
    value = EQLv2Loss(num_classes=2)(batch)
    plain = SigmoidCELoss()(Samples(logits=batch.logits[:, :2], labels=batch.labels, num_classes=2))
    torch.testing.assert_close(value[:, :2], plain)


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (EQLv2Loss, {"gamma": 0.0}, "gamma"),
        (EQLv2Loss, {"alpha": -1.0}, "alpha"),
        (EFLLoss, {"alpha": 2.0}, "alpha"),
        (EFLLoss, {"scale": -1.0}, "scale"),
        (EFLLoss, {"num_classes": 0}, "num_classes"),
    ],
)
def test_arguments_out_of_range_are_named(cls, arguments, name):
    with pytest.raises(ValueError, match=f"{cls.name}: {name} is .*; must be"):
        cls(**{"num_classes": 2, **arguments})


@pytest.mark.parametrize("columns", [3, 4])
def test_softmax_eqlv2_equals_its_formula_with_loops_over_three_batches(columns):
    generator = torch.Generator().manual_seed(0)
    loss = SoftmaxEQLv2Loss(num_classes=3)
    pushed = {"up": [0.0] * 3, "down": [0.0] * 3}
    for step in range(3):
        logits = torch.randn(15, columns, dtype=torch.float64, generator=generator)
        logits.requires_grad_()
        labels = torch.randint(0, columns, (15,), generator=generator)
        found = loss(logits, labels)
        (grad,) = torch.autograd.grad(found.sum(), logits)
        f = [
            1 / (1 + math.exp(-12 * (u / (d + 1e-10) - 0.8)))
            for u, d in zip(*pushed.values(), strict=True)
        ]
        if step == 0:
            f = [1.0] * 3
        f = f + [1.0] * (columns - 3)
        for i, (z, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
            weight = 1 + 4 * (1 - f[y])
            terms = [(1 if k == y else f[k]) * math.exp(z[k]) for k in range(columns)]
            expected = -weight * math.log(terms[y] / sum(terms))
            assert found[i].item() == pytest.approx(expected, rel=1e-9)
            for k in range(columns):
                expected = weight * (terms[k] / sum(terms) - (k == y))
                assert grad[i, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
                if k < 3:
                    pushed["up" if k == y else "down"][k] += abs(expected)
    assert loss.pos_grad.tolist() == pytest.approx(pushed["up"])
    assert loss.neg_grad.tolist() == pytest.approx(pushed["down"])
