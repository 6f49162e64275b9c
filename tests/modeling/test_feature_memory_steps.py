"""LOCE's feature memory in a model: what its samples do in a training step, and what they leave."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_balance.engine.setup.validate import validate
from d2_balance.modeling.criterion import watched

from ..conftest import CLASSES, make_inputs, small_cfg

LOCE = ["MODEL.BALANCE.CLS_LOSS", "LOCE"]
NODE = "MODEL.BALANCE.LOCE_MEMORY."
MEMORY = [*LOCE, NODE + "ENABLED", True, NODE + "CAPACITY", 30, NODE + "CLASSES_PER_STEP", 3]
ADDED = 3 * 4  # memory samples of a step


def train_step(model, inputs):
    with EventStorage():
        return model(inputs)


def layers_of(model):
    return model.roi_heads._output_layers()


def watch(model, inputs):
    """The Samples of every RoI head in a training step, and the losses."""
    seen = []
    with watched(model, lambda samples, boxes, cls, box: seen.append((samples, boxes, cls, box))):
        losses = train_step(model, inputs)
    return seen, losses


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_step_fills_the_memory_and_later_steps_draw_from_it(kind):
    model = build_model(small_cfg(kind, *MEMORY)).train()
    first, _ = watch(model, make_inputs())
    counts = [layer.memory.count.clone() for layer in layers_of(model)]
    for (samples, *_), count in zip(first, counts, strict=True):
        real = len(samples.labels) - ADDED
        assert (samples.sample_weight[real:] == 0).all()  # nothing to sample yet
        own = torch.bincount(samples.labels[:real], minlength=CLASSES + 1)[:CLASSES]
        assert own.sum() > 0 and torch.equal(count, own.clamp(max=5))
    again, losses = watch(model, make_inputs(seed=1))
    for layer, (samples, _, cls, box) in zip(layers_of(model), again, strict=True):
        real = len(samples.labels) - ADDED
        assert cls.shape == (real + ADDED,)
        assert samples.sample_weight[real:].sum() >= 4
        held = {c for count in counts for c in count.nonzero().flatten().tolist()}
        used = samples.sample_weight[real:] > 0
        assert set(samples.labels[real:][used].tolist()) <= held
        assert (box[-ADDED:] == 0).all()
        ids = samples.gt_index
        assert (ids[-ADDED:] < 0).all() and len(ids[-ADDED:].unique()) == ADDED
        assert (ids[:-ADDED] >= 0).all()
        # samples of empty queues do not count
        assert layer.normalizer.samples == real + used.sum()
        assert layer.memory.batch is None
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_memory_samples_train_box_head_and_classifier_and_no_box(kind):
    model = build_model(small_cfg(kind, *MEMORY)).train()
    train_step(model, make_inputs())
    train_step(model, make_inputs(seed=1))
    heads = model.roi_heads
    gradients = {}
    # images without objects: all positives are memory samples
    with watched(model, lambda samples, boxes, cls, box: gradients.setdefault(len(gradients), cls)):
        train_step(model, make_inputs(seed=2, empty=(0, 1)))
    for stage, scores in gradients.items():
        head, layer = heads.head_modules(stage)
        parameters = [*head.parameters(), layer.cls_score.weight]
        grads = torch.autograd.grad(scores[-ADDED:].sum(), parameters, retain_graph=True)
        assert all(grad.abs().sum() > 0 for grad in grads)
        trunk = torch.autograd.grad(
            scores[-ADDED:].sum(),
            [p for p in model.backbone.parameters() if p.requires_grad],
            retain_graph=True,
            allow_unused=True,
        )
        assert all(grad is None or grad.abs().sum() == 0 for grad in trunk)  # features are detached
        boxes = torch.autograd.grad(
            scores[-ADDED:].sum(), layer.bbox_pred.weight, retain_graph=True, allow_unused=True
        )
        assert boxes[0] is None


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_box_losses_and_mean_scores_do_not_see_memory_samples(kind, monkeypatch):
    """The same step with and without memory samples, which a patch keeps out."""

    def losses_and_scores(samples):
        torch.manual_seed(0)
        model = build_model(small_cfg(kind, *MEMORY)).train()
        train_step(model, make_inputs())
        if not samples:
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
    assert shapes == [20, 20, 20]  # POST_NMS_TOPK_TEST proposals, and no memory sample
    plain = build_model(small_cfg("cascade", *LOCE)).eval()
    plain.load_state_dict({key: value for key, value in before.items() if ".memory." not in key})
    with torch.no_grad():
        second = plain(make_inputs(1))
    assert torch.equal(first[0]["instances"].scores, second[0]["instances"].scores)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_mining_passes_sample_nothing(kind):
    keys = ["MODEL.BALANCE.PROPOSAL_SAMPLER", "OHEM", "MODEL.BALANCE.OHEM.ROIS_PER_IMAGE", 16]
    model = build_model(small_cfg(kind, *MEMORY, *keys)).train()
    for seed in range(4):  # untrained boxes: not every batch has positives among the hardest
        seen, losses = watch(model, make_inputs(seed=seed))
    for samples, *_ in seen:
        assert len(samples.labels) <= 2 * 16 + ADDED
        assert samples.sample_weight[-ADDED:].sum() >= 4
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize("kind", ["faster", "cascade"])
@pytest.mark.parametrize("warm", [False, True])
def test_images_without_objects_train(kind, warm):
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


def test_masks_and_boxes_of_the_images_are_those_of_the_images():
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


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([NODE + "CAPACITY", 5], "capacity is 5; must be an integer of at least 6"),
        ([NODE + "PER_CLASS", 0], "per_class is 0; must be an integer of at least 1"),
        ([NODE + "CLASSES_PER_STEP", 0], "classes_per_step is 0; must be an integer of at least 1"),
        (
            [NODE + "FEATURES_PER_CLASS", 0],
            "features_per_class is 0; must be an integer",
        ),
        (
            ["MODEL.BALANCE.BOX_LOSS", "GHMR"],
            "BOX_LOSS GHMR counts all samples; BOX_LOSS that work",
        ),
        (["MODEL.BALANCE.REWEIGHTERS", ["ISR"]], "REWEIGHTERS ISR compares the boxes of positives"),
        (["MODEL.BALANCE.GUIDED_SCALE", 2.0], "GUIDED_SCALE compares the boxes of positives"),
        (["MODEL.BALANCE.CLS_LOSS", "Seesaw"], "CLS_LOSS is 'Seesaw'; must be LOCE"),
    ],
)
def test_what_cannot_work_is_refused(keys, expected):
    with pytest.raises(ValueError) as error:
        build_model(small_cfg("faster", *MEMORY, *keys))
    assert "MODEL.BALANCE.LOCE_MEMORY" in str(error.value)
    assert expected in str(error.value)


def test_a_memory_without_its_loss_is_refused_before_the_data_is_read():
    with pytest.raises(ValueError, match="LOCE_MEMORY.ENABLED True samples by the mean scores"):
        validate(small_cfg("faster", NODE + "ENABLED", True))
