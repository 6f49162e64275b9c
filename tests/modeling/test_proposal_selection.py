"""Selectors inside RoI heads: what reaches the losses, and what a mining pass must not touch."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_balance.losses import CLS_LOSSES

from ..conftest import CLASSES, make_inputs, small_cfg


def train_step(model, inputs):
    with EventStorage():
        return model(inputs)


def build(kind, *overrides):
    torch.manual_seed(0)
    return build_model(small_cfg(kind, *overrides)).train()


def record(model, monkeypatch):
    """Proposals that reach the losses, one list per call."""
    calls = []
    layers = model.roi_heads._output_layers()
    for layer in layers:
        stock = layer.losses

        def losses(predictions, proposals, stock=stock):
            calls.append(proposals)
            return stock(predictions, proposals)

        monkeypatch.setattr(layer, "losses", losses)
    return calls


SAMPLER = "MODEL.BALANCE.PROPOSAL_SAMPLER"


@pytest.mark.parametrize("kind", ["mask", "cascade"])
@pytest.mark.parametrize("loss", ["", "SigmoidCE", "Seesaw"])
def test_ohem_trains_with_few_proposals_in_every_stage(kind, loss, monkeypatch):
    options = (SAMPLER, "OHEM", "MODEL.BALANCE.OHEM.ROIS_PER_IMAGE", 7)
    model = build(kind, *options, "MODEL.BALANCE.CLS_LOSS", loss)
    calls = record(model, monkeypatch)
    losses = train_step(model, make_inputs(3, empty=(1,)))
    assert len(calls) == (3 if kind == "cascade" else 1)
    assert all(1 <= len(p) <= 7 for call in calls for p in call)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    for layer in model.roi_heads._output_layers():
        assert layer.cls_score.weight.grad.abs().sum() > 0


def test_later_stages_choose_among_all_refined_boxes(monkeypatch):
    model = build("cascade", SAMPLER, "OHEM", "MODEL.BALANCE.OHEM.ROIS_PER_IMAGE", 3)
    seen = []
    stock = model.roi_heads.select

    def select(proposals, stage):
        seen.append((stage, [len(p) for p in proposals]))
        return stock(proposals, stage)

    monkeypatch.setattr(model.roi_heads, "select", select)
    train_step(model, make_inputs(2))
    assert [stage for stage, _ in seen] == [0, 1, 2]
    for _, sizes in seen:
        assert min(sizes) > 20  # 40 proposals and 3 objects, not the 3 that were kept


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_ohem_selects_what_the_losses_of_the_whole_set_say(kind, monkeypatch):
    """The proposals that reach the loss are the hardest of a pass over all of them."""
    options = (SAMPLER, "OHEM", "MODEL.BALANCE.OHEM.NMS_THRESHOLD", 1.0)
    model = build(kind, *options, "MODEL.BALANCE.OHEM.ROIS_PER_IMAGE", 5)
    heads, chosen = model.roi_heads, []
    stock = heads.select

    def select(proposals, stage):
        _head, layers = heads.head_modules(stage)
        scores, deltas = heads.run_head(proposals, stage)
        cls, box = layers.losses_per_sample((scores, deltas), proposals)
        order = (cls + box).argsort(descending=True)[:5]
        kept = stock(proposals, stage)
        expected = proposals[0].proposal_boxes.tensor[order]
        torch.testing.assert_close(kept[0].proposal_boxes.tensor, expected)
        chosen.append(stage)
        return kept

    monkeypatch.setattr(heads, "select", select)
    train_step(model, make_inputs(1))
    assert chosen == list(range(3 if kind == "cascade" else 1))


def test_losses_per_sample_are_cross_entropy_and_l1(monkeypatch):
    model = build("faster")
    calls = record(model, monkeypatch)
    train_step(model, make_inputs(2))
    (proposals,) = calls
    layers = model.roi_heads.box_predictor
    scores = torch.randn(sum(map(len, proposals)), CLASSES + 1)
    deltas = torch.randn(len(scores), CLASSES * 4)
    cls, box = layers.losses_per_sample((scores, deltas), proposals)
    sample = 0
    for p in proposals:
        for i in range(len(p)):
            label = int(p.gt_classes[i])
            log_prob = scores[sample].log_softmax(0)
            torch.testing.assert_close(cls[sample], -log_prob[label])
            expected = torch.zeros(())
            if label < CLASSES:
                target = layers.box2box_transform.get_deltas(
                    p.proposal_boxes.tensor[i : i + 1], p.gt_boxes.tensor[i : i + 1]
                )[0]
                expected = (deltas[sample, 4 * label : 4 * label + 4] - target).abs().sum()
            torch.testing.assert_close(box[sample], expected)
            sample += 1


@pytest.mark.parametrize("proposal_sampler", ["OHEM", "ISRN"])
def test_a_mining_pass_leaves_batch_norm_the_state_and_random_numbers_alone(proposal_sampler):
    model = build("faster", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.NORM", "BN",
                  "MODEL.BALANCE.CLS_LOSS", "DropLoss", SAMPLER, proposal_sampler,
                  "MODEL.BALANCE.CLASS_COUNTS_FILE", "checkpoint")  # fmt: skip
    heads = model.roi_heads
    heads.box_head.add_module("dropout", torch.nn.Dropout(0.5))
    before = copy.deepcopy(heads.state_dict())
    seen = []
    stock = heads._mine

    def mine(proposals, stage):
        state = torch.get_rng_state()
        modes = [m.training for m in heads.modules()]
        result = stock(proposals, stage)
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [m.training for m in heads.modules()]
        assert not any(value.requires_grad for fields in result for value in fields.values())
        for name, value in heads.state_dict().items():
            assert torch.equal(value, before[name]), name
        seen.append(stage)
        return result

    heads._mine = mine
    losses = train_step(model, make_inputs(2))
    assert seen == [0] and sum(losses.values()).isfinite()
    changed = [n for n, v in heads.state_dict().items() if not torch.equal(v, before[n])]
    assert any("running_mean" in name for name in changed), "the training pass updates as ever"


def test_isr_n_weights_reach_the_loss(monkeypatch):
    model = build("faster", SAMPLER, "ISRN", "MODEL.BALANCE.ISRN.SCORE_THRESHOLD", 0.0)
    calls = record(model, monkeypatch)
    layers = model.roi_heads.box_predictor
    captured = []
    stock = layers.samples

    def samples(*args):
        captured.append(stock(*args))
        return captured[-1]

    monkeypatch.setattr(layers, "samples", samples)
    losses = train_step(model, make_inputs(2))
    weight = captured[-1].sample_weight
    assert torch.equal(weight, torch.cat([p.sample_weight for p in calls[0]]))
    assert weight.unique().numel() > 5
    per_sample = torch.nn.functional.cross_entropy(
        captured[-1].logits, captured[-1].labels, reduction="none"
    )
    torch.testing.assert_close(losses["loss_cls"], (weight * per_sample).mean())


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("loss", ["SoftmaxCE", "SigmoidCE", "Seesaw"])
def test_mined_boxes_are_those_of_the_highest_class(loss, agnostic, monkeypatch):
    model = build("faster", SAMPLER, "ISRN", "MODEL.BALANCE.CLS_LOSS", loss,
                  "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)  # fmt: skip
    heads, layers = model.roi_heads, model.roi_heads.box_predictor
    torch.nn.init.normal_(layers.cls_score.weight, std=2.0)
    torch.nn.init.normal_(layers.bbox_pred.weight, std=1.0)
    seen = []
    stock, mined = heads.proposal_sampler.forward, layers.predict_boxes

    def select(candidates, *others):
        seen.append(candidates)
        return stock(candidates, *others)

    def boxes(predictions, proposals):
        seen.append((predictions, proposals))
        return mined(predictions, proposals)

    monkeypatch.setattr(heads.proposal_sampler, "forward", select)
    monkeypatch.setattr(layers, "predict_boxes", boxes)
    train_step(model, make_inputs(2))
    ((scores, deltas), proposals), candidates = seen
    sample, classes = 0, set()
    for p, c in zip(proposals, candidates, strict=True):
        for i, box in enumerate(p.proposal_boxes.tensor):
            z = scores[sample]
            p_all = z.sigmoid() if loss == "SigmoidCE" else z[: CLASSES + 1].softmax(0)
            if loss == "Seesaw":
                p_all = z[:CLASSES].softmax(0) * z[-2:].softmax(0)[0]
            best = int(p_all[:CLASSES].argmax())
            classes.add(best)
            torch.testing.assert_close(c.scores[i], p_all[best])
            delta = deltas[sample] if agnostic else deltas[sample, 4 * best : 4 * best + 4]
            expected = layers.box2box_transform.apply_deltas(delta[None], box[None])[0]
            torch.testing.assert_close(c.pred_boxes[i], expected)
            sample += 1
    assert sample == len(scores) and len(classes) > 1


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_without_sampling_every_labelled_proposal_trains_and_masks_are_capped(kind, monkeypatch):
    cap = ("MODEL.BALANCE.SAMPLING_FREE", True, "MODEL.BALANCE.MASKS_PER_IMAGE", 2)
    model = build(kind, *cap, "MODEL.MASK_ON", True)
    calls = record(model, monkeypatch)
    masks = []
    stock = model.roi_heads.mask_head.forward

    def forward(features, instances):
        masks.append(instances)
        return stock(features, instances)

    monkeypatch.setattr(model.roi_heads.mask_head, "forward", forward)
    losses = train_step(model, make_inputs(3, empty=(1,)))
    assert [len(p) for p in calls[0]] == [43, 40, 43]  # 40 proposals and the objects
    positives = [int((p.gt_classes < CLASSES).sum()) for p in calls[0]]
    assert positives[0] >= 3 and positives[1] == 0
    assert [len(p) for p in masks[0]] == [2, 0, 2]
    assert sum(losses.values()).isfinite()


def test_ignored_proposals_never_train(monkeypatch):
    bands = ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.1, 0.6], "MODEL.ROI_HEADS.IOU_LABELS", [0, -1, 1])
    model = build("faster", *bands, "MODEL.BALANCE.SAMPLING_FREE", True)
    calls = record(model, monkeypatch)
    train_step(model, make_inputs(2))
    assert sum(map(len, calls[0])) < 86
    assert all((p.gt_classes >= 0).all() for p in calls[0])


def test_selectors_do_nothing_at_inference():
    plain, chosen = build("cascade").eval(), build("cascade", SAMPLER, "OHEM").eval()
    inputs = make_inputs(1)
    with torch.no_grad():
        first, second = plain(inputs)[0]["instances"], chosen(inputs)[0]["instances"]
    assert torch.equal(first.scores, second.scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("MODEL.BALANCE.REWEIGHTERS", ["OHEM"]),
            "set MODEL.BALANCE.PROPOSAL_SAMPLER OHEM instead",
        ),
        ((SAMPLER, "OHEM", "MODEL.BALANCE.SAMPLING_FREE", True), "OHEM.*SAMPLING_FREE"),
        ((SAMPLER, "ISRN", "MODEL.BALANCE.CLS_LOSS", "DR"), "ISRN.*CLS_LOSS DR"),
        ((SAMPLER, "OHEM", "MODEL.BALANCE.BOX_LOSS", "GHMR"), "OHEM.*BOX_LOSS GHMR"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("faster", *options)


def test_every_elementwise_loss_can_be_mined(counts_file):
    for name, cls in CLS_LOSSES:
        if cls.elementwise:
            model = build("faster", "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file,
                          "MODEL.BALANCE.CLS_LOSS", name, SAMPLER, "OHEM")  # fmt: skip
            assert sum(train_step(model, make_inputs(2, empty=(0,))).values()).isfinite(), name


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("proposal_sampler", ["OHEM", "ISRN", "IoUBalanced"])
def test_dense_heads_refuse_proposal_samplers(kind, proposal_sampler):
    with pytest.raises(
        ValueError, match=f"{SAMPLER} {proposal_sampler} samples proposals and .* has none"
    ):
        build(kind, SAMPLER, proposal_sampler)
