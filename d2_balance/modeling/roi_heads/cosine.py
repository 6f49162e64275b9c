"""Cosine classifier and normalised mask predictor.

    z_j = w_j / (|w_j|^a + eps) . tau x / (|x|^a + eps) + b_j

With a = 1 it is tau times the cosine of the angle between the weights of class j and the features:
classes with many examples cannot have larger scores by larger weights.

Shapes: R samples, d features, K classes, N maps of C channels.

Source: the normalised layers of Seesaw loss (arXiv:2008.10032); with `eps` 0, no bias and a learned
temperature, those of DisAlign (arXiv:2103.16370).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2_balance.losses._base import check
from d2_balance.losses._samples import upcast


def normalized(x: Tensor, dim: int | tuple[int, ...], power: float, eps: float) -> Tensor:
    """Divide by the 2-norm to a power.

    Args:
        x: any shape, float32 or float64.
        dim: over which the norm goes.
        power: a, above 0.
        eps: added to the norm, at least 0.

    Returns:
        As `x`; vectors of zeros stay zero and have no gradient (that of the formula is 1 / eps,
        or NaN if a is below 1).
    """
    square = x.square().sum(dim=dim, keepdim=True)
    zero = square == 0
    norm = torch.where(zero, torch.ones_like(square), square).sqrt()
    factor = 1 / ((norm if power == 1 else norm.pow(power)) + eps)
    return x * factor.masked_fill(zero, 0)


class _Temperature(nn.Module):
    """What both layers share: tau, the power and the checks."""

    temperature: Tensor

    def _set(self, temperature: float, power: float, eps: float, learned: bool) -> None:
        check(self, "temperature", temperature, temperature > 0, "a number above 0")
        check(self, "power", power, power > 0, "a number above 0")
        check(self, "eps", eps, eps >= 0, "a number of at least 0")
        self.power, self.eps = power, eps
        # Saved, so that the weights of a layer without normalisation are noticed: they fit.
        if learned:
            self.temperature_root = nn.Parameter(torch.tensor(float(temperature)).sqrt())
        else:
            self.register_buffer("temperature", torch.tensor(float(temperature)))

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "MODEL.BALANCE.CLASSIFIER cosine and MASK_PREDICTOR normalized cannot be scripted; "
            "trace the model."
        )

    @property
    def tau(self) -> Tensor:
        """0-d temperature."""
        root: Tensor | None = getattr(self, "temperature_root", None)
        return self.temperature if root is None else root.square()


class CosineLinear(nn.Linear, _Temperature):
    """Linear layer over normalised features and weights.

    Args:
        in_features: d.
        out_features: number of outputs.
        temperature: tau, above 0.
        power: exponent a of the norms, above 0.
        eps: added to the norms, at least 0.
        learned: whether tau is the square of a learned number.
        bias: whether there is one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
        learned: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._set(temperature, power, eps, learned)
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, outputs) logits of (R, d) features."""
        with torch.autocast(x.device.type, enabled=False):
            # in bfloat16 logits would move by up to 0.13
            weight = normalized(upcast(self.weight), 1, self.power, self.eps)
            x = normalized(upcast(x), 1, self.power, self.eps) * self.tau.to(weight.dtype)
            return F.linear(x.to(weight.dtype), weight, self.bias)


class NormalizedConv2d(nn.Conv2d, _Temperature):
    """Convolution over normalised pixels and weights, for the last layer of mask heads.

    Args:
        in_channels: C.
        out_channels: number of outputs.
        kernel_size: of the convolution.
        temperature: tau, above 0.
        power: exponent a of the norms, above 0.
        eps: added to the norms, at least 0.
        learned: whether tau is the square of a learned number.
        over_kernel: whether one norm holds for all positions of a kernel; False has one for each.
        **kwargs: as `torch.nn.Conv2d`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
        learned: bool = False,
        over_kernel: bool = False,
        **kwargs: int | bool | str,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        self._set(temperature, power, eps, learned)
        self.over_kernel = over_kernel
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H', W') of (N, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            dims = (1, 2, 3) if self.over_kernel else 1
            weight = normalized(upcast(self.weight), dims, self.power, self.eps)
            x = normalized(upcast(x), 1, self.power, self.eps) * self.tau.to(weight.dtype)
            out: Tensor = self._conv_forward(x.to(weight.dtype), weight, self.bias)
            return out
