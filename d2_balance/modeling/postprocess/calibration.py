"""Calibration of class logits after training, from the counts of the training set.

A calibration is added to the logits of the K classes; the column of background stays as it is.

    logit adjustment   z_j + tau (w(c_j) - w(c_0)),  w a link function, raw: w(c) = -log(c / C)
    FRACAL, softmax    z_j + s_j - l log D_j
    FRACAL, sigmoid    p_j = sigmoid(z_j) sigmoid(z_j + s_j + q_j),  q_j = log10((1/K) / D'_j),
                       D'_j = D_j^l / sum_k D_k^l
    NorCal             z_j - gamma log n_j
    LogN               (z_j - mu_j + min_k mu_k) / std_j

c_j is the number of training images (or objects) of class j, C that of the set, s_j the shift of
FRACAL, w(c_j) - w(C / K) with base 10, and D_j the fractal dimension of the centres of the boxes of
class j (see `fractal_dimension`). A class without training data has shift 0 and D = 1.

Shapes: R samples, K classes.

Sources: Menon et al., arXiv:2007.07314 (logit adjustment); Alexandridis et al., arXiv:2410.11774
(FRACAL and the link functions); Pan et al., arXiv:2107.02170 (NorCal; its sigmoid form is ours);
Zhao et al., arXiv:2203.17020 (LogN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

Reference = Literal["none", "one", "average"]
REFERENCES = ("none", "one", "average")
Measured = Mapping[str, Sequence[Any]]
"""What was measured for a calibration, by the fields of `CalibrationStatistics`."""

LINKS = ("raw", "base2", "base10", "smooth", "prob", "normit", "gombit")


def link_weight(count: Tensor, total: float | Tensor, link: str) -> Tensor:
    """Return w(c) of one of `LINKS`.

    Args:
        count: (K,) float64, above 0 and, for prob, normit and gombit, below `total`.
        total: C.
        link: name of the function.
    """
    fraction = count / total
    if link == "raw":
        return -fraction.log()
    if link == "base2":
        return -fraction.log2()
    if link == "base10":
        return -fraction.log10()
    if link == "smooth":
        return ((total + 1) / (count + 1)).log() + 1
    if link == "prob":
        return ((total - count) / count).log()
    if link == "normit":
        normit: Tensor = torch.special.ndtri(fraction)
        return -normit
    return -(-torch.log1p(-fraction)).log()  # gombit


def class_shift(
    count: Tensor,
    total: float,
    link: str = "raw",
    reference: Reference = "none",
    tau: float = 1.0,
) -> Tensor:
    """Return what logit adjustment adds to the logits of each class.

    Args:
        count: (K,) training images, or objects, of each class.
        total: C, images or objects of the set.
        link: one of `LINKS`.
        reference: the count whose shift is 0: "none" adds w(c) itself (raw: c = C, every class goes
            up against background), "one" lowers every class that has more than one image, "average"
            leaves classes of average frequency, C / K, where they are.
        tau: strength, at least 0.

    Returns:
        (K,) float64, 0 for classes without training data.
    """
    count = count.double()
    inside = count.clamp(min=1, max=max(total - 1, 1))  # w is infinite at 0 and at C
    weight = link_weight(inside, total, link)
    if reference != "none":
        base = 1.0 if reference == "one" else total / len(count)
        weight = weight - link_weight(weight.new_tensor(base), total, link)
    return (tau * weight).masked_fill(count == 0, 0)


def fractal_dimension(
    cx: Tensor, cy: Tensor, classes: Tensor, num_classes: int, max_grid: int = 64
) -> Tensor:
    """Return how the box centres of each class fill the image: 1 a line, 2 the whole image.

    D_j is the least-squares regression coefficient of log(occupied cells) on log(g), over grids of
    g x g cells with g = 1 .. `max_grid` and g^2 at most the number of objects.

    Args:
        cx: (B,) centres of boxes in units of the image's width.
        cy: (B,) in units of its height.
        classes: (B,) int64 in [0, K).
        num_classes: K.
        max_grid: finest grid.

    Returns:
        (K,) float64, at least 1; 1 for classes with fewer than 4 objects.
    """
    edge = 1 - 1e-12
    cx, cy = cx.double().clamp(0, edge), cy.double().clamp(0, edge)
    counts = torch.bincount(classes, minlength=num_classes)
    grids = torch.arange(1, max_grid + 1)
    occupied = torch.zeros(max_grid, num_classes, dtype=torch.float64)
    for i, g in enumerate(grids.tolist()):
        cell = (classes * g + (cx * g).long()) * g + (cy * g).long()
        occupied[i] = torch.bincount(cell.unique() // (g * g), minlength=num_classes)
    used = (grids.square().unsqueeze(1) <= counts).double()  # (G, K)
    x = grids.double().log().unsqueeze(1)
    y = occupied.clamp(min=1).log()
    n = used.sum(0).clamp(min=1)
    mean_x, mean_y = (used * x).sum(0) / n, (used * y).sum(0) / n
    covariance = (used * (x - mean_x) * (y - mean_y)).sum(0)
    variance = (used * (x - mean_x).square()).sum(0)
    coefficient = covariance / variance.clamp(min=1e-12)
    return torch.where(counts < 4, torch.ones_like(coefficient), coefficient.clamp(min=1))


class Shift(nn.Module):
    """Add a number to the logits of each class: logit adjustment, NorCal, FRACAL of a softmax.

    Args:
        shift: (K,).
        measured: fractal dimensions that it was made from, to be saved with the model.
    """

    shift: Tensor

    def __init__(self, shift: Tensor, measured: Measured | None = None) -> None:
        super().__init__()
        self.measured = measured
        self.register_buffer("shift", shift.double(), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return calibrated logits of (..., K) logits."""
        return logits + self.shift.to(logits.dtype)


