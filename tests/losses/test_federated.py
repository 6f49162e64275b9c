"""Federated loss: the classes of each image."""

import math

import pytest
import torch

from d2_balance.losses import (
    FederatedLoss,
    FederatedSoftmaxLoss,
    Samples,
    SigmoidCELoss,
    SoftmaxCELoss,
)
from d2_balance.losses.federated import federated_classes


def trained(loss, labels, num_classes, **fields):
    """(R, K) which entries take part: at logits of zero each has a cross-entropy of log 2."""
    labels = torch.tensor(labels)
    logits = torch.zeros(len(labels), num_classes)
    value = loss(Samples(logits=logits, labels=labels, num_classes=num_classes, **fields))
    return (value / math.log(2)).round().bool()


def test_background_takes_no_place_in_the_sample():
    loss = FederatedLoss(class_count=[5] * 100, num_sampled=10)
    taken = trained(loss, [3, 100, 100], 100)
    assert taken.sum(dim=1).tolist() == [10, 10, 10]
    assert taken[:, 3].all() and (taken == taken[0]).all()


def test_more_present_classes_than_the_sample_are_all_kept():
    loss = FederatedLoss(class_count=[5] * 20, num_sampled=3)
    taken = trained(loss, list(range(12)), 20)
    assert taken[0].nonzero().flatten().tolist() == list(range(12))


def test_fewer_classes_than_the_sample_is_the_cross_entropy():
    loss = FederatedLoss(class_count=[5] * 4, num_sampled=50)
    rows = Samples(logits=torch.randn(6, 4), labels=torch.tensor([0, 1, 4, 4, 2, 3]), num_classes=4)
    assert torch.equal(loss(rows), SigmoidCELoss()(rows))


def test_classes_without_images_are_never_drawn_but_train_where_present():
    loss = FederatedLoss(class_count=[5, 0, 5, 0], num_sampled=4)
    assert trained(loss, [1, 4], 4).tolist() == [[True, True, True, False]] * 2


def test_verified_classes_take_part_in_their_image_only():
    verified = torch.zeros(2, 50, dtype=torch.bool)
    verified[0, 40:] = True
    fields = {"verified": verified, "image_index": torch.tensor([0, 1])}
    loss = FederatedLoss(class_count=[1000] * 5 + [1] * 45, num_sampled=10, power=8.0)
    taken = trained(loss, [50, 50], 50, **fields)
    assert taken.sum(dim=1).tolist() == [10, 10]
    assert taken[0, 40:].all() and taken[1, :5].all() and taken[1, 40:].sum() < 10
    off = FederatedLoss(class_count=[5] * 50, num_sampled=10, use_image_level_labels=False)
    same = trained(off, [50, 50], 50, **fields)
    assert torch.equal(same[0], same[1])


def test_classes_that_are_not_annotated_exhaustively_have_no_negatives_in_their_image():
    # class 1 is partly marked in image 0, where rows 0 to 2 are; class 3, the last one, in image 1
    not_exhaustive = torch.tensor([[False, True, False, False], [False, False, False, True]])
    fields = {
        "image_index": torch.tensor([0, 0, 0, 1, 1, 1]),
        "num_images": 2,
        "not_exhaustive": not_exhaustive,
    }
    fields["verified"] = not_exhaustive.clone()
    labels = [1, 2, 4, 1, 3, 4]  # the first row of class 1 and of class 3 is an object
    taken = trained(FederatedLoss(class_count=[5] * 4, num_sampled=50), labels, 4, **fields)
    expected = torch.ones(6, 4, dtype=torch.bool)
    expected[[1, 2], 1] = False
    expected[[3, 5], 3] = False
    assert torch.equal(taken, expected)
    one = {"not_exhaustive": not_exhaustive[:1], "verified": not_exhaustive[:1]}
    taken = trained(FederatedLoss(class_count=[5] * 4), labels[:3], 4, **one)
    assert torch.equal(taken, expected[:3])
    off = FederatedLoss(class_count=[5] * 4, use_image_level_labels=False)
    assert trained(off, labels, 4, **fields).all()


def test_frequent_classes_are_drawn_more_often():
    # one draw of two classes with counts 9 and 1 and power .5: probabilities 3/4 and 1/4
    weight = torch.tensor([9.0, 1.0]).sqrt()
    drawn = federated_classes(torch.zeros(20000, 2, dtype=torch.bool), weight, 1)
    assert drawn.sum(dim=1).eq(1).all()
    assert drawn[:, 0].double().mean().item() == pytest.approx(0.75, abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"num_sampled": 0}, "num_sampled"), ({"power": -1.0}, "power")],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"Federated: {name} is .*; must be"):
        FederatedLoss(class_count=[1, 2], **arguments)


def test_softmax_form_sums_over_the_classes_of_the_image_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, image = torch.tensor([0, 1, 6, 6, 5, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    verified = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]]).bool()
    partly = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]]).bool()
    fields = {"image_index": image, "verified": verified, "not_exhaustive": partly}
    # no class is sampled besides those that are required
    loss = FederatedSoftmaxLoss(class_count=[5] * 6, num_sampled=1)
    value = loss(Samples(logits=logits, labels=labels, num_classes=6, **fields))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    present = {0, 1, 2, 5}
    for i, (z, y, n) in enumerate(
        zip(logits.tolist(), labels.tolist(), image.tolist(), strict=True)
    ):
        kept = present | {j for j in range(6) if verified[n, j]}
        kept = {j for j in kept if not partly[n, j]} | {y, 6}
        total = sum(math.exp(z[k]) for k in kept)
        assert value[i].item() == pytest.approx(-math.log(math.exp(z[y]) / total), rel=1e-9)
        for k in range(7):
            expected = math.exp(z[k]) / total * (k in kept) - (k == y)
            assert grad[i, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_softmax_form_of_fewer_classes_than_the_sample_is_the_cross_entropy():
    rows = Samples(logits=torch.randn(6, 5), labels=torch.tensor([0, 1, 4, 4, 2, 3]), num_classes=4)
    found = FederatedSoftmaxLoss(class_count=[5] * 4)(rows)
    torch.testing.assert_close(found, SoftmaxCELoss()(rows))
