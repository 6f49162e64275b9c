"""Values on random rows against loops written from the papers, for losses without reference."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from d2_balance.losses import FederatedLoss, QFLLoss, Samples, SoftmaxEQLLoss, VFLLoss
from d2_balance.losses.balanced_l1 import balanced_l1_loss
from d2_balance.losses.drop_loss import drop_loss
from d2_balance.losses.softmax_eql import softmax_eql_loss
from d2_balance.modeling.postprocess.norcal import norcal
from d2_balance.sampling.iou_balanced import sample_evenly

R, K = 24, 5


def rows(columns=K, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(R, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K + 1, (R,), generator=generator)
    return Samples(logits=logits, labels=labels, num_classes=K, **fields)


def bce(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def test_softmax_eql_is_a_softmax_with_weighted_terms():
    batch = rows(K + 1)
    weight = torch.rand(R, K + 1, dtype=torch.float64).round(decimals=1)
    weight[torch.arange(R), batch.labels] = 1.0
    value = softmax_eql_loss(batch.logits, batch.labels, weight)
    for z, w, y, ours in zip(batch.logits, weight, batch.labels, value, strict=True):
        total = sum(w[k].item() * math.exp(z[k]) for k in range(K + 1))
        assert ours.item() == pytest.approx(-math.log(math.exp(z[y]) / total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dropped_class_of_any_score_leaves_softmax_eql_alone(dtype):
    # class 1 is a tail class with a score far above all others; class 0 and background have 0
    logits = torch.tensor([[-100.0, 100.0, -100.0]], dtype=dtype, requires_grad=True)
    loss = SoftmaxEQLLoss(class_frequency=[0.5, 1e-4], gamma=1.0)
    value = loss(Samples(logits=logits, labels=torch.tensor([0]), num_classes=2)).sum()
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    value.backward()
    assert logits.grad.tolist() == [pytest.approx([-0.5, 0.0, 0.5])]


def test_drop_loss_is_a_weighted_sum_of_cross_entropies():
    batch, tail = rows(), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    dropped = torch.rand(R, K) < 0.5
    value = drop_loss(batch.logits, batch.onehot, batch.foreground, tail, dropped)
    for i in range(R):
        label = batch.labels[i].item()
        for j in range(K):
            target = float(label == j)
            hit = j != label if label < K else dropped[i, j].item()
            expected = (1 - tail[j].item() * hit) * bce(batch.logits[i, j].item(), target)
            assert value[i, j].item() == pytest.approx(expected)


def test_federated_sums_the_classes_of_each_image():
    image = torch.arange(R) % 2
    verified = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    not_exhaustive = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    batch = rows(image_index=image, num_images=2, verified=verified, not_exhaustive=not_exhaustive)
    # classes 3 and 4 have no image and are never drawn; a sample of 1 draws nothing besides
    batch = Samples(**{**vars_of(batch), "labels": torch.where(batch.labels < 2, 2, K)})
    value = FederatedLoss(class_count=[9, 9, 9, 0, 0], num_sampled=1)(batch)
    for i in range(R):
        taken = {2} | {j for j in range(K) if verified[image[i], j]}
        taken -= {j for j in range(K) if not_exhaustive[image[i], j] and batch.labels[i] != j}
        expected = sum(bce(batch.logits[i, j].item(), float(batch.labels[i] == j)) for j in taken)
        assert value[i].sum().item() == pytest.approx(expected)


def vars_of(samples):
    return {name: getattr(samples, name) for name in samples.__dataclass_fields__}


def test_norcal_divides_exponentials_and_renormalises():
    logits, count, gamma = rows(K + 1).logits, [500.0, 40.0, 7.0, 1.0, 0.0], 0.6
    value = norcal(logits.softmax(dim=1), torch.tensor(count), gamma)
    for z, ours in zip(logits, value, strict=True):
        terms = [math.exp(z[j]) / max(count[j], 1) ** gamma for j in range(K)]
        terms.append(math.exp(z[K]))
        assert ours.tolist() == pytest.approx([t / sum(terms) for t in terms])


def boxed(seed):
    """Rows whose positives have a box beside their object, and the slow IoU of each row."""
    batch = rows(seed=seed)
    count = len(batch.pos)
    shift = torch.linspace(-14, 14, count, dtype=torch.float64)  # some have no overlap
    box = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64).expand(count, 4)
    deltas = torch.stack([shift / 10, 0 * shift, 0 * shift, 0 * shift], dim=1)
    quality = torch.zeros(R, K, dtype=torch.float64)
    for row, off in zip(batch.pos.tolist(), shift.abs().tolist(), strict=True):
        overlap = max(10 - off, 0)
        quality[row, batch.labels[row]] = overlap / (20 - overlap)
    fields = {"pred_deltas": deltas, "boxes": box, "gt_boxes": box}
    fields["box_transform"] = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    return Samples(**{**vars_of(batch), **fields}), quality


@pytest.mark.parametrize("seed", range(3))
def test_quality_losses_follow_their_formulas(seed):
    batch, quality = boxed(seed)
    qfl, vfl = QFLLoss()(batch), VFLLoss()(batch)
    for i in range(R):
        for j in range(K):
            z, q = batch.logits[i, j].item(), quality[i, j].item()
            p = 1 / (1 + math.exp(-z))
            assert qfl[i, j].item() == pytest.approx(abs(q - p) ** 2 * bce(z, q), rel=1e-5)
            weight = q if q > 0 else 0.75 * p**2
            assert vfl[i, j].item() == pytest.approx(weight * bce(z, q), rel=1e-5)


@pytest.mark.parametrize("beta", [0.11, 1.0])
@pytest.mark.parametrize("x", [0.03, 0.5, 0.9, 1.7])
def test_balanced_l1_is_the_integral_of_the_papers_gradient(x, beta):
    # equation 6: the gradient is alpha ln(b |x| + 1) below 1 and gamma above, here at x / beta
    alpha, gamma, steps = 0.5, 1.5, 20000
    b = math.exp(gamma / alpha) - 1
    middles = [(n + 0.5) * x / steps / beta for n in range(steps)]
    grads = [alpha * math.log(b * m + 1) if m < 1 else gamma for m in middles]
    value = balanced_l1_loss(torch.tensor([[x]]).double(), torch.zeros(1, 1), alpha, gamma, beta)
    assert value.item() == pytest.approx(sum(grads) * x / steps, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_iou_balanced_takes_from_each_bin_what_a_loop_takes(seed):
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(80, generator=generator).pow(3) * 0.5  # few in the upper bins
    bins, count, floor = 3, 31, 0.02
    width = (iou.max().item() - floor) / bins
    members = {b: [] for b in range(bins + 1)}  # 0: below the floor
    for i, value in enumerate(iou.tolist()):
        place = 0 if value < floor else 1 + int((value - floor) / width)
        members[min(place, bins)].append(i)
    quota = {b: count // bins + (b > bins - count % bins) for b in range(1, bins + 1)}
    least = {b: min(quota[b], len(members[b])) for b in quota}
    drawn = sample_evenly(iou, count, bins, floor).tolist()
    assert len(drawn) == len(set(drawn)) == count
    found = {b: len(set(drawn) & set(members[b])) for b in members}
    assert all(found[b] >= least[b] for b in least)
    # below the floor only what the bins, taken empty, could not give
    assert found[0] <= count - sum(least.values())
    if least == quota:
        assert found == {0: 0, **quota}
