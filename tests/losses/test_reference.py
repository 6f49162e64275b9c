"""Losses and gradients against numbers computed by published implementations.

tests/reference/*.npz holds inputs, outputs and gradients; float64 unless the source works in
float32. Rows with label -1 are ignored: they are dropped, and their reference gradient is zero.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import APLoss, DRLoss, EQLLoss, EQLv2Loss, GHMCLoss, GHMRLoss, Samples
from d2_balance.losses.alrp import alrp_and_gradient, alrp_box_loss
from d2_balance.losses.rank_sort import rank_sort_and_gradient
from d2_balance.losses.seesaw import seesaw_ce_loss

REFERENCE = Path(__file__).parent.parent / "reference"


def load(name):
    return np.load(REFERENCE / f"{name}.npz")


def assert_close(actual, expected, rel=1e-6):
    """Largest difference relative to the largest entry."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rel * expected.abs().max()


def run(loss, logits, labels, num_classes, reduce=lambda x: x):
    """Value, and gradient with zeros in ignored rows."""
    logits = torch.tensor(logits).requires_grad_()
    labels = torch.tensor(labels)
    keep = labels >= 0
    value = reduce(loss(Samples(logits=logits[keep], labels=labels[keep], num_classes=num_classes)))
    (grad,) = torch.autograd.grad(value, logits)
    return value, grad


@pytest.mark.parametrize("name", ["ghm_c_bins10_momentum0.0", "ghm_c_bins30_momentum0.75"])
def test_ghm_c_equals_mmdet_over_four_steps(name):
    ref = load(name)
    loss = GHMCLoss(bins=int(ref["bins"]), momentum=float(ref["momentum"]))
    for step in range(4):
        value, grad = run(loss, ref["logits"][step], ref["labels"][step], int(ref["num_classes"]))
        assert_close(value, ref["loss"][step])
        assert_close(grad, ref["grad"][step])
    if ref["momentum"] > 0:  # mmdet keeps no average at momentum 0
        assert_close(loss.density.acc, ref["ema"])


@pytest.mark.parametrize("name", ["ghm_r_bins10_momentum0.0", "ghm_r_bins10_momentum0.7"])
def test_ghm_r_equals_mmdet_over_four_steps(name):
    ref = load(name)
    loss = GHMRLoss(bins=int(ref["bins"]), momentum=float(ref["momentum"]), mu=float(ref["mu"]))
    for step in range(4):
        pred = torch.tensor(ref["pred"][step]).requires_grad_()
        value = loss(pred, torch.tensor(ref["target"][step]))
        (grad,) = torch.autograd.grad(value, pred)
        assert_close(value, ref["loss"][step])
        assert_close(grad, ref["grad"][step])
    if ref["momentum"] > 0:
        assert_close(loss.density.acc, ref["ema"])


@pytest.mark.parametrize("name", ["dr_mixed", "dr_no_positive"])
def test_dr_over_one_pool_equals_the_authors_release(name):
    ref = load(name)
    loss = DRLoss(
        margin=float(ref["margin"]),
        L=float(ref["L"]),
        tau=float(ref["tau"]),
        lambda_pos=float(ref["pos_lambda"]),
        lambda_neg=float(ref["neg_lambda"]),
        scope="batch",
    )
    value, grad = run(loss, ref["logits"], ref["labels"], int(ref["num_classes"]))
    assert_close(value, ref["loss"])
    assert_close(grad, ref["grad"])


def test_dr_defaults_are_the_authors():
    ref = load("dr_mixed")
    value, _ = run(DRLoss(scope="batch"), ref["logits"], ref["labels"], int(ref["num_classes"]))
    assert_close(value, ref["loss"])


def test_eql_equals_the_authors_release():
    ref = load("eql")
    loss = EQLLoss(class_frequency=ref["class_frequency"], lambda_=float(ref["lambda_"]))
    value, grad = run(
        loss,
        ref["logits"],
        ref["labels"],
        int(ref["num_classes"]),
        reduce=lambda loss: loss.sum(dim=1).mean(),
    )
    assert_close(value, ref["loss"])
    assert_close(grad, ref["grad"])


def test_eqlv2_equals_mmdet_over_four_steps():
    ref = load("eqlv2")
    loss = EQLv2Loss(
        num_classes=int(ref["num_classes"]),
        gamma=float(ref["gamma"]),
        mu=float(ref["mu"]),
        alpha=float(ref["alpha"]),
    )
    for step in range(4):
        value, grad = run(
            loss,
            ref["logits"][step],
            ref["labels"][step],
            int(ref["num_classes"]),
            reduce=lambda loss: loss.sum(dim=1).mean(),
        )
        assert_close(value, ref["loss"][step])
        assert_close(grad, ref["grad"][step])
    assert_close(loss.pos_grad, ref["pos_grad"])
    assert_close(loss.neg_grad, ref["neg_grad"])


def test_seesaw_class_part_equals_mmdet():
    ref = load("seesaw_ce")
    logits = torch.tensor(ref["logits"]).requires_grad_()
    counts = torch.tensor(ref["class_counts"])
    arguments = (float(ref["p"]), float(ref["q"]), float(ref["eps"]))
    value = seesaw_ce_loss(logits, torch.tensor(ref["labels"]), counts, *arguments).mean()
    (grad,) = torch.autograd.grad(value, logits)
    assert_close(value, ref["loss"])
    assert_close(grad, ref["grad"])


def test_ap_equals_the_authors_release():
    ref = load("ap")
    value, grad = run(APLoss(), ref["logits"], ref["labels"], int(ref["num_classes"]))
    assert_close(value, ref["loss"].squeeze(), rel=1e-6)
    assert_close(grad, ref["grad"], rel=1e-6)


def test_rank_and_sort_equals_the_authors_release():
    ref = load("rank_sort")
    logits, targets = torch.tensor(ref["logits"]), torch.tensor(ref["iou_targets"])
    keep = (targets >= 0).all(dim=1)  # -1 is ignored
    scores, targets = logits[keep].flatten(), targets[keep].flatten()
    positive = targets.nonzero().squeeze(1)
    ranking, sorting, grad = rank_sort_and_gradient(
        scores, positive, targets[positive], float(ref["delta"])
    )
    assert_close(ranking, ref["ranking"])
    assert_close(sorting, ref["sorting"])
    assert_close(grad, ref["grad"][keep].reshape(-1), rel=1e-6)


def test_alrp_equals_the_authors_release():
    ref = load("alrp")
    onehot = torch.tensor(ref["onehot"])
    keep = onehot >= 0
    scores = torch.tensor(ref["logits"])[keep]
    positive = onehot[keep].nonzero().squeeze(1)
    errors = torch.tensor(ref["regression_loss"])
    loss, grad, rank = alrp_and_gradient(scores, positive, errors, float(ref["delta"]))
    assert_close(loss, ref["cls_loss"])
    assert_close(rank, ref["rank"])
    assert_close(grad, ref["grad"][keep.numpy()], rel=1e-6)
    order = torch.tensor(ref["order"])  # ascending scores
    assert torch.equal(scores[positive].argsort(stable=True), order)
    # the box part sums from the highest score down
    expected = (errors[order.flip(0)].double().cumsum(0) / rank[order.flip(0)]).mean()
    assert_close(alrp_box_loss(errors, scores[positive], rank), expected)