class FracalSigmoid(Shift):
    """FRACAL of independent classes, as the logit of its product of two probabilities.

    Args:
        shift: (K,) s.
        dimension: (K,) D, at least 1.
        power: l, at least 0.
        measured: see `Shift`.
    """

    def __init__(
        self, shift: Tensor, dimension: Tensor, power: float, measured: Measured | None = None
    ) -> None:
        log_power = power * dimension.double().log()
        q = (log_power.logsumexp(0) - log_power - math.log(len(log_power))) / math.log(10)
        super().__init__(shift.double() + q, measured)

    def forward(self, logits: Tensor) -> Tensor:
        log_prob = F.logsigmoid(logits) + F.logsigmoid(super().forward(logits))
        return log_prob - (-torch.expm1(log_prob)).log()


class LogN(nn.Module):
    """Logit normalisation: every class has the same spread of logits on training images.

    Without statistics it refuses to calibrate, or changes nothing where `waits` is set: those of a
    training come at its end.

    Args:
        mean: (K,) mean of the logits of each class, or (S, K) for the S stages of a cascade; None
            if they are not known yet.
        variance: their variance, likewise; below 1e-11 it counts as 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | None = None, variance: Tensor | None = None) -> None:
        super().__init__()
        self.waits = False
        self.measured: Measured | None = None
        self.stage = 0
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64), persistent=False)
        if mean is not None and variance is not None:
            self.fill(mean, variance)

    def fill(self, mean: Tensor, variance: Tensor) -> None:
        """Take statistics as the constructor does; those of `stage` are used.

        Raises:
            ValueError: they are of fewer stages.
        """
        self.measured = {"logit_mean": mean.tolist(), "logit_variance": variance.tolist()}
        if mean.dim() == 2:
            if self.stage >= len(mean):
                raise ValueError(
                    f"LogN has statistics of {len(mean)} cascade stages and the model has more; "
                    "run `d2-balance calibrate` with this model."
                )
            mean, variance = mean[self.stage], variance[self.stage]
        mean, variance = (x.double().to(self.mean.device) for x in (mean, variance))
        self.mean = mean - mean.min()
        self.std = torch.where(variance < 1e-11, torch.ones_like(variance), variance).sqrt()

    def forget(self) -> None:
        """Drop the statistics and wait for new ones."""
        self.waits, self.measured = True, None
        self.mean, self.std = self.mean[:0], self.std[:0]

    def of_stage(self, stage: int) -> None:
        """Use the statistics of a cascade stage."""
        self.stage = stage
        if self.measured is not None:
            self.fill(*(torch.tensor(v, dtype=torch.float64) for v in self.measured.values()))

    def forward(self, logits: Tensor) -> Tensor:
        """Return calibrated logits of (..., K) logits.

        Raises:
            ValueError: there are no statistics.
        """
        if self.measured is None:
            if self.waits:
                return logits
            raise ValueError(
                "MODEL.BALANCE.CALIBRATION.NAME 'logn': the loaded weights hold no statistics of "
                "logits; set MODEL.BALANCE.CALIBRATION.STATISTICS to a file of `d2-balance "
                "calibrate`."
            )
        return (logits - self.mean.to(logits.dtype)) / self.std.to(logits.dtype)


class LogitStatistics:
    """Mean and variance of logits over the training images, for `LogN`.

    Exact over all samples; with a momentum the moving averages of the release, which after an epoch
    still hold a third to a half of their start (mean 0, variance 1) and give other scores.

    Args:
        num_classes: K.
        momentum: None for exact statistics, else the fraction of a new batch, in (0, 1).
    """

    def __init__(self, num_classes: int, momentum: float | None = None) -> None:
        self.momentum = momentum
        self._count = 0
        self._mean = torch.zeros(num_classes, dtype=torch.float64)
        self._square = torch.zeros(num_classes, dtype=torch.float64)  # sum of squared deviations
        if momentum is not None:
            self._square += 1

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """Add a batch of (R, K) logits."""
        logits = logits.detach().double().cpu()
        samples = len(logits)
        if not samples or (self.momentum is not None and samples < 2):
            return
        mean = logits.mean(0)
        deviation = (logits - mean).square().sum(0)
        if self.momentum is not None:
            self._mean.lerp_(mean, self.momentum)
            self._square.lerp_(deviation / (samples - 1), self.momentum)
            return
        self._join(samples, mean, deviation)

    def merge_ranks(self) -> None:
        """Join what all ranks have seen; moving averages are those of the first rank.

        Every rank must call this.
        """
        ranks = comm.all_gather((self._count, self._mean, self._square))
        self._count, self._mean, self._square = ranks[0]
        if self.momentum is None:
            for count, mean, square in ranks[1:]:
                self._join(count, mean, square)

    def _join(self, count: int, mean: Tensor, square: Tensor) -> None:
        """Take `count` more samples (Chan et al.: sums of squares about a common mean)."""
        total = max(self._count + count, 1)
        delta = mean - self._mean
        self._square = self._square + square + delta.square() * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count += count

    @property
    def mean(self) -> Tensor:
        """(K,) float64."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """(K,) float64, unbiased."""
        return self._square if self.momentum is not None else self._square / max(self._count - 1, 1)
