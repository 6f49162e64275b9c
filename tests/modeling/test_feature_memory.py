"""LOCE's feature memory: queues, drawing, and what drawn rows do in a training step."""

import copy
from collections import deque

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_balance.engine import validate
from d2_balance.losses import Samples
from d2_balance.modeling.criterion import watched
from d2_balance.modeling.feature_memory import FeatureMemory, UsedRowNormalizer
from tests.conftest import CLASSES, make_inputs, small_cfg

LOCE = ["MODEL.BALANCE.CLS_LOSS", "LOCE"]
NODE = "MODEL.BALANCE.LOCE_MEMORY."
MEMORY = [*LOCE, NODE + "ENABLED", True, NODE + "CAPACITY", 30, NODE + "CLASSES_PER_STEP", 3]
DRAWN = 3 * 4  # rows a step


def memory(num_classes=3, length=4, **arguments):
    return FeatureMemory(
        num_classes=num_classes, feature_shape=(1, 1, 1), capacity=num_classes * length, **arguments
    )


def entries(queues):
    """The entries of each class, oldest first, as the numbers that were pushed."""
    found = []
    for c, (count, pointer) in enumerate(
        zip(queues.count.tolist(), queues.pointer.tolist(), strict=True)
    ):
        own = queues.features[c * queues.length : (c + 1) * queues.length].flatten().tolist()
        first = pointer if count == queues.length else 0
        found.append([own[(first + i) % queues.length] for i in range(count)])
    return found


def test_queues_equal_deques_over_many_pushes():
    queues, expected = memory(), [deque(maxlen=4) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    number = 0
    for _ in range(60):
        # up to eleven rows, of which often more than four are of one class
        labels = torch.randint(0, 3, (int(torch.randint(0, 12, (1,), generator=generator)),),
                               generator=generator).clamp(max=2)  # fmt: skip
        numbers = torch.arange(number, number + len(labels))
        number += len(labels)
        queues.push(numbers.float().view(-1, 1, 1, 1), labels)
        for value, label in zip(numbers.tolist(), labels.tolist(), strict=True):
            expected[label].append(float(value))
        assert entries(queues) == [list(queue) for queue in expected]
    assert queues.features.shape == (3 * 4 + 1, 1, 1, 1)
    assert queues.features[-1] == 0


def test_more_rows_than_a_queue_holds_leave_the_last_ones():
    queues = memory(num_classes=2, length=3)
    queues.push(torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]))
    assert entries(queues) == [[5.0, 6.0, 7.0], [3.0]]


@pytest.mark.parametrize(
    ("classes", "capacity", "per_class", "length"),
    [(1203, 4096, 80, 3), (6, 4096, 80, 80), (6, 100, 80, 16), (6, 6, 80, 1), (6, 4096, 2, 2)],
)
def test_size_is_bounded_by_capacity_and_by_class(classes, capacity, per_class, length):
    queues = FeatureMemory(
        num_classes=classes, feature_shape=(2, 1, 1), capacity=capacity, per_class=per_class
    )
    assert queues.length == length and len(queues.features) == classes * length + 1
    assert queues.features.dtype == torch.float16


def test_values_beyond_half_precision_stay_finite():
    queues = memory()
    queues.push(torch.full((1, 1, 1, 1), 1e6), torch.tensor([1]))
    assert entries(queues) == [[], [65504.0], []]


def test_an_empty_memory_draws_rows_of_weight_zero():
    features, labels, weight = memory(features_per_class=4).draw(torch.full((3,), 0.01))
    assert features.shape == (12, 1, 1, 1) and (features == 0).all()
    assert (weight == 0).all() and labels.unique().tolist() == [0, 1, 2]


