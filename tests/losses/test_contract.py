"""What every registered loss must do; a new loss is checked here without a line of its own."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg

from d2_balance.config import add_balance_config, argument_help
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, Samples
from d2_balance.modeling.build import DATA_ARGUMENTS, NUM_CLASSES, argument_key

K = 7
FREQUENCY = [0.5, 0.2, 0.1, 0.05, 0.001, 0.0005, 0.0]
DATA = {
    "class_frequency": FREQUENCY,
    "class_count": [1000 * f for f in FREQUENCY],
    "instance_count": [3000 * f for f in FREQUENCY],
}
CLS = sorted(name for name, _ in CLS_LOSSES)
BOX = sorted(name for name, _ in BOX_LOSSES)


class Deltas:
    """Box transform of unit weights, enough for losses that decode."""

    weights = (1.0, 1.0, 1.0, 1.0)

    def __init__(self):
        from detectron2.modeling.box_regression import Box2BoxTransform

        self.coder = Box2BoxTransform(weights=self.weights)

    def get_deltas(self, boxes, gt_boxes):
        return self.coder.get_deltas(boxes, gt_boxes)

    def apply_deltas(self, deltas, boxes):
        return self.coder.apply_deltas(deltas, boxes)


def build(registry, name, num_classes=K):
    """A loss with its defaults and, where it needs them, class counts."""
    cls = registry.get(name)
    parameters = inspect.signature(cls).parameters.values()
    data = {name: values[:num_classes] for name, values in DATA.items()}
    data[NUM_CLASSES] = num_classes
    return cls(**{p.name: data[p.name] for p in parameters if p.default is p.empty})


def make(loss, rows=60, positives=9, scale=2.0, dtype=torch.float32, seed=0, num_classes=K):
    """Samples of two images; labels of the first `positives` rows are foreground."""
    generator = torch.Generator().manual_seed(seed)
    columns = loss.num_outputs(num_classes)
    logits = torch.randn(rows, columns, generator=generator) * scale
    labels = torch.full((rows,), num_classes)
    labels[:positives] = torch.randint(0, num_classes, (positives,), generator=generator)
    order = torch.randperm(rows, generator=generator)
    labels = labels[order]
    verified = torch.rand(2, num_classes, generator=generator) > 0.7
    boxes = torch.rand(positives, 4, generator=generator) * 40
    boxes[:, 2:] += boxes[:, :2] + 8
    return Samples(
        logits=logits.to(dtype).requires_grad_(),
        labels=labels,
        num_classes=num_classes,
        image_index=torch.arange(rows) * 2 // max(rows, 1),
        num_images=2,
        verified=verified,
        not_exhaustive=verified & (torch.arange(num_classes) % 2 == 0),
        pred_deltas=(torch.randn(positives, 4, generator=generator) * 0.1).to(dtype),
        boxes=boxes,
        gt_boxes=boxes + torch.randn(positives, 4, generator=generator),
        gt_index=torch.arange(positives) // 2,
        box_transform=Deltas(),
    )


def gradient(loss, samples):
    value = loss(samples).sum()
    assert value.requires_grad, "the loss has lost its graph"
    (grad,) = torch.autograd.grad(value, samples.logits)
    return value.detach(), grad


@pytest.fixture(params=CLS)
def cls_loss(request):
    torch.manual_seed(0)
    return build(CLS_LOSSES, request.param)


@pytest.fixture(params=BOX)
def box_loss(request):
    return build(BOX_LOSSES, request.param)


def test_shape_is_as_declared(cls_loss):
    samples = make(cls_loss)
    value = cls_loss(samples)
    if cls_loss.elementwise:
        assert value.shape[0] == 60 and value.dim() in (1, 2)
    else:
        assert value.dim() == 0
    assert cls_loss.activation in ("sigmoid", "softmax", "gumbel")


def test_logits_and_labels_alone_are_enough(cls_loss):
    full = make(cls_loss)
    samples = Samples(logits=full.logits, labels=full.labels, num_classes=K)
    value, grad = gradient(cls_loss, samples)
    assert value.isfinite() and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("extreme", [100.0, -100.0, 1000.0])
def test_finite_at_extreme_logits(cls_loss, extreme):
    samples = make(cls_loss)
    with torch.no_grad():
        samples.logits.fill_(extreme)
        samples.logits[::2] *= -1
    value, grad = gradient(cls_loss, samples)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(("rows", "positives"), [(0, 0), (30, 0), (12, 12)])
def test_empty_batches_keep_value_finite_and_graph_alive(cls_loss, rows, positives):
    samples = make(cls_loss, rows=rows, positives=positives)
    value, grad = gradient(cls_loss, samples)
    assert value.isfinite() and grad.isfinite().all()
    if rows == 0:
        assert value == 0


def test_one_class(cls_loss):
    loss = build(CLS_LOSSES, cls_loss.name, num_classes=1)
    value, grad = gradient(loss, make(loss, num_classes=1))
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(cls_loss, dtype):
    samples = make(cls_loss, dtype=dtype)
    other = copy.deepcopy(cls_loss)
    torch.manual_seed(0)
    value, grad = gradient(cls_loss, samples)
    raised = make(cls_loss, dtype=dtype)
    raised = Samples(
        **{**raised.__dict__, "logits": raised.logits.detach().float().requires_grad_()}
    )
    torch.manual_seed(0)
    full, full_grad = gradient(other, raised)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, full)
    torch.testing.assert_close(grad.float(), full_grad, rtol=1e-2, atol=1e-6)


def test_inputs_are_not_modified(cls_loss):
    samples = make(cls_loss)
    before = {k: v.clone() for k, v in vars(samples).items() if isinstance(v, torch.Tensor)}
    gradient(cls_loss, samples)
    for name, value in before.items():
        assert torch.equal(getattr(samples, name), value), name


def test_evaluation_leaves_buffers_alone(cls_loss):
    gradient(cls_loss, make(cls_loss))
    before = copy.deepcopy(cls_loss.state_dict())
    cls_loss.eval()
    value, grad = gradient(cls_loss, make(cls_loss, seed=1))
    assert value.isfinite() and grad.isfinite().all()
    for name, tensor in cls_loss.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_state_dict_round_trip_continues_equally(cls_loss):
    for seed in range(3):
        gradient(cls_loss, make(cls_loss, seed=seed))
    other = build(CLS_LOSSES, cls_loss.name)
    other.load_state_dict(cls_loss.state_dict())
    torch.manual_seed(5)
    first = gradient(cls_loss, make(cls_loss, seed=9))
    torch.manual_seed(5)
    second = gradient(other, make(other, seed=9))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_probabilities_have_k_plus_one_columns(cls_loss):
    samples = make(cls_loss)
    probs = cls_loss.probabilities(samples.logits)
    assert probs.shape == (60, K + 1)
    assert ((probs >= 0) & (probs <= 1)).all()


def test_statistics_for_logging_are_tensors(cls_loss):
    gradient(cls_loss, make(cls_loss))
    assert all(isinstance(value, torch.Tensor) for value in cls_loss.log_values().values())


@pytest.mark.parametrize("registry", [CLS_LOSSES, BOX_LOSSES], ids=["cls", "box"])
def test_constructors_are_keyword_only_documented_and_configurable(registry):
    cfg = get_cfg()
    add_balance_config(cfg)
    for name, cls in registry:
        texts = argument_help(cls)
        for parameter in inspect.signature(cls).parameters.values():
            assert parameter.kind == parameter.KEYWORD_ONLY, f"{name}: {parameter.name}"
            assert texts.get(parameter.name), f"{name}: {parameter.name} has no docstring"
            if parameter.default is parameter.empty:
                assert parameter.name in {*DATA_ARGUMENTS, NUM_CLASSES}, f"{name}: {parameter.name}"
            else:
                node = cfg.MODEL.BALANCE[name.upper()]
                assert node[argument_key(parameter.name)] == parameter.default


def boxes_for(loss, count, dtype=torch.float32):
    """Predictions and targets in the space of the loss."""
    generator = torch.Generator().manual_seed(count)
    pred = torch.randn(count, 4, generator=generator) * 0.3
    target = torch.randn(count, 4, generator=generator) * 0.3
    if loss.space == "boxes":
        pred, target = pred + torch.tensor([0, 0, 5.0, 5.0]), target + torch.tensor([0, 0, 5.0, 5])
    return pred.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("count", [0, 1, 40])
def test_box_loss_is_finite_and_has_a_gradient(box_loss, count):
    pred, target = boxes_for(box_loss, count)
    value = box_loss(pred, target)
    if box_loss.elementwise:
        assert value.shape[0] == count and value.dim() in (1, 2)
    else:
        assert value.dim() == 0
    (grad,) = torch.autograd.grad(value.sum(), pred)
    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_box_loss_raises_half_precision(box_loss, dtype):
    pred, target = boxes_for(box_loss, 20, dtype)
    value = box_loss(pred, target)
    assert value.dtype == torch.float32 and value.isfinite().all()


def test_box_loss_is_smallest_at_the_target(box_loss):
    _, target = boxes_for(box_loss, 20)
    exact = box_loss(target.clone().requires_grad_(), target).sum()
    off = box_loss((target + 0.3).requires_grad_(), target).sum()
    assert exact.abs() < 1e-5 < off


def test_box_loss_state_dict_round_trip(box_loss):
    for count in (10, 20):
        box_loss(*boxes_for(box_loss, count))
    other = build(BOX_LOSSES, box_loss.name)
    other.load_state_dict(box_loss.state_dict())
    pred, target = boxes_for(box_loss, 30)
    assert torch.equal(box_loss(pred, target), other(pred, target))


def test_box_loss_evaluation_leaves_buffers_alone(box_loss):
    box_loss(*boxes_for(box_loss, 10))
    before = copy.deepcopy(box_loss.state_dict())
    box_loss.eval()
    assert box_loss(*boxes_for(box_loss, 30)).isfinite().all()
    for name, tensor in box_loss.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode_gives_the_value_and_leaves_the_state_alone(cls_loss, training):
    gradient(cls_loss, make(cls_loss))
    before = copy.deepcopy(cls_loss.state_dict())
    torch.manual_seed(1)
    expected = cls_loss.compute(make(cls_loss, seed=2)).detach()
    cls_loss.train(training)
    torch.manual_seed(1)
    with torch.inference_mode():
        value = cls_loss(make(cls_loss, seed=2))
    torch.testing.assert_close(value, expected)
    for name, tensor in cls_loss.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_without_gradient_the_value_is_the_same(cls_loss):
    samples, other = make(cls_loss), copy.deepcopy(cls_loss)
    torch.manual_seed(1)
    expected = cls_loss(samples)
    torch.manual_seed(1)
    with torch.no_grad():
        value = other(samples)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_a_second_derivative_is_right_or_refused(cls_loss):
    """Never a gradient that has silently lost its graph."""
    samples = make(cls_loss, dtype=torch.float64)
    value, message = cls_loss(samples).sum(), ""
    try:
        (grad,) = torch.autograd.grad(value, samples.logits, create_graph=True)
    except RuntimeError as error:
        message = str(error)
    if message:
        assert "create_graph=True" in message
        return
    (second,) = torch.autograd.grad(grad.square().sum(), samples.logits)
    assert second.isfinite().all() and second.abs().sum() > 0


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_out_of_range_are_refused(shift):
    labels = torch.tensor([0, K])
    labels[0 if shift < 0 else 1] += shift
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {K}\]"):
        Samples(logits=torch.zeros(2, K), labels=labels, num_classes=K)


def test_state_belongs_to_buffers_only(cls_loss):
    """Nothing of a batch stays on the module between statistics and loss."""
    names = set(vars(cls_loss))
    values = {n: v for n, v in vars(cls_loss).items() if not n.startswith("_") or n == "_sizes"}
    cls_loss.batch_statistics(make(cls_loss))
    gradient(cls_loss, make(cls_loss))
    assert set(vars(cls_loss)) == names
    assert all(vars(cls_loss)[n] is v for n, v in values.items())


def test_plain_classification_needs_no_samples(cls_loss):
    """Logits with the columns of a head, and labels, give what Samples give."""
    full, other = make(cls_loss), copy.deepcopy(cls_loss)
    logits, labels = full.logits.detach(), full.labels
    torch.manual_seed(0)
    expected = cls_loss(Samples(logits=logits, labels=labels, num_classes=K))
    if cls_loss.activation == "softmax" and cls_loss.num_classes is None:
        labels = labels.clamp(max=K)  # K + 1 classes and no background
    torch.manual_seed(0)
    torch.testing.assert_close(other(logits, labels), expected)


@pytest.mark.parametrize("name", [n for n in CLS if CLS_LOSSES.get(n).activation == "softmax"])
def test_a_softmax_without_background_takes_k_columns(name):
    loss = build(CLS_LOSSES, name)
    if K not in loss.column_counts(K):
        pytest.skip("its classifier has columns of its own")
    logits, labels = torch.randn(20, K, requires_grad=True), torch.arange(20) % K
    (grad,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["EQL", "Seesaw", "EQLv2", "BAGS"])
def test_columns_that_do_not_fit_the_classes_are_refused(name):
    loss = build(CLS_LOSSES, name)
    with pytest.raises(ValueError, match=rf"{name}: logits of {K} classes must have .* columns"):
        loss(torch.zeros(2, K + 9), torch.tensor([0, 1]))


def test_logits_without_labels_are_refused():
    with pytest.raises(ValueError, match="Focal: must be called with Samples, or with logits"):
        CLS_LOSSES.get("Focal")()(torch.zeros(2, K))


def test_importing_a_loss_loads_neither_detectron2_nor_torchvision():
    code = "import sys; from d2_balance.losses import FocalLoss; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "d2_balance.losses" in modules
    assert not {"detectron2", "torchvision"} & {name.split(".")[0] for name in modules}
