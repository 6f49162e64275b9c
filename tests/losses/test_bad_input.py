"""What a run may meet besides healthy batches: every registered loss stays finite or says NaN."""

import copy
import dataclasses
import inspect
import math

import pytest
import torch

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES

from .test_contract import BOX, CLS, K, boxes_for, build, gradient, make

BAD = [math.nan, math.inf]


@pytest.fixture(params=CLS)
def name(request):
    torch.manual_seed(0)
    return request.param


def build_with(name, counts):
    """A loss whose training set has these counts, whatever it calls them."""
    cls = CLS_LOSSES.get(name)
    data = {
        "class_frequency": [c / 1000 for c in counts],
        "class_count": counts,
        "instance_count": counts,
        "num_classes": len(counts),
    }
    parameters = inspect.signature(cls).parameters.values()
    return cls(**{p.name: data[p.name] for p in parameters if p.default is p.empty})


def finite(loss, samples):
    value, grad = gradient(loss, samples)
    buffers = loss.state_dict().values()
    return bool(
        value.isfinite() and grad.isfinite().all() and all(b.isfinite().all() for b in buffers)
    )


@pytest.mark.parametrize("counts", [[0] * K, [1000] + [0] * (K - 1), [0] * (K - 1) + [1000]])
def test_classes_that_were_never_seen_keep_the_loss_finite(name, counts):
    loss = build_with(name, counts)
    assert finite(loss, make(loss, positives=30))
    loss.eval()
    assert loss.probabilities(make(loss).logits).isfinite().all()


@pytest.mark.parametrize("rows, positives", [(1, 1), (1, 0), (0, 0), (5, 5), (5, 0)])
@pytest.mark.parametrize("count", [0, 12])
def test_one_class_in_small_batches(name, rows, positives, count):
    loss = build_with(name, [count])
    assert finite(loss, make(loss, rows=rows, positives=positives, num_classes=1))


@pytest.mark.parametrize("extreme", [100.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positives", [0, 9])
def test_extreme_logits_in_half_precision(name, extreme, dtype, positives):
    loss = build(CLS_LOSSES, name)
    samples = make(loss, dtype=dtype, positives=positives)
    with torch.no_grad():
        samples.logits.fill_(extreme)
        samples.logits[::3] *= -1
    assert finite(loss, samples)


@pytest.mark.parametrize("first", [(0, 0), (30, 0)])
def test_a_run_may_start_without_rows_or_foreground(name, first):
    loss = build(CLS_LOSSES, name)
    for rows, positives in (first, first, (60, 9)):
        assert finite(loss, make(loss, rows=rows, positives=positives))


def test_images_without_rows_and_without_labels_of_their_own(name):
    # image 1 of 3 has no row; no class was verified in any image
    loss = build(CLS_LOSSES, name)
    samples = make(loss)
    nothing = torch.zeros(3, K, dtype=torch.bool)
    samples = dataclasses.replace(
        samples,
        image_index=samples.image_index * 2,
        num_images=3,
        verified=nothing,
        not_exhaustive=nothing,
    )
    assert finite(loss, samples)


@pytest.mark.parametrize("kind", ["positive", "negative", "no positives"])
def test_one_nan_makes_the_loss_nan_and_its_row_can_be_told(name, kind):
    loss = build(CLS_LOSSES, name)
    loss(make(loss, seed=4))
    samples = make(loss, positives=0 if kind == "no positives" else 9)
    rows = samples.foreground if kind == "positive" else ~samples.foreground
    row = rows.nonzero()[0]
    with torch.no_grad():
        samples.logits[row, 2] = math.nan
    value = loss(samples)
    assert not value.sum().isfinite()
    state_first = not loss.update_after  # then all rows are weighted with what one has corrupt
    corrupt = not all(buffer.isfinite().all() for buffer in loss.buffers())
    if loss.elementwise and not (state_first and corrupt):
        bad = (~value.isfinite()).view(60, -1).any(dim=1)
        assert bad.nonzero().flatten().tolist() == row.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("positives", [0, 9])
def test_a_finite_loss_has_a_finite_gradient(name, bad, positives):
    # else the step would spoil the weights before anyone sees it
    loss = build(CLS_LOSSES, name)
    for row in range(0, 60, 7):
        for column in range(K):
            samples = make(loss, positives=positives)
            with torch.no_grad():
                samples.logits[row, column] = bad
            value, grad = gradient(copy.deepcopy(loss), samples)
            assert grad.isfinite().all() or not value.isfinite(), (row, column)


@pytest.mark.parametrize("box_name", BOX)
@pytest.mark.parametrize("where", ["pred", "target"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_coordinate_makes_the_box_loss_bad_and_its_row_can_be_told(box_name, where, bad):
    loss = build(BOX_LOSSES, box_name)
    pred, target = boxes_for(loss, 20)
    with torch.no_grad():
        (pred if where == "pred" else target)[7, 1] = bad
    value = loss(pred, target)
    (_grad,) = torch.autograd.grad(value.sum(), pred)
    assert not value.sum().isfinite()
    if loss.elementwise:
        rows = (~value.isfinite()).view(20, -1).any(dim=1)
        assert rows.nonzero().flatten().tolist() == [7]
