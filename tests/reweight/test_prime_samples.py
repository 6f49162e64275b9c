"""PISA: ranks, weights, numbers of mmdet, gradients, ids over a batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage

from d2_balance.losses import DRLoss, FocalLoss, Samples, SigmoidCELoss, SoftmaxCELoss
from d2_balance.losses._kernels.ranks import rank_within
from d2_balance.reweight import CARL, ISR, REWEIGHTERS
from d2_balance.reweight.isr import hierarchical_rank

from ..conftest import make_inputs, small_cfg

REFERENCE = Path(__file__).parent.parent / "reference" / "pisa_softmax.npz"


def reference_samples():
    ref = {name: torch.tensor(value) for name, value in np.load(REFERENCE).items()}
    labels, ids = ref["labels"], ref["matched_gt"]
    pos = labels < ref["num_classes"]
    logits, deltas = ref["logits"].requires_grad_(), ref["pred_deltas"].requires_grad_()
    samples = Samples(
        logits=logits,
        labels=labels,
        num_classes=int(ref["num_classes"]),
        pred_deltas=deltas[pos],
        boxes=ref["boxes"][pos],
        gt_boxes=ref["gt_boxes"][ids[pos]],
        gt_index=ids[pos],
        box_transform=Box2BoxTransform(weights=tuple(ref["box_coder_weights"].tolist())),
    )
    return ref, samples, logits, deltas


def test_isr_equals_mmdet():
    ref, samples, *_ = reference_samples()
    isr = ISR(k=float(ref["isr_k"]), bias=float(ref["isr_bias"]))
    weights, none = isr(samples, SoftmaxCELoss()(samples), None)
    torch.testing.assert_close(weights, ref["isr_weights"], rtol=1e-6, atol=1e-9)
    assert none is None and not weights.requires_grad


def test_carl_equals_mmdet_in_value_and_both_gradients():
    ref, samples, logits, deltas = reference_samples()
    carl = CARL(k=float(ref["carl_k"]), bias=float(ref["carl_bias"]), mode="replace")
    _, weights = carl(samples, SoftmaxCELoss()(samples), None)
    off = (samples.pred_deltas - samples.target_deltas).abs()
    beta = float(ref["smooth_l1_beta"])
    smooth = torch.where(off < beta, 0.5 * off * off / beta, off - 0.5 * beta)
    loss = (weights.unsqueeze(1) * smooth).sum() / ref["carl_avg_factor"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref["carl_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, ref["carl_grad_logits"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(deltas.grad, ref["carl_grad_deltas"], rtol=1e-6, atol=1e-9)


def test_adding_carl_keeps_the_box_loss():
    _, samples, *_ = reference_samples()
    _, added = CARL(mode="add")(samples, SoftmaxCELoss()(samples), None)
    _, alone = CARL(mode="replace")(samples, SoftmaxCELoss()(samples), None)
    torch.testing.assert_close(added, alone + 1)
    assert alone.mean().item() == pytest.approx(1.0)


def slow_rank(iou, gt_index, labels):
    """IoU-HLR with loops over objects and classes."""
    local = {}
    for gt in set(gt_index):
        members = sorted((i for i in range(len(iou)) if gt_index[i] == gt), key=lambda i: -iou[i])
        local.update({i: rank for rank, i in enumerate(members)})
    rank = [0] * len(iou)
    for c in set(labels):
        members = [i for i in range(len(iou)) if labels[i] == c]
        for place, i in enumerate(sorted(members, key=lambda i: (local[i], -iou[i]))):
            rank[i] = place
    return rank


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    gt_index = torch.randint(0, 9, (40,), generator=generator)
    labels = gt_index % 4  # an object has one class
    iou = torch.rand(40, generator=generator)
    expected = slow_rank(iou.tolist(), gt_index.tolist(), labels.tolist())
    assert hierarchical_rank(iou, gt_index, labels).tolist() == expected


def test_equal_ious_keep_their_order():
    zeros = torch.zeros(4).long()
    assert hierarchical_rank(torch.full((4,), 0.5), zeros, zeros).tolist() == [0, 1, 2, 3]
    assert rank_within(torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0])).tolist() == [1, 0, 0]


def test_weighted_sum_of_the_loss_stays():
    _, samples, *_ = reference_samples()
    ce = SoftmaxCELoss()(samples)
    weights, _ = ISR()(samples, ce, None)
    pos = samples.pos
    assert (weights * ce)[pos].sum().item() == pytest.approx(ce[pos].sum().item())
    assert (weights[samples.labels == samples.num_classes] == 1).all()


@pytest.mark.parametrize("loss", [SoftmaxCELoss(), SigmoidCELoss(), FocalLoss()])
def test_no_positives(loss):
    logits = torch.randn(5, loss.num_outputs(3), requires_grad=True)
    samples = Samples(
        logits=logits,
        labels=torch.full((5,), 3),
        num_classes=3,
        pred_deltas=torch.zeros(0, 4),
        boxes=torch.zeros(0, 4),
        gt_boxes=torch.zeros(0, 4),
        gt_index=torch.zeros(0).long(),
        box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
    )
    cls = loss(samples)
    weights, _ = ISR()(samples, cls, None)
    assert (weights == 1).all()
    _, boxes = CARL()(samples, cls, None)
    assert boxes.shape == (0,)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("kind", ["retinanet", "faster", "cascade"])
def test_objects_have_ids_of_their_own_over_the_batch(kind, agnostic, monkeypatch):
    # with offsets of the previous image's objects only, three images would share ids
    seen = []
    forward = ISR.forward

    def record(self, samples, cls, box):
        seen.append(samples)
        return forward(self, samples, cls, box)

    monkeypatch.setattr(ISR, "forward", record)
    keys = ["MODEL.BALANCE.REWEIGHTERS", ["ISR", "CARL"]]
    keys += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic or kind == "cascade"]
    model = build_model(small_cfg(kind, *keys))
    inputs = make_inputs(images=4, objects=3, empty=(1,))
    with EventStorage(0):
        losses = model(inputs)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    boxes = torch.cat([x["instances"].gt_boxes.tensor for x in inputs])
    classes = torch.cat([x["instances"].gt_classes for x in inputs])
    assert len(seen) == (3 if kind == "cascade" else 1)
    for samples in seen:
        assert torch.equal(samples.gt_boxes, boxes[samples.gt_index])
        assert torch.equal(samples.labels[samples.pos], classes[samples.gt_index])


def test_losses_without_rows_are_refused():
    keys = ["MODEL.BALANCE.REWEIGHTERS", ["ISR"], "MODEL.BALANCE.CLS_LOSS", "DR"]
    with pytest.raises(
        ValueError, match="REWEIGHTERS ISR weights single samples and CLS_LOSS DR has no"
    ):
        build_model(small_cfg("retinanet", *keys))
    assert not DRLoss.elementwise


@pytest.mark.parametrize("loss", ["EQLv2", "Seesaw"])
def test_scores_that_are_no_plain_sigmoid_or_softmax_are_refused(loss):
    keys = ["MODEL.BALANCE.REWEIGHTERS", ["CARL"], "MODEL.BALANCE.CLS_LOSS", loss]
    match = f"REWEIGHTERS CARL reads class scores off the logits and CLS_LOSS {loss} has outputs"
    with pytest.raises(ValueError, match=match):
        build_model(small_cfg("faster", *keys))


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (ISR, {"k": -1.0}, "k"),
        (ISR, {"bias": 2.0}, "bias"),
        (CARL, {"bias": -1.0}, "bias"),
        (CARL, {"mode": "both"}, "mode"),
    ],
)
def test_arguments_out_of_range_are_named(cls, arguments, name):
    assert cls.__name__ in REWEIGHTERS
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name} is .*; must be"):
        cls(**arguments)
