"""OHEM, ISR-N and IoU-balanced sampling on planted proposals, against slow oracles."""

import pytest
import torch
from torchvision.ops import box_iou

from d2_balance.sampling import ISRN, OHEM, Candidates, IoUBalanced
from d2_balance.sampling.iou_balanced import sample_evenly

K = 3


def candidates(count=40, positives=6, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 12 + torch.rand(count, 2, generator=generator) * 8], 1)
    labels = torch.full((count,), K)
    labels[torch.randperm(count, generator=generator)[:positives]] = 1
    values = {
        "boxes": boxes,
        "labels": labels,
        "num_classes": K,
        "iou": torch.rand(count, generator=generator) * 0.5,
        "cls_loss": torch.rand(count, generator=generator),
        "box_loss": torch.rand(count, generator=generator) * (labels < K),
        "scores": torch.rand(count, generator=generator) * 0.4,
        "pred_boxes": boxes + torch.randn(count, 4, generator=generator),
    }
    return Candidates(**{**values, **changes})


def greedy_nms(boxes, scores, threshold):
    """Survivors by score and, for each box, the first survivor that it overlaps."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    iou = box_iou(boxes, boxes).tolist()
    kept = []
    for i in order:
        if all(iou[i][j] <= threshold for j in kept):
            kept.append(i)
    owner = [i if i in kept else next(j for j in kept if iou[i][j] > threshold) for i in order]
    return kept, dict(zip(order, owner, strict=True))


def test_ohem_keeps_the_hardest_after_suppression():
    c = candidates()
    loss = (c.cls_loss + c.box_loss).tolist()
    expected, _ = greedy_nms(c.boxes, loss, 0.7)
    (chosen,) = OHEM(rois_per_image=8)([c], 512, 0.25)
    assert chosen.keep.tolist() == expected[:8] and chosen.weight is None


def test_ohem_counts_the_box_loss_and_drops_neighbours():
    # 0 and 1 are the same place; 2 is alone. By classification loss alone 2 would be first.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9.5], [50, 50, 60, 60]])
    c = Candidates(
        boxes=boxes,
        labels=torch.tensor([0, 0, K]),
        num_classes=K,
        iou=torch.zeros(3),
        cls_loss=torch.tensor([0.5, 0.4, 0.9]),
        box_loss=torch.tensor([0.6, 0.6, 0.0]),
    )
    (chosen,) = OHEM()([c], 512, 0.25)
    assert chosen.keep.tolist() == [0, 2]


def test_ohem_per_class_suppression_spares_other_labels():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9.5]])
    c = candidates(2, 0, boxes=boxes, labels=torch.tensor([0, K]))
    assert len(OHEM()([c], 512, 0.25)[0].keep) == 1
    assert len(OHEM(per_class_nms=True)([c], 512, 0.25)[0].keep) == 2


def test_ohem_over_the_batch_lets_one_image_take_all():
    easy, hard = candidates(20, seed=1), candidates(20, seed=2)
    easy = Candidates(**{**vars(easy), "cls_loss": easy.cls_loss - 10})
    one = OHEM(rois_per_image=5, nms_threshold=1.0)([easy, hard], 512, 0.25)
    assert [len(s.keep) for s in one] == [5, 5]
    whole = OHEM(rois_per_image=5, nms_threshold=1.0, scope="batch")([easy, hard], 512, 0.25)
    assert [len(s.keep) for s in whole] == [0, 10]
    expected = (hard.cls_loss + hard.box_loss).argsort(descending=True)[:10]
    assert whole[1].keep.tolist() == expected.tolist()


def test_ohem_as_the_authors_code_equals_the_loop():
    batch = [candidates(40, 12, seed=5), candidates(40, 12, seed=6)]
    left = []
    for n, c in enumerate(batch):
        loss = (c.cls_loss + c.box_loss).tolist()
        for label in set(c.labels.tolist()):
            own = [i for i in range(len(loss)) if c.labels[i] == label]
            kept, _ = greedy_nms(c.boxes[own], [loss[i] for i in own], 0.7)
            left += [(-loss[own[i]], n, own[i]) for i in kept]
    first = sorted(left)[:12]
    chosen = OHEM(rois_per_image=6, scope="batch", per_class_nms=True)(batch, 512, 0.25)
    for n, selection in enumerate(chosen):
        assert selection.keep.tolist() == [i for _, image, i in first if image == n]


def test_ohem_takes_a_loss_that_is_no_number_last():
    c = candidates(10, 0)
    c.cls_loss[4] = torch.nan
    (chosen,) = OHEM(rois_per_image=9, nms_threshold=1.0)([c], 512, 0.25)
    assert len(chosen.keep) == 9 and 4 not in chosen.keep


@pytest.mark.parametrize("proposal_sampler", [OHEM(), ISRN(), IoUBalanced()], ids=lambda s: s.name)
@pytest.mark.parametrize(("count", "positives"), [(0, 0), (1, 0), (1, 1), (5, 0), (5, 5)])
def test_few_proposals_are_all_kept(proposal_sampler, count, positives):
    spread = torch.arange(count).unsqueeze(1) * 100.0 + torch.tensor([0.0, 0.0, 9.0, 9.0])
    (chosen,) = proposal_sampler([candidates(count, positives, boxes=spread)], 512, 0.25)
    assert sorted(chosen.keep.tolist()) == list(range(count))
    assert chosen.weight is None or chosen.weight.isfinite().all()


def isr_n_oracle(c, wanted, k=0.5, bias=0.0):
    """Ranked negatives in order, and the weights before the rescaling, with loops."""
    negative = [i for i in range(len(c.labels)) if c.labels[i] == K]
    high = [i for i in negative if c.scores[i] > 0.05]
    scores = {i: c.scores[i].item() for i in high}
    place = {i: n for n, i in enumerate(high)}
    _, owner = greedy_nms(c.pred_boxes[high], [scores[i] for i in high], 0.5)
    groups = {}
    for i in high:
        groups.setdefault(owner[place[i]], []).append(i)
    local = {}
    for members in groups.values():
        for rank, i in enumerate(sorted(members, key=lambda i: -scores[i])):
            local[i] = rank
    order = sorted(high, key=lambda i: -(len(high) - local[i] + scores[i]))
    wanted = min(wanted, len(negative))  # as many as there are
    taken = order[:wanted]
    up = max(wanted, len(high))
    weights = [((1 - bias) * (up - rank) / up + bias) ** k for rank in range(len(taken))]
    fill = wanted - len(taken)
    return taken, weights + [weights[-1] if weights else 1.0] * fill


@pytest.mark.parametrize("batch_size", [12, 30, 100])
def test_isr_n_equals_the_loop(batch_size):
    c = candidates(60, 8, seed=batch_size)
    low = torch.arange(60) % 3 == 0
    c = Candidates(**{**vars(c), "scores": torch.where(low, 0.01, c.scores + 0.06)})
    (chosen,) = ISRN()([c], batch_size, 0.25)
    positives = int((c.labels[chosen.keep] < K).sum())
    assert positives == min(8, int(batch_size * 0.25))
    assert (c.labels[chosen.keep[:positives]] < K).all()
    assert torch.equal(chosen.weight[:positives], torch.ones(positives))

    ranked, weights = isr_n_oracle(c, batch_size - positives)
    negative = chosen.keep[positives:]
    assert negative[: len(ranked)].tolist() == ranked
    fill = negative[len(ranked) :]
    assert (c.scores[fill] <= 0.05).all() and len(set(negative.tolist())) == len(negative)
    loss = c.cls_loss[negative]
    weights = torch.tensor(weights)
    expected = weights * loss.sum() / (weights * loss).sum()
    torch.testing.assert_close(chosen.weight[positives:], expected)
    torch.testing.assert_close((chosen.weight[positives:] * loss).sum(), loss.sum())


def test_iou_balanced_draws_the_same_number_from_every_bin():
    # 900 negatives far from any object, 60 near, 30 nearest
    iou = torch.cat([torch.rand(900) * 0.09 + 1e-3, torch.rand(60) * 0.09 + 0.11])
    iou = torch.cat([iou, torch.rand(30) * 0.09 + 0.21, torch.tensor([0.3])])
    drawn = sample_evenly(iou, 60, bins=3, floor=0.0)
    assert len(set(drawn.tolist())) == 60
    counts = torch.bincount((iou[drawn] / 0.1).ceil().long() - 1, minlength=3)
    assert counts.tolist() == [20, 20, 20]


def test_iou_balanced_fills_up_what_a_bin_lacks():
    iou = torch.cat([torch.rand(100) * 0.1, torch.full((2,), 0.3)])
    drawn = sample_evenly(iou, 30, bins=3, floor=0.0)
    assert len(set(drawn.tolist())) == 30
    assert {100, 101} <= set(drawn.tolist())


def test_iou_balanced_leaves_what_is_below_the_floor_for_last():
    iou = torch.cat([torch.full((50,), 0.05), torch.linspace(0.11, 0.4, 20)])
    drawn = sample_evenly(iou, 20, bins=3, floor=0.1)
    assert sorted(drawn.tolist()) == list(range(50, 70))


def test_without_a_floor_background_far_from_objects_is_in_the_first_bin():
    iou = torch.cat([torch.zeros(50), torch.full((50,), 0.25), torch.full((50,), 0.45)])
    drawn = sample_evenly(iou, 30, bins=3, floor=0.0)
    assert [(drawn // 50 == n).sum() for n in range(3)] == [10, 10, 10]


def test_iou_balanced_is_random():
    iou = torch.rand(300)
    first, second = (set(sample_evenly(iou, 30, 3, 0.0).tolist()) for _ in range(2))
    assert first != second


def test_stock_share_of_positives_is_kept():
    (chosen,) = IoUBalanced()([candidates(100, 60)], 40, 0.25)
    labels = candidates(100, 60).labels[chosen.keep]
    assert (labels < K).sum() == 10 and len(labels) == 40


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (OHEM, {"rois_per_image": 0}),
        (OHEM, {"nms_threshold": 1.5}),
        (OHEM, {"scope": "epoch"}),
        (ISRN, {"k": -1.0}),
        (ISRN, {"score_threshold": 1.0}),
        (IoUBalanced, {"bins": 0}),
        (IoUBalanced, {"floor": 1.0}),
    ],
)
def test_arguments_out_of_range_are_named(cls, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name}"):
        cls(**wrong)


def test_isr_n_with_fewer_negatives_than_wanted_weighs_by_those_there_are():
    # u = (2 - 0) / 2 and (2 - 1) / 2, w = u^0.5 = 1 and 0.7071; equal losses: 2 w / 1.7071
    apart = torch.tensor([[0.0, 0.0, 9.0, 9.0], [50.0, 50.0, 59.0, 59.0]])
    c = candidates(2, 0, boxes=apart, pred_boxes=apart)
    c = Candidates(**{**vars(c), "cls_loss": torch.ones(2), "scores": torch.tensor([0.9, 0.5])})
    (chosen,) = ISRN()([c], 512, 0.25)
    assert chosen.weight.tolist() == pytest.approx([1.1716, 0.8284], abs=1e-4)


def test_the_fill_of_iou_balanced_is_uniform_over_what_is_left():
    # 1000, 400 and 1 negatives, 100 wanted of each: 99 of 1200 others fill up, 300 of them in the
    # middle bin, which so gives 100 + 99 * 300 / 1200 = 124.75 on average
    iou = torch.cat([torch.full((1000,), 0.1), torch.full((400,), 0.4), torch.tensor([0.9])])
    torch.manual_seed(0)
    counts = [int((iou[sample_evenly(iou, 300, 3, 0.0)] == iou[1000]).sum()) for _ in range(400)]
    # hypergeometric with a standard deviation of 4.1: 0.21 for the mean of 400
    assert sum(counts) / 400 == pytest.approx(124.75, abs=0.9)
