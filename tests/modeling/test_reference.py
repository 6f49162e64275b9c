"""Figures of the authors' code for what calibrates, normalises and suppresses; all in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2_balance.modeling.postprocess.calibration import (
    LINKS,
    FracalSigmoid,
    LogitStatistics,
    LogN,
    Shift,
    class_shift,
    fractal_dimension,
    link_weight,
)
from d2_balance.modeling.postprocess.soft_nms import maskness, soft_nms
from d2_balance.modeling.roi_heads.cosine import CosineLinear, NormalizedConv2d
from d2_balance.modeling.roi_heads.disalign import DisAlign

REFERENCE = Path(__file__).parent.parent / "reference"
# "smooth" of FRACAL's release is too large by 2: its reference is subtracted with the wrong sign
SHIFTS = [link for link in LINKS if link != "smooth"]


def load(name):
    content = np.load(REFERENCE / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(content[key])) for key in content.files}


def assert_close(actual, expected, rtol=1e-6, atol=1e-12):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def fill(layer, figures, prefix=""):
    layer.double()
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            getattr(layer, name).data.copy_(figures[prefix + name])
    return layer


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_cosine_classifier_equals_mmdet(power):
    f = load(f"normed_linear_power{power}")
    layer = fill(CosineLinear(17, 9, temperature=20.0, power=power), f)
    x = f["x"].clone().requires_grad_()
    out = layer(x)
    assert_close(out, f["output"])
    out.backward(f["upstream"])
    assert_close(x.grad, f["grad_x"], atol=1e-10)
    assert_close(layer.weight.grad, f["grad_weight"], atol=1e-10)
    assert_close(layer.bias.grad, f["grad_bias"])


def test_cosine_classifier_without_eps_and_bias_equals_cvpods():
    f = load("cosine_linear_cvpods")
    layer = fill(CosineLinear(11, 7, temperature=20.0, eps=0.0, learned=True, bias=False), f)
    layer.temperature_root.data.fill_(20.0).sqrt_()
    x = f["x"].clone().requires_grad_()
    out = layer(x)
    assert_close(out, f["output"])
    out.backward(f["upstream"])
    assert_close(x.grad, f["grad_x"], atol=1e-10)
    assert_close(layer.weight.grad, f["grad_weight"], atol=1e-10)
    # d loss / d tau = d loss / d root / (2 root)
    root = layer.temperature_root
    assert_close(root.grad / (2 * root.detach()), f["grad_scale"].squeeze())


@pytest.mark.parametrize("form", ["1x1", "3x3", "3x3_over_kernel", "zero"])
def test_normalised_convolution_equals_mmdet(form):
    f = load("normed_conv2d")
    weight = f[f"{form}_weight"]
    layer = NormalizedConv2d(
        weight.shape[1],
        weight.shape[0],
        weight.shape[2],
        padding=weight.shape[2] // 2,
        over_kernel=form.endswith("over_kernel"),
    )
    fill(layer, f, f"{form}_")
    x = f[f"{form}_x"].clone().requires_grad_()
    out = layer(x)
    assert_close(out, f[f"{form}_output"])
    out.backward(f[f"{form}_upstream"])
    if form == "zero":  # a pixel of zeros: mmdet's gradient is tau / eps, ours 0
        zero = (x == 0).all(dim=1, keepdim=True).expand_as(x)
        assert zero.any() and (x.grad[zero] == 0).all()
        assert f["zero_grad_x"][zero].abs().max() > 1e6
        assert_close(x.grad[~zero], f["zero_grad_x"][~zero], atol=1e-10)
    else:
        assert_close(x.grad, f[f"{form}_grad_x"], atol=1e-10)
        assert_close(layer.weight.grad, f[f"{form}_grad_weight"], atol=1e-10)


def test_normalised_convolution_with_a_learned_temperature_equals_the_authors():
    f = load("normed_conv2d")
    layer = NormalizedConv2d(6, 4, 1, temperature=4.5**2, learned=True, bias=False)
    fill(layer, f, "learned_")
    assert layer.temperature_root.item() == pytest.approx(f["learned_start"].item())
    layer.temperature_root.data.copy_(f["learned_root"])
    out = layer(f["learned_x"])
    assert_close(out, f["learned_output"])
    out.backward(f["learned_upstream"])
    assert_close(layer.temperature_root.grad, f["learned_grad_root"])


@pytest.mark.parametrize("of", ["", "_obj"])
@pytest.mark.parametrize("link", LINKS)
def test_link_functions_equal_the_authors(link, of):
    f = load("frequency_weights")
    count = f["instance_freq" if of else "img_freq"].double()
    total = count.sum() if of else f["num_images"].double()
    assert_close(link_weight(count, total, link), f[link + of])
    assert_close(class_shift(count, float(total), link), f[link + of])


@pytest.mark.parametrize("of", ["", "_obj"])
@pytest.mark.parametrize("link", [*SHIFTS, "None"])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_fracal_equals_the_authors(form, link, of):
    f = load(f"fracal_{form}")
    count = f["instance_count" if of else "image_count"].double()
    total = float(count.sum() if of else f["num_images"])
    shift = torch.zeros(7) if link == "None" else class_shift(count, total, link, "average")
    key = link + (of if link != "None" else "")
    expected = f[f"weight_{key}"].squeeze(0)[:7]
    assert_close(shift, expected)
    dimension, power = f["fractal_dimension"], float(f["power"])
    if form == "softmax":
        logits = Shift(shift - power * dimension.log())(f["logits"][:, :7])
        scores = torch.cat([logits, f["logits"][:, 7:]], dim=1).softmax(dim=1)
    else:
        scores = FracalSigmoid(shift, dimension, power)(f["logits"]).sigmoid()
    assert_close(scores, f[f"scores_{key}"])


def test_fractal_dimension_equals_the_authors():
    f = load("fractal_dimension")
    dimension = fractal_dimension(
        f["x0"] + f["width"] / 2, f["y0"] + f["height"] / 2, f["class_of_object"], 12
    )
    assert_close(dimension, f["fractal_dimension"], rtol=1e-8)


@pytest.mark.parametrize("momentum", [0.0001, 0.3])
def test_logn_equals_the_authors_over_a_pass(momentum):
    f = load("logn")
    f = {key.removeprefix(f"momentum{momentum}_"): value for key, value in f.items()
         if key.startswith(f"momentum{momentum}_")}  # fmt: skip
    statistics = LogitStatistics(9, momentum)
    for batch in f["train_logits"]:
        statistics.add(batch)
    assert_close(statistics.mean, f["running_mean"])
    assert_close(statistics.variance, f["running_var"])
    layer = LogN(statistics.mean[:8], statistics.variance[:8])
    logits = torch.cat([layer(f["logits"][:, :8]), f["logits"][:, 8:]], dim=1)
    assert_close(logits, f["output"])


def test_exact_statistics_are_those_of_all_samples_at_once():
    logits = 50 + torch.randn(97, 5).double()
    statistics = LogitStatistics(5)
    for batch in logits.split(13):
        statistics.add(batch)
    statistics.add(logits[:0])
    assert_close(statistics.mean, logits.mean(0))
    assert_close(statistics.variance, logits.var(0))


@pytest.mark.parametrize("name", ["linear", "linear06", "gaussian", "hard"])
def test_soft_nms_equals_the_authors(name):
    f = load("soft_nms")
    index, scores = soft_nms(
        f["boxes"],
        f["scores"],
        torch.zeros(60, dtype=torch.int64),
        method=name.removesuffix("06"),
        iou_threshold=float(f[f"{name}_iou_threshold"]),
        sigma=float(f["sigma"]),
        min_score=float(f[f"{name}_min_score"]),
        offset=float(f["offset"]),
    )
    kept = f[f"{name}_kept"]
    assert_close(f["boxes"][index], kept[:, :4])
    assert_close(scores, kept[:, 4])


def test_classes_of_soft_nms_do_not_see_each_other():
    f = load("soft_nms")
    classes = torch.arange(60) % 3
    index, scores = soft_nms(f["boxes"], f["scores"], classes)
    expected = {}
    for k in range(3):
        own = (classes == k).nonzero().squeeze(1)
        i, s = soft_nms(f["boxes"][own], f["scores"][own], classes[own])
        expected |= dict(zip(own[i].tolist(), s.tolist(), strict=True))
    assert dict(zip(index.tolist(), scores.tolist(), strict=True)) == expected
    assert (scores.diff() <= 0).all()
    index, scores = soft_nms(f["boxes"][:0], f["scores"][:0], classes[:0])
    assert not len(index) and not len(scores)


def test_maskness_equals_the_authors():
    f = load("maskness")
    assert_close(maskness(f["masks"], f["scores"], float(f["threshold"])), f["output"])


@pytest.mark.parametrize("form", ["plain", "cosine"])
def test_disalign_equals_the_authors(form):
    f = load("disalign")
    own = {key.removeprefix(f"{form}_"): value for key, value in f.items()}
    layer = DisAlign(10, 8).double()
    layer.logit_scale.data.copy_(own["logit_scale"])
    layer.logit_bias.data.copy_(own["logit_bias"])
    layer.confidence.weight.data.copy_(own["confidence_weight"])
    layer.confidence.bias.data.copy_(own["confidence_bias"])
    if form == "plain":
        z = F.linear(own["x"], own["weight"], own["bias"])
    else:
        cosine = fill(CosineLinear(10, 9, temperature=20.0, eps=0.0, bias=False), own)
        z = cosine(own["x"]).detach()
    logits = layer(z, own["x"])
    assert_close(logits, own["logits"])
    assert_close(layer(z, own["x"])[:, 8:], z[:, 8:])
    loss = F.cross_entropy(logits, own["labels"], weight=f["grw_weight"])
    assert_close(loss, own["loss"])
    loss.backward()
    assert_close(layer.logit_scale.grad, own["grad_logit_scale"], atol=1e-10)
    assert_close(layer.logit_bias.grad, own["grad_logit_bias"], atol=1e-10)
    assert_close(layer.confidence.weight.grad, own["grad_confidence_weight"], atol=1e-10)
    start = DisAlign(10, 8).double()
    assert torch.equal(start(z, own["x"]), z)


def test_half_precision_is_normalised_in_float32_and_zeros_have_no_gradient():
    layer = CosineLinear(16, 5)
    x = torch.randn(4, 16)
    x[1] = 0
    x.requires_grad_()
    out = layer(x)
    assert torch.equal(out[1], layer.bias)
    out.sum().backward()
    assert (x.grad[1] == 0).all() and x.grad.isfinite().all()
    half = layer(x.detach().bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, layer(x.detach().bfloat16().float()))
    assert layer(torch.zeros(0, 16)).shape == (0, 5)


@pytest.mark.parametrize("name", ["temperature", "power"])
def test_values_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0.0"):
        CosineLinear(4, 2, **{name: 0.0})
