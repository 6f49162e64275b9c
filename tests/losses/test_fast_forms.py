"""The losses that are computed in chunks equal the plain formulas and autograd's gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from d2_balance.losses import CLS_LOSSES, Samples
from d2_balance.losses._kernels import chunks
from d2_balance.losses._kernels.density import count_bins, histogram, level_bins
from d2_balance.losses.acsl import acsl_loss, sample_background
from d2_balance.losses.bags import group_softmax_loss, group_targets, sample_others
from d2_balance.losses.cross_entropy import balanced_ce_loss, sigmoid_ce_loss
from d2_balance.losses.dr import dr_loss
from d2_balance.losses.drop_loss import STEPS, drop_loss, drop_noise
from d2_balance.losses.efl import equalized_focal_loss
from d2_balance.losses.eql import eql_loss, tail_weight
from d2_balance.losses.eqlv2 import eqlv2_loss, softmax_eqlv2_loss
from d2_balance.losses.fcbl import fcbl_loss
from d2_balance.losses.federated import (
    federated_classes,
    federated_loss,
    federated_softmax_loss,
)
from d2_balance.losses.focal import focal_loss
from d2_balance.losses.ghm import ghm_c_loss
from d2_balance.losses.gumbel import gumbel_ce_loss
from d2_balance.losses.quality_focal import quality_focal_loss, varifocal_loss
from d2_balance.losses.seesaw import seesaw_ce_loss, seesaw_focal_loss
from d2_balance.losses.softmax_eql import softmax_eql_loss

from .test_contract import CLS, build, make


def quality(s):
    target = torch.zeros_like(s.onehot)
    target[s.pos, s.labels[s.pos]] = s.iou.to(target.dtype)
    return target


def plain_drop(loss, s):
    return drop_loss(s.logits, *drop_arguments(loss, s))


def plain_gol(loss, s):
    onehot, fg, tail, dropped = drop_arguments(loss, s)
    suppressed = torch.where(fg.unsqueeze(1), onehot == 0, dropped)
    return gumbel_ce_loss(s.logits, onehot, loss.min_logit) * (1 - tail * suppressed)


def drop_arguments(loss, s):
    fg, tail = s.foreground, loss.tail
    rare = (s.onehot * tail.to(s.onehot.dtype)).sum()
    kept = rare / fg.sum() if fg.any() else torch.ones_like(rare)
    return s.onehot, fg, tail, drop_noise(s.onehot) >= (kept * STEPS).round()


def plain_federated(loss, s):
    return federated_loss(s.logits, s.onehot, chosen_classes(loss, s))


def chosen_classes(loss, s):
    required = (s.onehot > 0).any(dim=0, keepdim=True) | s.verified
    chosen = federated_classes(required, loss.weight, loss.num_sampled) & ~s.not_exhaustive
    return chosen[s.image_index]


def plain_eqlv2(loss, s):
    target = F.pad(s.onehot, (0, 1))
    target[:, -1] = (~s.foreground).to(target.dtype)
    positive, negative = (F.pad(w, (0, 1), value=1.0) for w in loss.class_weights())
    return eqlv2_loss(s.logits, target, positive, negative)


def plain_softmax_eqlv2(loss, s):
    weights = (F.pad(w, (0, 1), value=1.0) for w in loss.class_weights())
    return softmax_eqlv2_loss(s.logits, s.labels, *weights)


def plain_seesaw_focal(loss, s):
    arguments = loss.counts, loss.p, loss.q, loss.eps, loss.alpha, loss.gamma
    return seesaw_focal_loss(s.logits, s.labels, *arguments)


def plain_acsl(loss, s):
    target = F.pad(s.onehot, (0, 1))
    target[:, -1] = (~s.foreground).to(target.dtype)
    rare, common = sample_background(~s.foreground, loss.fractions)
    by_group = torch.stack([rare, common, torch.ones_like(rare)], dim=1)  # (R, 3)
    sampled = by_group[:, F.pad(loss.group, (0, 1), value=2)]
    return acsl_loss(s.logits, target, sampled, loss.score_threshold)


def plain_bags(loss, s):
    target = group_targets(s.labels, loss.group, loss.num_groups)
    used = sample_others(target[:, :-1] < s.num_classes, loss.beta)
    used = torch.cat([used, torch.ones_like(used[:, :1])], dim=1)
    return group_softmax_loss(s.logits, target, loss.member, used)


def plain_seesaw(loss, s):
    own = s.labels.clamp(max=s.num_classes - 1)
    classes = seesaw_ce_loss(s.logits[:, :-2], own, loss.counts, loss.p, loss.q, loss.eps)
    objectness = F.cross_entropy(s.logits[:, -2:], (~s.foreground).long(), reduction="none")
    return torch.where(s.foreground, classes, torch.zeros_like(classes)) + objectness


def plain_softmax_eql(loss, s):
    tail = tail_weight(loss.class_frequency, loss.lambda_, loss.threshold)
    drawn = torch.zeros_like(s.onehot)
    drawn[s.pos] = (torch.rand(len(s.pos), s.num_classes) < loss.gamma).to(drawn.dtype)
    weight = 1 - tail * drawn * (1 - s.onehot)
    return softmax_eql_loss(s.logits, s.labels, F.pad(weight, (0, 1), value=1.0))


PLAIN = {
    "SigmoidCE": lambda loss, s: sigmoid_ce_loss(s.logits, s.onehot),
    "BalancedCE": lambda loss, s: balanced_ce_loss(s.logits, s.onehot, loss.alpha),
    "Focal": lambda loss, s: focal_loss(s.logits, s.onehot, loss.alpha, loss.gamma),
    "EQL": lambda loss, s: eql_loss(s.logits, s.onehot, s.foreground, loss.tail, s.sample_verified),
    "DropLoss": plain_drop,
    "FCBL": lambda loss, s: fcbl_loss(s.logits, s.labels, loss.margin, loss.score_threshold),
    "GOL": plain_gol,
    "GumbelCE": lambda loss, s: gumbel_ce_loss(s.logits, s.onehot, loss.min_logit),
    "Federated": plain_federated,
    "EQLv2": plain_eqlv2,
    "EFL": lambda loss, s: equalized_focal_loss(
        s.logits, s.onehot, loss.class_gamma(), loss.alpha, loss.gamma
    ),
    "QFL": lambda loss, s: quality_focal_loss(s.logits, quality(s), loss.beta),
    "GHMC": lambda loss, s: ghm_c_loss(s.logits, s.onehot, loss.density.scales),
    "DR": lambda loss, s: dr_loss(s.logits, s.onehot, s.image_index, 2, **loss.arguments).mean(),
    "VFL": lambda loss, s: varifocal_loss(s.logits, quality(s), loss.alpha, loss.gamma),
    "FederatedSoftmax": lambda loss, s: federated_softmax_loss(
        s.logits, s.labels, chosen_classes(loss, s)
    ),
    "SeesawFocal": plain_seesaw_focal,
    "SoftmaxEQLv2": plain_softmax_eqlv2,
    "ACSL": plain_acsl,
    "BAGS": plain_bags,
    "Seesaw": plain_seesaw,
    "SoftmaxEQL": plain_softmax_eql,
}
# rows, positives, classes
SIZES = {"mixed": (60, 9, 7), "no positive": (60, 0, 7), "one class": (60, 9, 1), "all": (9, 9, 7)}


def trained(name, classes):
    """A loss whose state, if it has one, is that after two other batches."""
    loss = build(CLS_LOSSES, name, num_classes=classes)
    for seed in (5, 6):
        loss(make(loss, num_classes=classes, seed=seed, dtype=torch.float64))
    return loss


def value_and_gradient(compute, samples, upstream):
    torch.manual_seed(4)  # for the losses that draw
    value = compute(samples)
    upstream = upstream.squeeze(1) if value.dim() == 1 else upstream
    (grad,) = torch.autograd.grad((value * upstream).sum(), samples.logits)
    return value.detach(), grad


def assert_equal_to_plain(name, loss, samples):
    generator = torch.Generator().manual_seed(3)
    upstream = torch.rand(len(samples.labels), 1, generator=generator, dtype=torch.float64)
    plain = copy.deepcopy(loss)  # before the batch moves the state
    if not loss.update_after:
        plain(samples)
    expected = value_and_gradient(lambda s: PLAIN[name](plain, s), samples, upstream)
    found = value_and_gradient(loss, samples, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk", [7, 2**16], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_fast_form_equals_the_plain_one(name, size, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    rows, positives, classes = SIZES[size]
    loss = trained(name, classes)
    samples = make(
        loss, rows=rows, positives=positives, num_classes=classes, dtype=torch.float64, scale=3.0
    )
    assert_equal_to_plain(name, loss, samples)


@pytest.mark.parametrize("name", PLAIN)
def test_fast_form_equals_the_plain_one_at_extreme_logits(name):
    loss = trained(name, 7)
    samples = make(loss, dtype=torch.float64)
    with torch.no_grad():
        samples.logits.copy_(100 * samples.logits.sign())
    assert_equal_to_plain(name, loss, samples)


@pytest.mark.parametrize("name", PLAIN)
def test_ignored_rows_get_no_gradient_and_leave_the_others_alone(name):
    loss = trained(name, 7)
    whole = make(loss, dtype=torch.float64)
    kept = torch.arange(60) % 3 > 0
    pos = whole.pos
    part = {
        field: getattr(whole, field)[kept[pos]]
        for field in ("pred_deltas", "boxes", "gt_boxes", "gt_index")
    }
    rest = {"verified": whole.verified, "not_exhaustive": whole.not_exhaustive}
    rest |= {"num_images": 2, "box_transform": whole.box_transform}
    samples = Samples(
        logits=whole.logits[kept],
        labels=whole.labels[kept],
        num_classes=7,
        image_index=whole.image_index[kept],
        **part,
        **rest,
    )
    assert_equal_to_plain(name, copy.deepcopy(loss), samples)
    (grad,) = torch.autograd.grad(loss(samples).sum(), whole.logits)
    assert (grad[~kept] == 0).all() and grad[kept].abs().sum() > 0


@pytest.mark.parametrize("name", ["SigmoidCE", "Focal", "EQL", "EFL", "VFL"])
def test_gradient_is_the_derivative(name):
    loss = build(CLS_LOSSES, name).eval()
    samples = make(loss, rows=8, positives=3, dtype=torch.float64)

    def value(logits):
        fields = {k: getattr(samples, k) for k in samples.__dataclass_fields__}
        return loss(Samples(**{**fields, "logits": logits}))

    assert torch.autograd.gradcheck(value, samples.logits)


def test_logits_that_are_a_view_are_read_by_their_strides():
    wide = torch.randn(20, 9, dtype=torch.float64)
    labels = torch.randint(0, 6, (20,))
    values = []
    for logits in (wide[:, 2:7], wide[:, 2:7].contiguous(), wide.t().contiguous().t()[:, 2:7]):
        leaf = logits.requires_grad_() if logits.is_leaf else logits
        loss = CLS_LOSSES.get("Focal")()
        values.append(loss(Samples(logits=leaf, labels=labels, num_classes=5)).detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(values[2], values[1], rtol=1e-12, atol=0)


def test_levels_of_ghm_share_one_histogram_pass():
    torch.manual_seed(0)
    loss = CLS_LOSSES.get("GHMC")(bins=60, per_level=True)  # 5 x 60 bins need more than a byte
    fast, plain = copy.deepcopy(loss), copy.deepcopy(loss)
    base = make(loss, dtype=torch.float64)
    level = torch.arange(60) % 5
    batch = Samples(
        logits=base.logits, labels=base.labels, num_classes=7, level=level, num_levels=5
    )
    found = value_and_gradient(fast, batch, torch.ones(()))
    plain(batch)
    scales = plain.density.scales

    def formula(s):
        return ghm_c_loss(s.logits, s.onehot, scales, level)

    expected = value_and_gradient(formula, batch, torch.ones(()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    norm = (base.logits.detach().sigmoid() - base.onehot).abs()
    counts = count_bins(level_bins(norm, 60, level), 300).view(5, 60)
    assert torch.equal(loss.batch_statistics(batch)[0], counts) and counts.sum() == 60 * 7


def test_sharp_dr_takes_the_form_that_cannot_underflow():
    # lambda 0.005: exp((p - 1) / lambda) of a negative with p < 0.4 is 0 in float32
    loss = CLS_LOSSES.get("DR")(lambda_neg=0.005)
    logits = torch.full((4, 2), -3.0, requires_grad=True)
    value = loss(Samples(logits=logits, labels=torch.tensor([0, 2, 2, 2]), num_classes=2))
    (grad,) = torch.autograd.grad(value, logits)
    assert grad[1, 0] > 0 and grad[0, 0] < 0


def test_bins_are_counted_alike_without_bincount():
    index = torch.randint(0, 150, (1000, 3), dtype=torch.uint8)
    assert torch.equal(histogram(index, 150), count_bins(index, 150))  # what a GPU takes
    assert histogram(index[:0], 150).tolist() == [0] * 150


def test_a_bin_of_many_millions_is_counted_to_the_last():
    index = torch.zeros(2**24 + 3, 1, dtype=torch.uint8)  # float32 has no 2^24 + 1
    assert histogram(index, 4).tolist() == [2**24 + 3, 0, 0, 0]


@pytest.mark.parametrize("name", CLS)
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 50)
    results, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            loss = trained(name, 7)
            results.append(value_and_gradient(loss, make(loss, rows=200), torch.ones(1, 1)))
        finally:
            torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_error_in_a_chunk_is_raised_and_the_threads_go_on(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 10)

    def work(rows):
        raise KeyError(rows.start)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            chunks.map_chunks(work, torch.zeros(40))
        starts = chunks.map_chunks(lambda chunk: chunk.start, torch.zeros(40))
        assert starts == [0, 10, 20, 30] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
