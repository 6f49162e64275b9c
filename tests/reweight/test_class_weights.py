"""Class weights against the authors' figures, slow loops, and through the criterion."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import FocalLoss, Samples, SigmoidCELoss, SmoothL1Loss, SoftmaxCELoss
from d2_balance.modeling.compatibility import check_pairing
from d2_balance.modeling.criterion import PositiveEMA, SampleNormalizer, detection_losses
from d2_balance.reweight import ISR, ClassWeights
from d2_balance.utils.distributed import sum_across_ranks

from ..losses.test_contract import K, make
from ..two_ranks import results_of_two_ranks

REFERENCE = Path(__file__).parent.parent / "reference" / "class_balanced_weights.npz"
COUNT = [900.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_effective_number_equals_the_authors_figures(beta):
    ref = np.load(REFERENCE)
    weight = ClassWeights(instance_count=ref["count"], beta=beta).weight[:-1]
    expected = torch.from_numpy(ref[f"weight_beta{beta}"])
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


def test_effective_number_keeps_its_digits_near_one():
    # n = 3 and beta = 1 - 1e-12: 1 / (1 + beta + beta^2), which is 1/3 within 1e-12
    weight = ClassWeights(instance_count=[1.0, 3.0], beta=1 - 1e-12, normalize=False).weight
    assert weight.tolist() == pytest.approx([1.0, 1 / 3, 1.0], rel=1e-11)


FORMS = [("effective", 1.0), ("inverse", 1.0), ("inverse", 0.5)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("method", "power"), FORMS)
def test_weights_equal_the_loop_and_a_class_without_objects_weighs_one(method, power, normalize):
    found = ClassWeights(
        instance_count=COUNT, method=method, beta=0.99, power=power, normalize=normalize
    ).weight.tolist()
    weights = []
    for n in COUNT[:-1]:
        effective = sum(0.99**i for i in range(int(n)))  # (1 - beta^n) / (1 - beta)
        weights.append(1 / effective if method == "effective" else 1 / n**power)
    mean = sum(weights) / len(weights) if normalize else 1.0
    assert found == pytest.approx([*(w / mean for w in weights), 1.0, 1.0], rel=1e-9)


def test_a_list_may_hold_the_background():
    values = [1.0, 2.0, 3.0, 2.0]
    plain = ClassWeights(instance_count=[5, 5, 0], method="list", values=values, normalize=False)
    assert plain.weight.tolist() == values
    # mean of the classes 2
    scaled = ClassWeights(instance_count=[5, 5, 0], method="list", values=values)
    assert scaled.weight.tolist() == [0.5, 1.0, 1.5, 2.0]


def expected_sum(loss, weight, labels, target):
    """The weighted sum, entry by entry."""
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        for j in range(loss.shape[1]):
            own = j == label
            factor = {
                "samples": weight[label],
                "positives": weight[j] if own else 1.0,
                "negatives": 1.0 if own else weight[j],
                "both": weight[j],
            }[target]
            total += float(factor) * loss[i, j].item()
    return total


@pytest.mark.parametrize("target", ["samples", "positives", "negatives", "both"])
@pytest.mark.parametrize("others", [[], [ISR(k=1.0, bias=0.5)]], ids=["alone", "with ISR"])
def test_criterion_sums_the_weighted_entries(target, others):
    cls_loss, batch = FocalLoss(), make(FocalLoss(), dtype=torch.float64)
    weights = ClassWeights(
        instance_count=COUNT, method="inverse", target=target, background_weight=0.5
    )
    normalizer = PositiveEMA(initial=1.0).eval()  # the sum itself
    reweighters = [weights, *others]
    losses = detection_losses(batch, cls_loss, SmoothL1Loss(), reweighters, normalizer)
    loss = cls_loss(batch).detach()
    for other in others:
        loss = loss * other(batch, loss, loss[:0])[0].unsqueeze(1)
    expected = expected_sum(loss, weights.weight, batch.labels, target)
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(losses["loss_cls"], batch.logits)
    assert grad.isfinite().all() and grad.abs().sum() > 0


def test_softmax_losses_are_weighted_by_label():
    cls_loss = SoftmaxCELoss()
    batch = make(cls_loss, dtype=torch.float64)
    weights = ClassWeights(instance_count=COUNT, method="inverse")
    normalizer = PositiveEMA(initial=1.0).eval()
    found = detection_losses(batch, cls_loss, SmoothL1Loss(), [weights], normalizer)["loss_cls"]
    expected = (cls_loss(batch) * weights.weight[batch.labels]).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_entries_of_a_softmax_are_refused_before_training():
    weights = ClassWeights(instance_count=COUNT, target="negatives")
    with pytest.raises(
        ValueError, match="CLASSWEIGHTS.TARGET negatives .* SoftmaxCE has no loss for each class"
    ):
        check_pairing("RoI heads", SoftmaxCELoss(), SmoothL1Loss(), [weights])
    check_pairing("RoI heads", SigmoidCELoss(), SmoothL1Loss(), [weights])


def test_weights_are_saved_with_the_model():
    trained = ClassWeights(instance_count=COUNT)
    later = ClassWeights(instance_count=[0.0] * K)  # inference: no counts
    assert later.weight.tolist() == [1.0] * (K + 1)
    later.load_state_dict(trained.state_dict())
    assert torch.equal(later.weight, trained.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_empty_batches(dtype):
    for rows, positives in ((60, 9), (30, 0), (0, 0)):
        batch = make(FocalLoss(), rows=rows, positives=positives, dtype=dtype)
        weights = ClassWeights(instance_count=COUNT, target="both")
        losses = detection_losses(batch, FocalLoss(), SmoothL1Loss(), [weights], PositiveEMA())
        (grad,) = torch.autograd.grad(losses["loss_cls"], batch.logits)
        assert losses["loss_cls"].isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance_count", [-1.0]),
        ("method", "log"),
        ("beta", 1.0),
        ("power", -1.0),
        ("background_weight", -0.5),
        ("target", "rows"),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"ClassWeights: {name} is .*; must be"):
        ClassWeights(**{"instance_count": [1.0, 2.0], name: value})


@pytest.mark.parametrize("values", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("inf")], [1.0] * 4])
def test_a_list_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError, match="ClassWeights: values is .*; must be 2 numbers"):
        ClassWeights(instance_count=[1.0, 2.0], method="list", values=values)


def disalign_reference():
    path = Path(__file__).parents[1] / "reference" / "disalign.npz"
    with np.load(path) as file:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in file.items()}


@pytest.mark.parametrize("form", ["plain", "cosine"])
def test_the_weighted_mean_equals_disaligns(form):
    f = disalign_reference()
    part = ClassWeights(
        instance_count=f["instance_count"], method="inverse", power=0.8, denominator="weights"
    )
    torch.testing.assert_close(part.weight, f["grw_weight"], rtol=1e-6, atol=1e-12)
    logits = f[f"{form}_logits"].clone().requires_grad_()
    samples = Samples(logits=logits, labels=f[f"{form}_labels"], num_classes=8)
    cls = SoftmaxCELoss().compute(samples)
    value = (part(samples, cls, None)[0] * cls).sum() / len(logits)
    torch.testing.assert_close(value, f[f"{form}_loss"], rtol=1e-6, atol=1e-12)
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(grad, f[f"{form}_grad_logits"], rtol=1e-6, atol=1e-12)


def weighted(ranks):
    """Gradient of the weighted mean over the samples of some ranks; rank 1 has few or none."""
    part = ClassWeights(instance_count=[9, 3, 0], method="inverse", denominator="weights")
    grads = []
    for step in range(2):
        sizes = {0: 30, 1: (7, 0)[step]}
        logits = torch.cat([
            torch.randn(sizes[r], 4, generator=torch.Generator().manual_seed(r)) for r in ranks
        ]).double().requires_grad_()  # fmt: skip
        labels = torch.cat([torch.arange(sizes[r]) % 4 for r in ranks])
        samples = Samples(logits=logits, labels=labels, num_classes=3)
        normalizer = SampleNormalizer()
        cls = SoftmaxCELoss().compute(samples)
        (count,) = sum_across_ranks([normalizer.count(samples)])
        normalizer.update(count)
        value = (part(samples, cls, None)[0] * cls).sum() / normalizer.value()
        grads.append(torch.autograd.grad(value, logits)[0])
    return grads


def of_rank(rank):
    return weighted([rank])


def test_the_weighted_mean_is_that_of_all_ranks(tmp_path):
    first, second = results_of_two_ranks(of_rank, tmp_path)
    for one, two, joined in zip(first, second, weighted([0, 1]), strict=True):
        torch.testing.assert_close(torch.cat([one, two]) / 2, joined)  # DDP averages


def test_the_weighted_mean_is_of_samples():
    with pytest.raises(
        ValueError, match="denominator is 'weights'; must be samples with target bo"
    ):
        ClassWeights(instance_count=[1, 2], target="both", denominator="weights")
    with pytest.raises(
        ValueError, match="denominator is 'images'; must be one of samples, weights"
    ):
        ClassWeights(instance_count=[1, 2], denominator="images")
