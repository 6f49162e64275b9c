"""DropLoss: foreground as EQL, background drops tail classes at random."""

import math

import pytest
import torch

from d2_balance.losses import DropLoss, EQLLoss, Samples, SigmoidCELoss

FREQUENCY = [0.5, 0.001]


def batch(labels):
    labels = torch.tensor(labels)
    logits = torch.zeros(len(labels), 2, dtype=torch.float64)
    return Samples(logits=logits, labels=labels, num_classes=2)


def test_foreground_rows_are_those_of_eql():
    rows = batch([0, 1, 0])
    ours, eql = DropLoss(class_frequency=FREQUENCY), EQLLoss(class_frequency=FREQUENCY)
    assert torch.equal(ours(rows), eql(rows))


def test_background_keeps_tail_classes_with_the_share_of_tail_rows():
    # 1 of 4 foreground rows is of a tail class: each background row keeps it with probability 1/4
    rows = batch([0, 0, 0, 1] + [2] * 20000)
    value = DropLoss(class_frequency=FREQUENCY)(rows)[4:]
    assert (value[:, 0] == math.log(2)).all()
    kept = (value[:, 1] > 0).double().mean().item()
    assert kept == pytest.approx(0.25, abs=0.015)  # standard error .003


def test_without_foreground_nothing_is_dropped():
    rows = batch([2, 2, 2])
    assert torch.equal(DropLoss(class_frequency=FREQUENCY)(rows), SigmoidCELoss()(rows))
