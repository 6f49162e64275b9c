"""Deformable convolution on any install of Detectron2, on the CPU too.

Detectron2's own needs its compiled operators (`detectron2._C`), which many installs lack, and a
GPU. The classes here compute the same by torchvision, whose operator reads the same channels of
offsets. The models of this package build their ResNets with them, see `deformable_convolutions`.

Shapes: N images, C and D channels in and out, G deformable groups, kernel h x w, maps H x W.

Sources: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; Zhu et al., Deformable
ConvNets v2, arXiv:1811.11168.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

from .build import renamed

try:
    from detectron2 import _C  # noqa: F401
except ImportError:
    COMPILED = False
else:
    COMPILED = True

Pair = int | tuple[int, int]


def deformable_convolution(
    layer: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The convolution of a layer whose sampling points are moved, then its norm and activation.

    Args:
        layer: with the attributes of Detectron2's DeformConv.
        x: (N, C, H, W).
        offset: (N, 2 G h w, H', W') in pixels, dy before dx of each sampling point.
        mask: (N, G h w, H', W') factor of each sampling point; None is 1.

    Returns:
        (N, D, H', W') of the type of `x`.
    """
    shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if not x.numel():  # torchvision divides by the batch size; offsets do not matter here
        out: Tensor = F.conv2d(x, layer.weight, layer.bias, groups=layer.groups, **shape)
    else:
        # under autocast the maps are in half precision and the weights are not
        dtype = torch.promote_types(x.dtype, layer.weight.dtype)
        points = None if mask is None else mask.to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        out = deform_conv2d(
            x.to(dtype), offset.to(dtype), layer.weight.to(dtype), bias, mask=points, **shape
        ).to(x.dtype)
    if layer.norm is not None:
        out = layer.norm(out)
    if layer.activation is not None:
        out = layer.activation(out)
    return out


class _Deformable(nn.Module):
    """What both convolutions share: Detectron2's arguments, attributes and parameter names."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, divisor in (("groups", groups), ("deformable_groups", deformable_groups)):
            if divisor < 1 or in_channels % divisor or (name == "groups" and out_channels % groups):
                raise ValueError(
                    f"{name} is {divisor}; must be a divisor of {in_channels} channels in"
                    + (f" and {out_channels} channels out" if name == "groups" else "")
                )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.groups, self.deformable_groups = groups, deformable_groups
        self.norm, self.activation = norm, activation
        shape = out_channels, in_channels // groups, *self.kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def extra_repr(self) -> str:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
        names += ["groups", "deformable_groups"]
        shown = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([*shown, f"bias={self.bias is not None}"])


class DeformConv(_Deformable):
    """Deformable convolution; arguments and parameter names are Detectron2's.

    Args:
        in_channels: C.
        out_channels: D.
        kernel_size, stride, padding, dilation: a number, or one for each direction.
        groups: of channels, a divisor of C and D.
        deformable_groups: G groups of channels with offsets of their own, a divisor of C.
        bias: False; Detectron2's has none.
        norm: module behind the convolution, or None.
        activation: function behind the norm, or None.

    Raises:
        ValueError: groups do not divide the channels, or a bias is asked for.
    """

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        if bias:
            raise ValueError("DeformConv has no bias; must be bias=False")
        super().__init__(*args, **kwargs)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """See `deformable_convolution`."""
        return deformable_convolution(self, x, offset)


class ModulatedDeformConv(_Deformable):
    """Deformable convolution whose sampling points have weights.

    Arguments and errors as `DeformConv`; `bias` may be given, and is True by default.
    """

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": bias})

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """See `deformable_convolution`."""
        return deformable_convolution(self, x, offset, mask)


def with_cpu(stock: Any) -> Any:
    """A compiled convolution of Detectron2 that takes torchvision's operator on the CPU.

    Args:
        stock: Detectron2's DeformConv or ModulatedDeformConv, which cannot train there.
    """

    class Convolution(stock):
        def forward(self, x: Tensor, *points: Tensor) -> Any:
            if x.is_cuda:
                return super().forward(x, *points)
            return deformable_convolution(self, x, *points)

    Convolution.__name__ = Convolution.__qualname__ = stock.__name__
    return Convolution


@contextmanager
def deformable_convolutions(cfg: CfgNode) -> Iterator[None]:
    """Let ResNets that are built inside of the block have convolutions that work on this machine.

    Detectron2's block takes the two classes from the names of its module; they are others while a
    model is built whose MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for them, and no longer.

    Args:
        cfg: config of the model.
    """
    classes = {}
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        for ours in (DeformConv, ModulatedDeformConv):
            stock = getattr(resnet, ours.__name__)
            classes[ours.__name__] = with_cpu(stock) if COMPILED else ours
    with renamed(vars(resnet), **classes):
        yield
