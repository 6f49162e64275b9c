"""No background inside ignore regions, in any head; positives are those without regions."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2_balance.modeling.image_context import (
    covered,
    number_objects,
    regions_of,
    without_covered_background,
)
from d2_balance.modeling.proposal_generator.rpn import BalancedRPN
from d2_balance.modeling.roi_heads.fast_rcnn import BalancedFastRCNNOutputLayers

from ..conftest import CLASSES, make_inputs, small_cfg

RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
SIZE = 64


def with_regions(inputs, seed=0, count=2):
    """The inputs with random regions, every third image without."""
    generator = torch.Generator().manual_seed(seed)
    for index, record in enumerate(inputs):
        if index % 3 == 2:
            continue
        corner = torch.rand(count, 2, generator=generator) * 30
        side = torch.rand(count, 2, generator=generator) * 24 + 10
        record["ignore_boxes"] = torch.cat([corner, corner + side], dim=1)
    return inputs


def inside(boxes, record, ioa=0.5):
    """How many boxes a region of the image covers, with the areas written out."""
    regions = torch.as_tensor(record.get("ignore_boxes", ())).reshape(-1, 1, 4)
    if not len(boxes) or not len(regions):
        return 0
    first, last = boxes[:, :2], boxes[:, 2:]
    sides = torch.minimum(last, regions[..., 2:]) - torch.maximum(first, regions[..., :2])
    fraction = sides.clamp(min=0).prod(dim=2) / (last - first).prod(dim=1)
    return int((fraction >= ioa + 1e-5).any(dim=0).sum())


@pytest.fixture
def seen(monkeypatch):
    """Samples that reach the losses: (name of the head, boxes, labels) of each image."""
    by_head = []
    rpn_losses, head_losses = BalancedRPN.losses, BalancedFastRCNNOutputLayers.losses

    def of_rpn(self, anchors, logits, labels, deltas, boxes):
        every = Boxes.cat(anchors).tensor
        samples = [(every[x >= 0], torch.where(x == 1, 0, CLASSES)[x >= 0]) for x in labels]
        by_head.append(("rpn", samples))
        return rpn_losses(self, anchors, logits, labels, deltas, boxes)

    def of_head(self, predictions, proposals):
        by_head.append(("head", [(p.proposal_boxes.tensor, p.gt_classes) for p in proposals]))
        return head_losses(self, predictions, proposals)

    monkeypatch.setattr(BalancedRPN, "losses", of_rpn)
    monkeypatch.setattr(BalancedFastRCNNOutputLayers, "losses", of_head)
    return by_head


def background_inside(seen, inputs):
    """Background samples inside regions, of each head in the order in which they ran."""
    return [
        sum(
            inside(boxes[labels == CLASSES], record)
            for (boxes, labels), record in zip(samples, inputs, strict=True)
        )
        for _, samples in seen
    ]


def losses(model, inputs):
    torch.manual_seed(1)
    with EventStorage():
        return model.train()(inputs)


def random_boxes(count, generator, side=24.0):
    corner = torch.rand(count, 2, generator=generator) * 40
    return Boxes(
        torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * side + 4], dim=1)
    )


def chosen_samples(model, anchors, objects, boxes, regions, stage):
    """(boxes, labels) that RPN, RoI heads and a later cascade stage take from one image."""
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn._regions = heads._regions = regions
    (labels,), _ = rpn.label_and_sample_anchors([anchors], [objects])
    used = labels >= 0
    samples = [(anchors.tensor[used], torch.where(labels == 1, 0, CLASSES)[used])]
    proposals = Instances(
        (SIZE, SIZE), proposal_boxes=boxes, objectness_logits=torch.zeros(len(boxes))
    )
    chosen = heads.label_and_sample_proposals([proposals], [objects])
    refined = Instances((SIZE, SIZE), proposal_boxes=boxes)
    chosen += heads._match_and_label_boxes([refined], stage, [objects])
    return samples + [(p.proposal_boxes.tensor, p.gt_classes) for p in chosen]


def positives(samples):
    return [{*map(tuple, boxes[labels < CLASSES].tolist())} for boxes, labels in samples]


def test_a_thousand_images_keep_positives_and_lose_background_in_regions():
    """Sampling takes all positives here: fewer than half of the samples match an object."""
    model = build_model(small_cfg("cascade", *RPN)).train()
    maps = [torch.zeros(1, 1, -(-SIZE // s), -(-SIZE // s)) for s in (4, 8, 16, 32, 64)]
    anchors = Boxes.cat(model.proposal_generator.anchor_generator(maps))
    model.roi_heads.batch_size_per_image = 256
    generator = torch.Generator().manual_seed(0)
    left, without = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    with EventStorage():
        for number in range(1000):
            count = 0 if number % 10 == 0 else 2
            objects = Instances((SIZE, SIZE), gt_boxes=random_boxes(count, generator))
            objects.gt_classes = torch.randint(CLASSES, (count,), generator=generator)
            number_objects([objects])
            regions = random_boxes(2, generator, 20.0).tensor
            record = {"ignore_boxes": regions}
            boxes, stage = random_boxes(60, generator), 1 + number % 2
            samples = chosen_samples(model, anchors, objects, boxes, [regions], stage)
            left += torch.tensor([inside(b[y == CLASSES], record) for b, y in samples])
            free = chosen_samples(model, anchors, objects, boxes, None, stage)
            without += torch.tensor([inside(b[y == CLASSES], record) for b, y in free])
            assert positives(samples) == positives(free)
    assert left.tolist() == [0, 0, 0]
    assert without.min() > 1000  # they would be there in every head


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("MODEL.BALANCE.PROPOSAL_SAMPLER", "OHEM"),
        ("MODEL.BALANCE.PROPOSAL_SAMPLER", "ISRN"),
        ("MODEL.BALANCE.PROPOSAL_SAMPLER", "IoUBalanced"),
        ("MODEL.BALANCE.SAMPLING_FREE", True, "MODEL.BALANCE.RPN.SAMPLING_FREE", True),
    ],
)
@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_every_way_of_choosing_proposals_leaves_regions_alone(seen, kind, keys):
    model = build_model(small_cfg(kind, *RPN, *keys))
    inputs = with_regions(make_inputs(6, 2, SIZE, empty=(1,)))
    result = losses(model, inputs)
    assert background_inside(seen, inputs) == [0] * len(seen)
    assert all(loss.isfinite() for loss in result.values())
    sum(result.values()).backward()


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_positives_are_those_without_regions(seen, kind):
    """Without sampling all anchors are seen; later stages refine what the first one keeps."""
    off = ("MODEL.BALANCE.SAMPLING_FREE", True, "MODEL.BALANCE.RPN.SAMPLING_FREE", True)
    model = build_model(small_cfg(kind, *RPN, *off))
    inputs = with_regions(make_inputs(6, 3, SIZE))
    for record in inputs:  # the regions hold the objects too
        whole = torch.cat([record["instances"].gt_boxes.tensor, torch.zeros(1, 4) + 30])
        record["ignore_boxes"] = whole
    losses(model, inputs)
    covered_samples = [seen[0], seen[1]]
    bare = [{k: v for k, v in x.items() if k != "ignore_boxes"} for x in inputs]
    seen.clear()
    losses(model, bare)
    removed = 0
    for (_, samples), (_, free) in zip(covered_samples, seen[:2], strict=True):
        for (boxes, labels), (all_boxes, all_labels) in zip(samples, free, strict=True):
            positive, all_positive = labels < CLASSES, all_labels < CLASSES
            assert torch.equal(boxes[positive], all_boxes[all_positive])
            assert torch.equal(labels[positive], all_labels[all_positive])
            assert positive.any()
            removed += len(all_labels) - len(labels)
    assert removed > 0


def test_later_stages_keep_the_positives_and_lose_covered_background():
    model = build_model(small_cfg("cascade", *RPN)).train()
    heads = model.roi_heads
    objects = Instances(
        (SIZE, SIZE),
        gt_boxes=Boxes(torch.tensor([[10.0, 10, 30, 30]])),
        gt_classes=torch.tensor([2]),
    )
    objects.gt_index = torch.arange(1)
    boxes = torch.tensor([[10.0, 10, 30, 30], [0, 0, 12, 12], [40, 40, 60, 60]])
    heads._regions = [torch.tensor([[0.0, 0, 32, 32]])]
    for stage in (1, 2):
        proposals = [Instances((SIZE, SIZE), proposal_boxes=Boxes(boxes))]
        with EventStorage():
            (labelled,) = heads._match_and_label_boxes(proposals, stage, [objects])
        assert labelled.proposal_boxes.tensor.tolist() == boxes[[0, 2]].tolist()
        assert labelled.gt_classes.tolist() == [2, CLASSES]
        assert labelled.gt_index[0] == 0


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_heads_drop_covered_background_only(kind):
    model = build_model(small_cfg(kind)).train()
    inputs = with_regions(make_inputs(4, 2, SIZE, empty=(1,)))
    images = model.preprocess_image(inputs)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        anchors = model.anchor_generator([features[f] for f in model.head_in_features])
    objects = [record["instances"] for record in inputs]
    free, _, _ = model.match_anchors(anchors, objects)
    labels, _, _ = model.match_anchors(anchors, objects, images.ignore_boxes)
    every, dropped = Boxes.cat(anchors).tensor, 0
    for own, before, record in zip(labels, free, inputs, strict=True):
        changed = own != before
        assert (before[changed] == CLASSES).all() and (own[changed] == -1).all()
        assert inside(every[changed], record, ioa=0.5 - 2e-5) == changed.sum()
        assert inside(every[own == CLASSES], record) == 0
        dropped += int(changed.sum())
    assert dropped > 0
    reduced = losses(model, inputs)
    assert all(loss.isfinite() for loss in reduced.values())
    bare = [{k: v for k, v in x.items() if k != "ignore_boxes"} for x in inputs]
    without = losses(build_again(model, kind), bare)
    cls, box = (
        ("loss_fcos_cls", "loss_fcos_loc") if kind == "fcos" else ("loss_cls", "loss_box_reg")
    )
    assert reduced[cls] < without[cls]
    assert torch.equal(reduced[box], without[box])
    if kind == "fcos":
        assert torch.equal(reduced["loss_fcos_ctr"], without["loss_fcos_ctr"])


def build_again(model, kind):
    """The same weights with the state of the start, as a loss may have changed it."""
    fresh = build_model(small_cfg(kind))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(parameters[name])
    return fresh


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "mask", "cascade"])
def test_images_without_regions_train_as_ever(kind):
    model = build_model(small_cfg(kind, *(RPN if kind in ("mask", "cascade") else ())))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = losses(model, make_inputs())
    model.load_state_dict(state)
    empty = make_inputs()
    for record in empty:
        record["ignore_boxes"] = torch.zeros(0, 4)
    result = losses(model, empty)
    assert result.keys() == plain.keys()
    assert all(torch.equal(result[key], plain[key]) for key in plain)


def test_a_image_that_is_one_region_and_has_no_object_trains_nothing(seen):
    model = build_model(small_cfg("cascade", *RPN))
    inputs = make_inputs(1, empty=(0,))
    inputs[0]["ignore_boxes"] = [[-200.0, -200, 300, 300]]
    result = losses(model, inputs)
    assert sum(len(labels) for _, samples in seen for _, labels in samples) == 0
    assert all(loss == 0 for loss in result.values())
    sum(result.values()).backward()


def test_threshold_is_the_share_of_the_box_that_one_region_holds():
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [20, 0, 30, 10], [5, 5, 5, 9]]))
    regions = torch.tensor([[0.0, 0, 5, 10], [5, 0, 10, 10]])
    # halves of the first box: 0.5; quarters of the second; the union does not count
    assert covered(boxes, regions, 0.5).tolist() == [True, False, False, False]
    assert covered(boxes, regions, 0.51).tolist() == [False] * 4
    assert covered(boxes, regions, 0.25).tolist() == [True, True, False, False]


def test_regions_ride_on_no_batch_without_any():
    assert regions_of([{}, {"ignore_boxes": []}], "cpu") is None
    regions = regions_of([{}, {"ignore_boxes": [[1, 2, 3, 4]]}], "cpu")
    assert [x.tolist() for x in regions] == [[], [[1, 2, 3, 4]]]
    assert regions[0].shape == (0, 4) and regions[1].dtype == torch.float32


def test_proposals_of_an_image_without_objects_are_all_background():
    proposals = Instances((SIZE, SIZE), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 8, 8]] * 2)))
    nothing = Instances(
        (SIZE, SIZE), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
    )
    matcher = Matcher([0.5], [0, 1])
    region = torch.tensor([[0.0, 0, 8, 8]])
    (kept,) = without_covered_background([proposals], [nothing], [region], matcher, 0.5)
    assert len(kept) == 0
    assert len(without_covered_background([proposals], [nothing], None, matcher, 0.5)[0]) == 2


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "mask"])
def test_threshold_out_of_range_is_refused(kind):
    keys = RPN if kind == "mask" else ()
    with pytest.raises(ValueError, match="MODEL.BALANCE.IGNORE_IOA is 0.0; must be"):
        build_model(small_cfg(kind, *keys, "MODEL.BALANCE.IGNORE_IOA", 0.0))
