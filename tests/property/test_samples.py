"""What every batch of samples satisfies, whatever its size, classes and images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from d2_balance.losses import CLS_LOSSES, Samples


@st.composite
def batches(draw, background_column=None):
    """Logits and labels of up to 12 samples over up to 5 classes, background included."""
    num_classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, num_classes), max_size=12))
    wide = draw(st.booleans()) if background_column is None else background_column
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    size = (len(labels), num_classes + wide)
    logits = torch.randn(size, generator=generator, dtype=torch.float64) * 3
    return Samples(
        logits=logits, labels=torch.tensor(labels, dtype=torch.int64), num_classes=num_classes
    )


@given(batches())
def test_onehot_has_a_one_for_each_positive_and_nothing_else(samples):
    assert samples.onehot.sum() == samples.foreground.sum() == len(samples.pos)
    assert torch.equal(samples.onehot.sum(0), samples.class_counts)
    positive = samples.labels[samples.pos]
    assert torch.equal(samples.onehot[samples.pos].argmax(1), positive)


@given(batches())
def test_positives_are_counted_with_and_without_boxes(samples):
    boxes = torch.zeros(len(samples.pos), 4)
    counted = Samples(
        logits=samples.logits,
        labels=samples.labels,
        num_classes=samples.num_classes,
        pred_deltas=boxes,
    )
    assert torch.equal(counted.pos, samples.pos)
    assert (samples.pos.diff() > 0).all()


@given(batches(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_upcast_changes_half_types_only(samples, dtype):
    assert samples.upcast() is samples
    half = Samples(
        logits=samples.logits.to(dtype), labels=samples.labels, num_classes=samples.num_classes
    )
    assert half.upcast().logits.dtype is torch.float32
    assert torch.equal(half.upcast().logits, half.logits.float())


@given(batches(background_column=False))
def test_sigmoid_cross_entropy_is_that_of_torch(samples):
    loss = CLS_LOSSES.get("SigmoidCE")().compute(samples)
    expected = F.binary_cross_entropy_with_logits(samples.logits, samples.onehot, reduction="none")
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["SigmoidCE", "Focal", "QFL", "VFL"])
@given(samples=batches(background_column=False), seed=st.integers(0, 1000))
def test_elementwise_losses_do_not_depend_on_the_order_of_the_samples(name, samples, seed):
    order = torch.randperm(
        len(samples.labels), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    shuffled = Samples(
        logits=samples.logits[order], labels=samples.labels[order], num_classes=samples.num_classes
    )
    loss = CLS_LOSSES.get(name)()
    one, other = loss.compute(samples), loss.compute(shuffled)
    assert torch.allclose(one[order], other, rtol=1e-12, atol=1e-14) and (one >= 0).all()
