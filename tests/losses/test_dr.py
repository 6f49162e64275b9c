"""DR loss: oracle from the paper, pools, edges."""

import math

import pytest
import torch

from d2_balance.losses import DRLoss, Samples


def slow_dr(logits, labels, num_classes, margin=0.5, L=6.0, tau=4.0, lp=1.0, ln=0.0798235600147928):
    """The paper's formula for one image, entry by entry."""
    positive, negative = [], []
    for row, label in enumerate(labels.tolist()):
        for column in range(num_classes):
            p = 1 / (1 + math.exp(-float(logits[row, column])))
            (positive if column == label else negative).append(p)
    weights = [math.exp(p / ln) for p in negative]
    neg = sum(w * p for w, p in zip(weights, negative, strict=True)) / sum(weights)
    pos = 1.0
    if positive:
        weights = [math.exp(-p / lp) for p in positive]
        pos = sum(w * p for w, p in zip(weights, positive, strict=True)) / sum(weights)
    return tau / L * math.log1p(math.exp(L * (neg - pos + margin)))


def batch(seed=0, rows=40, num_classes=4, images=2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes + 3, (rows,), generator=generator).clamp(max=num_classes)
    image = torch.arange(rows) * images // rows
    return logits, labels, image


def test_mean_over_images_equals_the_paper():
    logits, labels, image = batch()
    value = DRLoss()(
        Samples(logits=logits, labels=labels, num_classes=4, image_index=image, num_images=2)
    )
    expected = [slow_dr(logits[image == i], labels[image == i], 4) for i in range(2)]
    assert value == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_batch_scope_is_one_pool_and_differs():
    logits, labels, image = batch()
    fields = {"logits": logits, "labels": labels, "num_classes": 4, "image_index": image}
    pooled = DRLoss(scope="batch")(Samples(**fields, num_images=2))
    assert pooled == pytest.approx(slow_dr(logits, labels, 4), rel=1e-12)
    assert abs(pooled - DRLoss()(Samples(**fields, num_images=2))) > 1e-3


def test_number_of_images_is_found_without_being_told():
    logits, labels, image = batch()
    fields = {"logits": logits, "labels": labels, "num_classes": 4, "image_index": image}
    assert DRLoss()(Samples(**fields)) == DRLoss()(Samples(**fields, num_images=2))


def test_image_without_positives_ranks_against_one():
    logits, labels, image = batch()
    labels = torch.where(image == 1, 4, labels)
    value = DRLoss()(
        Samples(logits=logits, labels=labels, num_classes=4, image_index=image, num_images=2)
    )
    expected = [slow_dr(logits[image == i], labels[image == i], 4) for i in range(2)]
    assert value == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_image_without_valid_anchors_adds_zero_to_the_mean():
    logits, labels, image = batch()
    fields = {"logits": logits, "labels": labels, "num_classes": 4, "image_index": image}
    two, three = (
        DRLoss()(Samples(**fields, num_images=2)),
        DRLoss()(Samples(**fields, num_images=3)),
    )
    assert three == pytest.approx(float(two) * 2 / 3, rel=1e-12)


def test_start_value_does_not_depend_on_the_prior_but_the_gradient_does():
    # 2.03 for both priors; sum |gradient| 1.90 at prior .5 and 0.075 at .01 (METHODS 2.1 (3))
    grads = []
    for prior in (0.5, 0.01):
        bias = -math.log((1 - prior) / prior)
        logits = torch.full((2000, 8), bias, dtype=torch.float64, requires_grad=True)
        labels = torch.full((2000,), 8)
        labels[:10] = torch.arange(10) % 8
        value = DRLoss()(Samples(logits=logits, labels=labels, num_classes=8))
        assert value.item() == pytest.approx(4 / 6 * math.log1p(math.exp(3)), rel=1e-9)
        (grad,) = torch.autograd.grad(value, logits)
        grads.append(float(grad.abs().sum()))
    assert grads[0] == pytest.approx(1.905, abs=0.01)
    assert grads[1] == pytest.approx(0.0754, abs=0.001)


def test_small_temperatures_do_not_underflow():
    logits = torch.full((50, 3), -8.0, requires_grad=True)
    labels = torch.tensor([0] + [3] * 49)
    value = DRLoss(lambda_neg=1e-3, lambda_pos=1e-3)(
        Samples(logits=logits, labels=labels, num_classes=3)
    )
    (grad,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and grad.isfinite().all()


def test_gradient_is_exact():
    logits, labels, image = batch(rows=12)
    logits.requires_grad_()

    def value(z):
        return DRLoss()(
            Samples(logits=z, labels=labels, num_classes=4, image_index=image, num_images=2)
        )

    assert torch.autograd.gradcheck(value, (logits,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"L": 0.0}, "L"),
        ({"tau": -1.0}, "tau"),
        ({"lambda_pos": 0.0}, "lambda_pos"),
        ({"lambda_neg": -0.1}, "lambda_neg"),
        ({"margin": 2.0}, "margin"),
        ({"scope": "gpu"}, "scope"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"DR: {name} is .*; must be"):
        DRLoss(**arguments)
