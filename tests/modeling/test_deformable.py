"""Deformable convolution over torchvision: values, gradients, names, and blocks that train."""

import inspect

import detectron2.layers.deform_conv as stock
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone import resnet
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from d2_balance.modeling.deformable import COMPILED, DeformConv, ModulatedDeformConv, with_cpu

from ..conftest import make_inputs, small_cfg

DCN = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])


def source_class(name):
    """Detectron2's class, which its module has replaced by one that raises where it lacks _C."""
    cls = getattr(stock, name)
    if COMPILED:
        return cls
    space = dict(vars(stock))
    source = inspect.getsource(stock)
    start = source.index(f"class {name}(")
    end = source.find("\n\n\n", start)
    exec(source[start:end], space)
    return space[name]


def sampled(x, weight, offset, mask, stride, padding, groups, deformable_groups):  # noqa: C901
    """The papers' sum over sampling points, in loops, with bilinear interpolation."""
    n, c, height, width = x.shape
    out_channels, _, kh, kw = weight.shape
    rows, columns = offset.shape[2:]
    result = x.new_zeros(n, out_channels, rows, columns)
    per_group, per_deform = c // groups, c // deformable_groups

    def value(i, channel, y, xx):
        total = 0.0
        for yy in (int(y // 1), int(y // 1) + 1):
            for xi in (int(xx // 1), int(xx // 1) + 1):
                if 0 <= yy < height and 0 <= xi < width:
                    total += (
                        max(0, 1 - abs(y - yy))
                        * max(0, 1 - abs(xx - xi))
                        * x[i, channel, yy, xi].item()
                    )
        return total

    for i in range(n):
        for o in range(out_channels):
            first = o // (out_channels // groups) * per_group
            for r in range(rows):
                for s in range(columns):
                    for k in range(per_group):
                        channel = first + k
                        d = channel // per_deform
                        for point in range(kh * kw):
                            index = d * kh * kw + point
                            dy, dx = offset[i, 2 * index : 2 * index + 2, r, s].tolist()
                            y = r * stride - padding + point // kw + dy
                            xx = s * stride - padding + point % kw + dx
                            factor = mask[i, index, r, s].item()
                            result[i, o, r, s] += (
                                weight[o, k, point // kw, point % kw] * value(i, channel, y, xx)
                            ) * factor
    return result


def tensors(layer, size=5, n=2):
    x = torch.rand(n, layer.in_channels, size, size, dtype=torch.float64)
    out = (size + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
    points = layer.deformable_groups * layer.kernel_size[0] * layer.kernel_size[1]
    # away from whole pixels, where the interpolation has kinks
    offset = torch.randint(-2, 3, (n, 2 * points, out, out)) + 0.2 + 0.6 * torch.rand(1)
    mask = torch.rand(n, points, out, out, dtype=torch.float64)
    return x, offset.double(), mask


def make(cls, **arguments):
    return cls(4, 6, 3, padding=1, groups=2, deformable_groups=2, **arguments).double()


@pytest.mark.parametrize("stride", [1, 2])
def test_values_are_those_of_the_sum_over_moved_sampling_points(stride):
    layer = make(ModulatedDeformConv, stride=stride, bias=False)
    x, offset, mask = tensors(layer)
    expected = sampled(x, layer.weight.detach(), offset, mask, stride, 1, 2, 2)
    assert torch.allclose(layer(x, offset, mask), expected)
    plain = make(DeformConv, stride=stride)
    plain.load_state_dict(layer.state_dict())
    expected = sampled(x, layer.weight.detach(), offset, torch.ones_like(mask), stride, 1, 2, 2)
    assert torch.allclose(plain(x, offset), expected)


def test_without_offsets_it_is_a_convolution():
    layer = make(ModulatedDeformConv)
    nn.init.normal_(layer.bias)
    x, offset, mask = tensors(layer)
    out = layer(x, offset * 0, torch.ones_like(mask))
    assert torch.allclose(out, F.conv2d(x, layer.weight, layer.bias, padding=1, groups=2))


def test_gradients_of_all_inputs_are_right():
    layer = make(ModulatedDeformConv)
    x, offset, mask = (t.requires_grad_() for t in tensors(layer, size=3, n=1))

    def run(x, offset, mask, weight, bias):
        layer_parts = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, layer_parts, (x, offset, mask))

    assert torch.autograd.gradcheck(run, (x, offset, mask, layer.weight, layer.bias))
    plain = make(DeformConv)
    assert torch.autograd.gradcheck(
        lambda x, o, w: torch.func.functional_call(plain, {"weight": w}, (x, o)),
        (x, offset, plain.weight),
    )


def test_half_precision_maps_meet_float_weights_and_come_back_in_half():
    layer = DeformConv(4, 6, 3, padding=1)
    x = torch.rand(1, 4, 5, 5)
    offset = torch.rand(1, 18, 5, 5)
    out = layer(x.bfloat16(), offset.bfloat16())
    assert out.dtype == torch.bfloat16
    expected = layer(x.bfloat16().float(), offset.bfloat16().float())
    assert torch.equal(out, expected.bfloat16())


def test_no_image_gives_an_empty_map_with_gradient():
    layer = DeformConv(4, 6, 3, stride=2, padding=1, norm=nn.BatchNorm2d(6))
    out = layer.eval()(torch.rand(0, 4, 6, 8), torch.rand(0, 18, 3, 4))
    assert out.shape == (0, 6, 3, 4)
    out.sum().backward()
    assert layer.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("ours", [DeformConv, ModulatedDeformConv])
def test_arguments_and_parameter_names_are_detectron2s(ours):
    theirs = source_class(ours.__name__)
    arguments = (4, 6, 3, 2, 1, 1, 2, 2)
    mine, other = (
        ours(*arguments, norm=nn.BatchNorm2d(6)),
        theirs(*arguments, norm=nn.BatchNorm2d(6)),
    )
    assert {k: v.shape for k, v in mine.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }
    known = inspect.signature(theirs).parameters
    assert all(ours(4, 4, 3, **{name: known[name].default}) for name in list(known)[3:])
    for name in vars(other):
        if not name.startswith("_") and name not in ("with_bias", "training"):
            own, expected = getattr(mine, name), getattr(other, name)
            if isinstance(expected, int) and isinstance(own, tuple):
                expected = expected, expected  # Detectron2 keeps the number in one of the two
            assert isinstance(expected, nn.Module) or own == expected, name


def test_weights_of_a_plain_resnet_load_into_a_deformable_one():
    plain = build_model(small_cfg("faster")).state_dict()
    deformable = build_model(small_cfg("faster", *DCN)).state_dict()
    extra = set(deformable) - set(plain)
    assert set(plain) <= set(deformable)
    assert extra and all(".conv2_offset." in key for key in extra)
    assert all(deformable[key].shape == value.shape for key, value in plain.items())


@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_model_trains_on_the_cpu(modulated):
    cfg = small_cfg("mask", *DCN, "MODEL.RESNETS.DEFORM_MODULATED", modulated)
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 2
    model = build_model(cfg).train()
    blocks = [m for m in model.modules() if isinstance(m, resnet.DeformBottleneckBlock)]
    assert len(blocks) == 4 + 6 + 3
    with EventStorage():
        sum(model(make_inputs()).values()).backward()
    for block in blocks:
        assert block.conv2_offset.weight.grad.abs().sum() > 0
        assert block.conv2.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["faster", "retinanet", "fcos"])
def test_only_a_model_that_asks_for_them_is_built_with_our_convolutions(kind):
    names = ("DeformConv", "ModulatedDeformConv")
    before = [getattr(resnet, name) for name in names]
    for modulated, ours in enumerate((DeformConv, ModulatedDeformConv)):
        cfg = small_cfg(kind, *DCN, "MODEL.RESNETS.DEFORM_MODULATED", bool(modulated))
        blocks = [
            m for m in build_model(cfg).modules() if type(m).__name__ == "DeformBottleneckBlock"
        ]
        expected = getattr(stock, ours.__name__) if COMPILED else ours
        assert len(blocks) == 4 + 6 + 3
        assert all(isinstance(block.conv2, expected) for block in blocks)
        assert [getattr(resnet, name) for name in names] == before


def test_compiled_convolutions_stay_on_the_gpu_and_torchvision_takes_the_cpu():
    class Compiled(DeformConv):
        def forward(self, x, offset):
            raise NotImplementedError("not on the CPU")

    layer = with_cpu(Compiled)(4, 6, 3, padding=1)
    assert type(layer).__name__ == "Compiled"
    x, offset = torch.rand(1, 4, 5, 5), torch.rand(1, 18, 5, 5)
    plain = DeformConv(4, 6, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, offset), plain(x, offset))


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="detectron2._C is not compiled here")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled operator needs a GPU")
@pytest.mark.parametrize("ours", [DeformConv, ModulatedDeformConv])
def test_outputs_and_gradients_agree_with_the_compiled_operator(ours):
    mine = make(ours).float().cuda()
    other = getattr(stock, ours.__name__)(4, 6, 3, 1, 1, 1, 2, 2).cuda()
    other.load_state_dict(mine.state_dict())
    inputs = tensors(mine)[: 3 if ours is ModulatedDeformConv else 2]
    outputs = []
    for layer in (mine, other):
        own = [t.float().cuda().requires_grad_() for t in inputs]
        layer(*own).square().sum().backward()
        outputs.append([layer(*own), layer.weight.grad, *(t.grad for t in own)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", [{"groups": 3}, {"deformable_groups": 3}, {"bias": True}, {"groups": 0}]
)
def test_arguments_that_cannot_work_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        DeformConv(4, 6, 3, **arguments)
