"""AP-loss and Rank & Sort against loops over positives, and what their gradients must satisfy."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_balance.losses import ALRPLoss, APLoss, RankSortLoss, Samples
from d2_balance.losses._kernels.ranking import StepBuckets, find_buckets
from d2_balance.losses.alrp import alrp_and_gradient, alrp_box_loss
from d2_balance.losses.ap import ap_loss_and_gradient
from d2_balance.losses.rank_sort import rank_sort_and_gradient

from ..conftest import make_inputs, small_cfg


def step(x, delta):
    return (x / (2 * delta) + 0.5).clamp(0, 1)


def scores_and_positives(seed=0, entries=300, count=17):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(entries, generator=generator, dtype=torch.float64) * 2
    positive = torch.randperm(entries, generator=generator)[:count].sort().values
    targets = torch.rand(count, generator=generator, dtype=torch.float64)
    return scores, positive, targets


def slow_ap(scores, positive, delta):
    """Algorithm 1 of the paper: positives in ascending order, running maximum of the precision."""
    is_pos = torch.zeros_like(scores, dtype=torch.bool)
    is_pos[positive] = True
    grad, best, total = torch.zeros_like(scores), 0.0, 0.0
    for i in positive[scores[positive].argsort()].tolist():
        above = step(scores - scores[i], delta)
        ranked = above[is_pos].sum() + 0.5
        below = above * ~is_pos
        precision = ranked / (ranked + below.sum())
        update = below / (ranked + below.sum())
        if precision < best:
            update = update * (1 - best) / (1 - precision)
        else:
            best = float(precision)
        grad += update
        grad[i] -= 1 - best
        total += 1 - best
    return total / len(positive), grad / len(positive)


def slow_rank_sort(scores, positive, targets, delta):
    """Equations 6 to 12, one positive at a time."""
    is_pos = torch.zeros_like(scores, dtype=torch.bool)
    is_pos[positive] = True
    grad, ranking, sorting = torch.zeros_like(scores), 0.0, 0.0
    for i, y in zip(positive.tolist(), targets, strict=True):
        above = step(scores - scores[i], delta)
        pos, neg = above[positive], above * ~is_pos
        error = neg.sum() / (pos.sum() + neg.sum())
        current = (pos * (1 - targets)).sum() / pos.sum()
        better = pos * (targets >= y)
        excess = current - (better * (1 - targets)).sum() / better.sum()
        ranking, sorting = ranking + error, sorting + excess
        grad[i] -= error
        if neg.sum() > 0:
            grad += error * neg / neg.sum()
        worse = pos * (targets < y)
        if worse.sum() > 0:
            grad[i] -= excess
            grad[positive] += excess * worse / worse.sum()
    count = len(positive)
    return ranking / count, sorting / count, grad / count


@pytest.mark.parametrize("delta", [0.25, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_the_loop(seed, delta):
    scores, positive, _ = scores_and_positives(seed)
    loss, grad = ap_loss_and_gradient(scores, positive, delta)
    expected, expected_grad = slow_ap(scores, positive, delta)
    assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_rank_sort_equals_the_loop(seed):
    scores, positive, targets = scores_and_positives(seed)
    ranking, sorting, grad = rank_sort_and_gradient(scores, positive, targets, 0.5)
    expected = slow_rank_sort(scores, positive, targets, 0.5)
    assert ranking.item() == pytest.approx(float(expected[0]), abs=1e-12)
    assert sorting.item() == pytest.approx(float(expected[1]), abs=1e-12)
    torch.testing.assert_close(grad, expected[2], rtol=1e-9, atol=1e-12)


def test_gradient_of_ap_moves_as_much_up_as_down():
    scores, positive, _ = scores_and_positives()
    loss, grad = ap_loss_and_gradient(scores, positive, 1.0)
    assert grad[positive].sum().item() == pytest.approx(-loss.item())
    assert grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_gradient_of_rank_sort_sums_to_zero():
    scores, positive, targets = scores_and_positives()
    assert rank_sort_and_gradient(scores, positive, targets, 0.5)[2].sum().abs() < 1e-12


def test_perfect_ranking_costs_nothing():
    scores = torch.tensor([5.0, 4, -5, -6]).double()
    loss, grad = ap_loss_and_gradient(scores, torch.tensor([0, 1]), 0.5)
    assert loss == 0 and (grad == 0).all()


def test_no_positive_costs_nothing_and_keeps_the_graph():
    logits = torch.randn(4, 3, requires_grad=True)
    for loss in (APLoss(), ALRPLoss(), RankSortLoss()):
        value = loss(Samples(logits=logits, labels=torch.full((4,), 3), num_classes=3))
        (grad,) = torch.autograd.grad(value, logits)
        assert value == 0 and (grad == 0).all()


def test_an_iou_of_zero_keeps_the_object_positive():
    # in the release such a positive becomes background (its target is its label)
    scores, positive, targets = scores_and_positives()
    zero, small = targets.clone(), targets.clone()
    zero[3], small[3] = 0.0, 1e-6
    ours = rank_sort_and_gradient(scores, positive, zero, 0.5)
    expected = slow_rank_sort(scores, positive, small, 0.5)
    assert ours[0].item() == pytest.approx(float(expected[0]), abs=1e-12)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_alrp_equals_the_loop(seed):
    scores, positive, errors = scores_and_positives(seed)
    loss, grad, rank = alrp_and_gradient(scores, positive, errors, 1.0)
    is_pos = torch.zeros_like(scores, dtype=torch.bool)
    is_pos[positive] = True
    expected, precision = torch.zeros_like(scores), 0.0
    for place, i in enumerate(positive.tolist()):
        above = step(scores - scores[i], 1.0)
        neg = above * ~is_pos
        above[i] = 0
        ranked = 1 + above[is_pos].sum() + neg.sum()
        assert rank[place].item() == pytest.approx(ranked.item())
        lrp = ((above[positive] * errors).sum() + neg.sum()) / ranked
        precision += float((ranked - neg.sum()) / ranked)
        expected[i] -= lrp
        expected += lrp * neg / neg.sum()
    assert loss.item() == pytest.approx(1 - precision / 17)
    torch.testing.assert_close(grad, expected / 17, rtol=1e-9, atol=1e-12)


def test_alrp_box_part_by_hand():
    # scores 2, 3, 1 with errors .1, .2, .3 and ranks 2, 1, 4: (.2/1 + .3/2 + .6/4) / 3
    value = alrp_box_loss(
        torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3, 1]), torch.tensor([2.0, 1, 4])
    )
    assert value.item() == pytest.approx((0.2 + 0.15 + 0.15) / 3)


def test_alrp_sets_its_weight_after_a_period():
    loss = ALRPLoss(period=2)
    loss.update(torch.tensor([0.9, 0.3, 1.0]).double())
    assert loss.balance == 50 and loss.sums.tolist() == pytest.approx([0.9, 0.3, 1.0])
    loss.update(torch.tensor([0.7, 0.1, 1.0]).double())
    # means .8 and .2: (.8 + .2) / .2
    assert loss.balance.item() == pytest.approx(5.0) and loss.sums.tolist() == [0, 0, 0]


@pytest.mark.parametrize("cls", [ALRPLoss, RankSortLoss])
@pytest.mark.parametrize("objects", [3, 0])
def test_boxes_are_coupled_in_the_model(cls, objects):
    keys = ["MODEL.BALANCE.CLS_LOSS", cls.name, "MODEL.BALANCE.BOX_LOSS", "GIoU"]
    model = build_model(small_cfg("retinanet", *keys))
    with EventStorage(0):
        losses = model(make_inputs(objects=objects))
    sum(losses.values()).backward()
    if objects == 0:
        assert losses["loss_cls"] == 0 and losses["loss_box_reg"] == 0
    elif cls is RankSortLoss:  # the box loss has the value of the ranking loss
        torch.testing.assert_close(losses["loss_box_reg"], losses["loss_cls"])
    else:
        assert losses["loss_box_reg"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_boxes_without_a_loss_per_box_are_refused():
    keys = ["MODEL.BALANCE.CLS_LOSS", "ALRP", "MODEL.BALANCE.BOX_LOSS", "GHMR"]
    with pytest.raises(ValueError, match="CLS_LOSS ALRP ranks boxes as well and BOX_LOSS GHMR has"):
        build_model(small_cfg("retinanet", *keys))


def test_sums_over_pairs_equal_the_matrix_with_ties():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(200, generator=generator, dtype=torch.float64).round(decimals=1)
    centers = torch.cat([values[:20], values[:5]])
    weights = torch.rand(25, generator=generator, dtype=torch.float64)
    matrix = step(values.unsqueeze(1) - centers, 0.3)  # (n, P)
    buckets = StepBuckets.build(values, centers, 0.3)
    torch.testing.assert_close(buckets.sum_over_values(), matrix.sum(dim=0))
    torch.testing.assert_close(buckets.sum_over_centers(weights), matrix @ weights)


@pytest.mark.parametrize("cls", [APLoss, ALRPLoss, RankSortLoss])
def test_delta_must_be_positive(cls):
    with pytest.raises(ValueError, match=f"{cls.name}: delta is 0.0; must be"):
        cls(delta=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0, 1e6])
def test_the_grid_places_values_as_the_binary_search_does(dtype, spread):
    edges = (torch.randn(6, dtype=torch.float64) * spread).sort().values
    values = torch.randn(5000, dtype=dtype) * spread * 2
    values[:600] = edges.to(dtype).repeat(100)  # ties, and neighbours of ties
    values[600:1200] = torch.nextafter(values[:600], values.new_tensor(-torch.inf))
    values[1200:1203] = values.new_tensor([torch.inf, -torch.inf, 1e30])
    expected = torch.searchsorted(edges, values.double(), right=True)
    assert torch.equal(find_buckets(edges, values).long(), expected)
