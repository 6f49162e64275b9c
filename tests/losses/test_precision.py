"""Every registered loss in mixed precision: float32 inside, whatever comes in."""

import dataclasses

import pytest
import torch

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.criterion import PositiveEMA, SampleNormalizer, detection_losses

from .test_contract import BOX, CLS, build, make

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)
DTYPES = [torch.bfloat16, torch.float16]


def on(samples, device):
    moved = {
        name: value.detach().to(device)
        for name, value in vars(samples).items()
        if isinstance(value, torch.Tensor) and name in samples.__dataclass_fields__
    }
    return dataclasses.replace(samples, **moved)


def losses_and_gradients(samples, cls_loss, box_loss, dtype):
    """Of a head in autocast; `dtype` None: without."""
    leaves = {
        name: getattr(samples, name).detach().requires_grad_() for name in ("logits", "pred_deltas")
    }
    torch.manual_seed(3)
    device = samples.logits.device
    normalizer = (PositiveEMA if cls_loss.activation == "sigmoid" else SampleNormalizer)().to(
        device
    )
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        losses = detection_losses(
            dataclasses.replace(samples, **leaves), cls_loss, box_loss, [], normalizer
        )
    gradients = torch.autograd.grad(sum(losses.values()), list(leaves.values()))
    return losses, gradients


def compared(cls_name, box_name, dtype, device, logits=None):
    """Losses and gradients from half precision, and from the same numbers in float32."""
    results = []
    for half in (True, False):
        torch.manual_seed(0)
        cls_loss = build(CLS_LOSSES, cls_name).to(device)
        box_loss = build(BOX_LOSSES, box_name).to(device)
        samples = on(make(cls_loss, dtype=dtype), device)
        if logits is not None:
            samples.logits.fill_(logits)
            samples.logits[::2] *= -1
        if not half:
            samples = samples.upcast()
        found = losses_and_gradients(samples, cls_loss, box_loss, dtype if half else None)
        results.append(found)
    return results


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("logits", [None, 100.0, -100.0])
@pytest.mark.parametrize("name", CLS)
def test_classification_losses_are_finite_and_agree_with_float32(name, dtype, device, logits):
    (half, gradients), (full, expected) = compared(name, "SmoothL1", dtype, device, logits)
    for key, value in half.items():
        assert value.dtype == torch.float32 and value.isfinite(), key
        torch.testing.assert_close(value, full[key])
    info = torch.finfo(dtype)
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.dtype == dtype and found.isfinite().all()
        # one rounding to the type: half a unit in the last place, or half the smallest number
        least = info.smallest_normal * info.eps
        torch.testing.assert_close(found.float(), wanted, rtol=info.eps, atol=least)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", BOX)
def test_box_losses_are_finite_and_agree_with_float32(name, dtype, device):
    (half, gradients), (full, expected) = compared("SigmoidCE", name, dtype, device)
    box = half["loss_box_reg"]
    assert box.dtype == torch.float32 and box.isfinite() and box > 0
    torch.testing.assert_close(box, full["loss_box_reg"])
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    torch.testing.assert_close(gradients[1].float(), expected[1], rtol=info.eps, atol=least)
