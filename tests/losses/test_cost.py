"""What a training step of a loss may cost: no wait of the host, few tensors of the logits' size."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from benchmarks.measuring import peak_memory, waits
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, Samples
from d2_balance.modeling.compatibility import has_class_columns_only
from d2_balance.modeling.criterion import PositiveEMA, detection_losses
from d2_balance.reweight import CARL, ISR

from .test_contract import BOX, CLS, build, make

SOFTMAX = [name for name in CLS if CLS_LOSSES.get(name).activation == "softmax"]
DENSE = [name for name in CLS if has_class_columns_only(CLS_LOSSES.get(name))]


def training_step(cls_name, box_name, reweighters=(), device="cpu"):
    torch.manual_seed(0)
    cls_loss, box_loss = build(CLS_LOSSES, cls_name), build(BOX_LOSSES, box_name)
    normalizer = PositiveEMA()
    batch = make(cls_loss)
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            fields[name] = value.detach().to(device)
    for module in (cls_loss, box_loss, normalizer):
        module.to(device)
    fields["logits"].requires_grad_()
    deltas = fields["pred_deltas"].requires_grad_()
    targets = Samples(**fields).target_deltas

    def step():
        samples = Samples(**fields)
        # Detectron2's own `get_deltas` waits once for a check, with every loss and with none
        samples.__dict__["target_deltas"] = targets
        losses = detection_losses(samples, cls_loss, box_loss, reweighters, normalizer)
        torch.autograd.grad(sum(losses.values()), [samples.logits, deltas])

    return step


@pytest.mark.parametrize("name", CLS)
def test_a_training_step_does_not_wait_for_the_device(name):
    assert waits(training_step(name, "GIoU")) == {}


@pytest.mark.parametrize("name", BOX)
def test_a_box_loss_does_not_wait_for_the_device(name):
    assert waits(training_step("Focal", name)) == {}


def test_weights_of_prime_samples_do_not_wait_for_the_device():
    assert waits(training_step("SigmoidCE", "SmoothL1", [ISR(), CARL()])) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CLS)
def test_a_training_step_does_not_wait_for_a_gpu(name):
    # what the names of `WAITS` do not show, such as bincount, raises here
    step = training_step(name, "GIoU", [ISR(), CARL()], device="cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_wait_is_counted():
    step = training_step("Focal", "SmoothL1")

    def waiting():
        step()
        float(torch.ones(()).sum())

    assert waits(waiting)["aten::item"] == 1
    assert waits(lambda: torch.ones(3).nonzero()) == {"aten::nonzero": 1}


@pytest.mark.parametrize("name", DENSE)
def test_peak_memory_in_tensors_of_the_logits(name):
    rows, classes = 100_000, 20  # many chunks, as in a dense head
    loss = build(CLS_LOSSES, name, num_classes=7)
    if name in ("EFL", "SeesawFocal"):
        loss = CLS_LOSSES.get(name)(num_classes=classes)
    elif name in ("EQL", "DropLoss"):
        loss = CLS_LOSSES.get(name)(class_frequency=[0.5] * 10 + [0.0001] * 10)
    elif name == "Federated":
        loss = CLS_LOSSES.get(name)(class_count=range(1, 21))
    logits = (torch.randn(rows, classes) - 3).requires_grad_()
    labels = torch.where(torch.rand(rows) < 0.01, 3, classes)

    def step():
        value = loss(Samples(logits=logits, labels=labels, num_classes=classes)).sum()
        torch.autograd.grad(value, logits)

    def plain():
        target = torch.zeros_like(logits)
        value = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        torch.autograd.grad(value, logits)

    assert peak_memory(step) < peak_memory(plain) + 3 * logits.numel() * 4
    if name in ("SigmoidCE", "BalancedCE", "Focal", "EQL", "EFL", "QFL", "VFL", "GHMC", "DR"):
        assert peak_memory(step) < 3 * logits.numel() * 4


@pytest.mark.parametrize("name", SOFTMAX)
def test_peak_memory_of_softmax_losses_in_tensors_of_the_logits(name):
    rows, classes = 4_000, 100
    data = {
        "class_frequency": [0.5] * 50 + [0.0001] * 50,
        "class_count": range(1, 101),
        "instance_count": [5 * count for count in range(100)],
        "num_classes": classes,
    }
    cls = CLS_LOSSES.get(name)
    wanted = inspect.signature(cls).parameters.values()
    loss = cls(**{p.name: data[p.name] for p in wanted if p.default is p.empty})
    logits = torch.randn(rows, loss.num_outputs(classes), requires_grad=True)
    labels = torch.where(torch.rand(rows) < 0.25, torch.randint(0, classes, (rows,)), classes)

    def step():
        value = loss(Samples(logits=logits, labels=labels, num_classes=classes)).sum()
        torch.autograd.grad(value, logits)

    def plain():
        torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)

    assert peak_memory(step) < peak_memory(plain) + 2 * logits.numel() * 4