def test_drawn_entries_are_those_of_their_class():
    queues = memory(num_classes=4, length=5, classes_per_step=3, features_per_class=6)
    values = torch.tensor([10.0, 11, 12, 20, 21, 30])
    queues.push(values.view(-1, 1, 1, 1), (values // 10).long())
    seen = set()
    for _ in range(50):
        features, labels, weight = queues.draw(torch.full((4,), 0.01))
        assert (weight == 1).all()
        assert sorted(labels.tolist()) == [1] * 6 + [2] * 6 + [3] * 6  # class 0 has none
        assert (features.flatten() // 10 == labels).all()
        seen |= set(features.flatten().tolist())
    assert seen == set(values.tolist())


def test_classes_are_drawn_by_one_over_their_mean_score():
    queues = memory(num_classes=3, length=1, classes_per_step=1, features_per_class=1)
    queues.push(torch.ones(3, 1, 1, 1), torch.arange(3))
    score = torch.tensor([0.1, 0.2, 0.4])  # 1 / s = 10, 5, 2.5: shares 4/7, 2/7, 1/7
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[queues.draw(score)[1]] += 1
    expected = torch.tensor([4 / 7, 2 / 7, 1 / 7])
    # standard deviation at most sqrt(.25 / 4000) = .008
    assert (counts / 4000 - expected).abs().max() < 5 * 0.008


def train_step(model, inputs):
    with EventStorage():
        return model(inputs)


def layers_of(model):
    return model.roi_heads._output_layers()


def watch(model, inputs):
    """The Samples of every RoI head in a training step, and the losses."""
    seen = []
    with watched(lambda samples, boxes, cls, box: seen.append((samples, boxes, cls, box))):
        losses = train_step(model, inputs)
    return seen, losses


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_step_fills_the_memory_and_later_steps_draw_from_it(kind):
    model = build_model(small_cfg(kind, *MEMORY)).train()
    first, _ = watch(model, make_inputs())
    counts = [layer.memory.count.clone() for layer in layers_of(model)]
    for (samples, *_), count in zip(first, counts, strict=True):
        real = len(samples.labels) - DRAWN
        assert (samples.row_weight[real:] == 0).all()  # nothing to draw yet
        own = torch.bincount(samples.labels[:real], minlength=CLASSES + 1)[:CLASSES]
        assert own.sum() > 0 and torch.equal(count, own.clamp(max=5))
    again, losses = watch(model, make_inputs(seed=1))
    for layer, (samples, _, cls, box) in zip(layers_of(model), again, strict=True):
        real = len(samples.labels) - DRAWN
        assert cls.shape == (real + DRAWN,)
        assert samples.row_weight[real:].sum() >= 4
        held = {c for count in counts for c in count.nonzero().flatten().tolist()}
        used = samples.row_weight[real:] > 0
        assert set(samples.labels[real:][used].tolist()) <= held
        assert (box[-DRAWN:] == 0).all()
        ids = samples.gt_index
        assert (ids[-DRAWN:] < 0).all() and len(ids[-DRAWN:].unique()) == DRAWN
        assert (ids[:-DRAWN] >= 0).all()
        # rows of empty queues are no rows
        assert layer.normalizer.rows == real + used.sum()
        assert layer.memory.batch is None
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_drawn_rows_train_box_head_and_classifier_and_no_box(kind):
    model = build_model(small_cfg(kind, *MEMORY)).train()
    train_step(model, make_inputs())
    train_step(model, make_inputs(seed=1))
    heads = model.roi_heads
    gradients = {}
    # pictures without objects: all positive rows are drawn ones
    with watched(lambda samples, boxes, cls, box: gradients.setdefault(len(gradients), cls)):
        train_step(model, make_inputs(seed=2, empty=(0, 1)))
    for stage, rows in gradients.items():
        head, layer = heads.head_modules(stage)
        parameters = [*head.parameters(), layer.cls_score.weight]
        found = torch.autograd.grad(rows[-DRAWN:].sum(), parameters, retain_graph=True)
        assert all(grad.abs().sum() > 0 for grad in found)
        trunk = torch.autograd.grad(
            rows[-DRAWN:].sum(),
            [p for p in model.backbone.parameters() if p.requires_grad],
            retain_graph=True,
            allow_unused=True,
        )
        assert all(grad is None or grad.abs().sum() == 0 for grad in trunk)  # features are detached
        boxes = torch.autograd.grad(
            rows[-DRAWN:].sum(), layer.bbox_pred.weight, retain_graph=True, allow_unused=True
        )
        assert boxes[0] is None


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_box_losses_and_mean_scores_do_not_see_drawn_rows(kind, monkeypatch):
    """The same step with and without drawn rows, which the memory is kept from adding."""

    def losses_and_scores(draws):
        torch.manual_seed(0)
        model = build_model(small_cfg(kind, *MEMORY)).train()
        train_step(model, make_inputs())
        if not draws:
            for layer in layers_of(model):
                layer.memory.join = lambda samples: samples
        torch.manual_seed(1)
        seen, losses = watch(model, make_inputs(seed=1))
        sums = [box.sum() for *_, box in seen]
        return sums, losses, [layer.cls_loss.mean_score for layer in layers_of(model)]

    boxes, losses, scores = losses_and_scores(True)
    plain_boxes, plain, plain_scores = losses_and_scores(False)
    torch.testing.assert_close(boxes, plain_boxes)
    torch.testing.assert_close(scores, plain_scores)
    assert all(len(s.unique()) > 1 for s in scores)
    cls = [key for key in losses if key.startswith("loss_cls")]
    assert all(losses[key] != plain[key] for key in cls)


def test_evaluation_and_passes_without_gradient_leave_the_memory_alone():
    model = build_model(small_cfg("cascade", *MEMORY)).train()
    train_step(model, make_inputs())
    before = copy.deepcopy(model.state_dict())
    shapes = []
    for head in model.roi_heads.box_head:
        head.register_forward_hook(lambda module, args, output: shapes.append(len(args[0])))
    model.eval()
    with torch.no_grad():
        first = model(make_inputs(1))
    assert shapes == [20, 20, 20]  # POST_NMS_TOPK_TEST proposals, and no drawn row
    plain = build_model(small_cfg("cascade", *LOCE)).eval()
    plain.load_state_dict({key: value for key, value in before.items() if ".memory." not in key})
    with torch.no_grad():
        second = plain(make_inputs(1))
    assert torch.equal(first[0]["instances"].scores, second[0]["instances"].scores)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_mining_passes_draw_nothing(kind):
    keys = ["MODEL.BALANCE.REWEIGHT", ["OHEM"], "MODEL.BALANCE.OHEM.ROIS_PER_IMAGE", 8]
    model = build_model(small_cfg(kind, *MEMORY, *keys)).train()
    for seed in range(2):
        seen, losses = watch(model, make_inputs(seed=seed))
    for samples, *_ in seen:
        assert len(samples.labels) <= 2 * 8 + DRAWN
        assert samples.row_weight[-DRAWN:].sum() >= 4
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize("kind", ["faster", "cascade"])
@pytest.mark.parametrize("warm", [False, True])
def test_pictures_without_objects_train(kind, warm):
    model = build_model(small_cfg(kind, *MEMORY)).train()
    if warm:
        train_step(model, make_inputs())
    before = [layer.memory.count.clone() for layer in layers_of(model)]
    total = sum(train_step(model, make_inputs(empty=(0, 1))).values())
    total.backward()
    assert total.isfinite()
    for layer, count in zip(layers_of(model), before, strict=True):
        assert torch.equal(layer.memory.count, count)
        assert layer.cls_score.weight.grad.isfinite().all()


def test_masks_and_boxes_of_the_pictures_are_those_of_the_pictures():
    keys = ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True]
    model = build_model(small_cfg("mask", *MEMORY, *keys)).train()
    for seed in range(2):
        losses = train_step(model, make_inputs(seed=seed))
    assert {"loss_mask", "loss_cls", "loss_box_reg"} <= losses.keys()
    assert all(loss.isfinite() for loss in losses.values())


def test_a_copy_of_the_model_has_a_memory_of_its_own():
    model = build_model(small_cfg("faster", *MEMORY)).train()
    train_step(model, make_inputs())
    twin = copy.deepcopy(model)
    before = model.roi_heads.box_predictor.memory.features.clone()
    train_step(twin, make_inputs(seed=1))
    assert torch.equal(model.roi_heads.box_predictor.memory.features, before)
    assert not torch.equal(twin.roi_heads.box_predictor.memory.features, before)


def test_rows_of_weight_zero_are_not_counted():
    samples = Samples(
        logits=torch.zeros(3, 2),
        labels=torch.tensor([0, 1, 1]),
        num_classes=1,
        row_weight=torch.tensor([1.0, 0.5, 0.0]),
    )
    assert UsedRowNormalizer().statistics(samples) == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([NODE + "CAPACITY", 5], "capacity=5 is not allowed; a whole number of at least 6"),
        ([NODE + "PER_CLASS", 0], "per_class=0"),
        ([NODE + "CLASSES_PER_STEP", 0], "classes_per_step=0"),
        ([NODE + "FEATURES_PER_CLASS", 0], "features_per_class=0"),
        (["MODEL.BALANCE.BOX_LOSS", "GHMR"], "BOX_LOSS GHMR counts all rows; BOX_LOSS that work"),
        (["MODEL.BALANCE.REWEIGHT", ["ISR"]], "REWEIGHT ISR compares the boxes of positives"),
        (["MODEL.BALANCE.CLS_LOSS", "Seesaw"], "CLS_LOSS is 'Seesaw'; allowed is LOCE"),
    ],
)
def test_what_cannot_work_is_refused(keys, expected):
    with pytest.raises(ValueError) as error:
        build_model(small_cfg("faster", *MEMORY, *keys))
    assert "MODEL.BALANCE.LOCE_MEMORY" in str(error.value)
    assert expected in str(error.value)


def test_a_memory_without_its_loss_is_refused_before_the_data_is_read():
    with pytest.raises(ValueError, match="LOCE_MEMORY.ENABLED True draws by the mean scores"):
        validate(small_cfg("faster", NODE + "ENABLED", True))
