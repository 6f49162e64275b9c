"""DR loss: distributional ranking.

    P- = sum_j q-_j p_j,  q- = softmax(p / lambda_neg) over negative entries (sample, class)
    P+ = sum_j q+_j p_j,  q+ = softmax(-p / lambda_pos) over positive entries;  no positive: P+ = 1
    L  = (tau / L) log(1 + exp(L (P- - P+ + margin))),   mean over images

The hardest negatives are ranked below the hardest positives; all levels and classes of an image
form one pool. Autograd goes through q, as in the paper's appendix.

Source: Qian et al., DR Loss: Improving Object Detection by Distributional Ranking,
arXiv:1907.10156v3, equations 7 to 11.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.chunks import map_chunks
from ._kernels.entries import refuse_double_backward
from ._samples import Samples

SHARPEST = 60.0  # 1 / lambda_neg up to which exp((p - 1) / lambda_neg) is above 0 in float32
NEGATIVE_H = 3.5  # the paper sets lambda by h: lambda_pos = 1 / ln e, lambda_neg = 0.1 / ln 3.5


def softmax_mean(
    values: Tensor, scores: Tensor, mask: Tensor, group: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Mean of values under the softmax of scores, within groups of samples.

    Args:
        values: (R, C).
        scores: (R, C).
        mask: (R, C) bool, True for entries that count.
        group: (R,) int64 in [0, groups).
        groups: G.

    Returns:
        (G,) means, 0 for an empty group, and (G,) bool, True for groups with an entry.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    with torch.no_grad():  # the softmax does not change with the peak
        peak = scores.new_full((groups,), -torch.inf)
        peak = peak.scatter_reduce(0, group, scores.amax(dim=1), "amax")
        filled = peak != -torch.inf  # NaN counts as filled, or a diverged image would weigh 0
        peak = torch.where(filled, peak, torch.zeros_like(peak))
    weight = (scores - peak[group].unsqueeze(1)).exp()  # masked entries: exp(-inf) = 0
    total = weight.new_zeros(groups).index_add(0, group, weight.sum(dim=1))
    mean = weight.new_zeros(groups).index_add(0, group, (weight * values).sum(dim=1))
    return mean / total.clamp(min=1e-12), filled


def dr_loss(
    logits: Tensor,
    onehot: Tensor,
    group: Tensor,
    groups: int,
    *,
    margin: float,
    L: float,
    tau: float,
    lambda_pos: float,
    lambda_neg: float,
) -> Tensor:
    """DR loss of each group of samples (an image, or the batch).

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        group: (R,) int64 in [0, groups).
        groups: G.
        margin: gap between positives and negatives.
        L: sharpness of the logistic loss, above 0.
        tau: weight of the loss, above 0.
        lambda_pos: temperature of the positives' distribution, above 0.
        lambda_neg: temperature of the negatives' distribution, above 0.

    Returns:
        (G,); 0 for a group without samples.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> group = torch.zeros(2, dtype=torch.int64)
        >>> arguments = {"margin": 0.5, "L": 6.0, "tau": 4.0, "lambda_pos": 1.0, "lambda_neg": 0.1}
        >>> dr_loss(logits, onehot, group, 1, **arguments)
        tensor([0.9418])
    """
    prob = logits.sigmoid()
    positive = onehot > 0
    neg, has_neg = softmax_mean(prob, prob / lambda_neg, ~positive, group, groups)
    column = onehot.argmax(dim=1, keepdim=True)  # (R, 1)
    own, fg = logits.gather(1, column), positive.gather(1, column)
    return _ranked(neg, has_neg, own, fg, group, margin, L, tau, lambda_pos)


def _ranked(
    neg: Tensor,
    has_neg: Tensor,
    own: Tensor,
    fg: Tensor,
    group: Tensor,
    margin: float,
    L: float,
    tau: float,
    lambda_pos: float,
) -> Tensor:
    """The loss (G,) from P- (G,) and the logits (R, 1) of the positives, those with fg (R, 1)."""
    own = own.sigmoid()  # a sample has one positive entry at most
    pos, has_pos = softmax_mean(own, -own / lambda_pos, fg, group, len(neg))
    pos = torch.where(has_pos, pos, torch.ones_like(pos))
    loss = tau / L * F.softplus(L * (neg - pos + margin))
    return torch.where(has_neg | has_pos, loss, torch.zeros_like(loss))


def fast_dr_loss(
    samples: Samples,
    group: Tensor,
    groups: int,
    *,
    margin: float,
    L: float,
    tau: float,
    lambda_pos: float,
    lambda_neg: float,
) -> Tensor:
    """`dr_loss` with the sums over negatives in chunks and their gradient in closed form."""
    neg, has_neg, own = _NegativeMean.apply(
        samples.logits, samples.column, samples.hit, group, groups, lambda_neg
    )
    fg = samples.foreground.unsqueeze(1)
    return _ranked(neg, has_neg, own, fg, group, margin, L, tau, lambda_pos)


class _NegativeMean(torch.autograd.Function):
    """P- (G,), whether a group has a negative (G,), and the logits (R, 1) of `column`.

    With e = exp((p - 1) / lambda), 0 for positives, P- = sum e p / sum e, and

        dP- / dp_j = e_j / (sum e) (1 + (p_j - P-) / lambda)

    e p (1 - p) is kept for it: to compute it again takes longer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        column: Tensor,
        hit: Tensor,
        group: Tensor,
        groups: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = logits.gather(1, column)
        own_weight = _weights(own.sigmoid(), temperature).mul_(1 - hit)  # (R, 1)
        derivative = torch.empty_like(logits, memory_format=torch.contiguous_format)
        sums = logits.new_empty(2, len(logits))

        def work(chunk: slice) -> None:
            prob = logits[chunk].sigmoid()
            weight = _weights(prob, temperature).scatter_(1, column[chunk], own_weight[chunk])
            torch.sum(weight, dim=1, out=sums[0, chunk])
            torch.sum(weight.mul_(prob), dim=1, out=sums[1, chunk])
            torch.addcmul(weight, weight, prob, value=-1, out=derivative[chunk])

        map_chunks(work, logits)
        total = sums.new_zeros(2, groups, dtype=torch.float64).index_add_(1, group, sums.double())
        filled = total[0] != 0  # NaN counts as filled, or a diverged image would weigh 0
        total[0].masked_fill_(~filled, 1)
        mean = total[1] / total[0]
        ctx.save_for_backward(logits, derivative, column, group, total[0], mean)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(filled)
        return mean.to(logits.dtype), filled, own

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, _: Tensor, grad_own: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        logits, derivative, column, group, total, mean = ctx.saved_tensors
        upstream = grad_mean.double() / total  # (G,)
        factor, offset = upstream / ctx.temperature, upstream * (1 - mean / ctx.temperature)
        factor, offset = (
            x.to(derivative.dtype)[group].unsqueeze(1) for x in (factor, offset)
        )  # (R, 1)
        grad = torch.empty_like(derivative)

        def work(chunk: slice) -> None:
            prob = torch.sigmoid(logits[chunk], out=grad[chunk])
            torch.addcmul(offset[chunk], factor[chunk], prob, out=prob).mul_(derivative[chunk])

        map_chunks(work, logits)
        return grad.scatter_add_(1, column, grad_own), None, None, None, None, None


def _weights(prob: Tensor, temperature: float) -> Tensor:
    """exp((p - 1) / lambda), a new tensor of any shape."""
    return (prob * (1 / temperature)).sub_(1 / temperature).exp_()


@CLS_LOSSES.register("DR")
class DRLoss(ClassificationLoss):
    """DR loss (arXiv:1907.10156v3) for sigmoid heads; set the prior probability to 0.5.

    The loss starts near 2 whatever the prior, but with a prior of 0.01 its gradient is 25 times
    smaller: MODEL.RETINANET.PRIOR_PROB 0.5 is part of the method.

    Args:
        margin: gamma of the paper, the gap wanted between positives and negatives.
        L: sharpness of the logistic loss, above 0.
        tau: weight of the loss, above 0.
        lambda_pos: temperature of the positives' distribution, above 0 (paper: h = e).
        lambda_neg: temperature of the negatives' distribution, above 0 (paper: 0.1 / ln 3.5).
        scope: "image" ranks within each image (the paper); "batch" ranks the samples of all images
            together (the released code).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> DRLoss()(logits, labels)
        tensor(0.9803)
    """

    elementwise = False
    activation = "sigmoid"

    def __init__(
        self,
        *,
        margin: float = 0.5,
        L: float = 6.0,
        tau: float = 4.0,
        lambda_pos: float = 1.0,
        lambda_neg: float = 0.1 / math.log(NEGATIVE_H),
        scope: Literal["image", "batch"] = "image",
    ) -> None:
        super().__init__()
        positive = {"L": L, "tau": tau, "lambda_pos": lambda_pos, "lambda_neg": lambda_neg}
        for name, value in positive.items():
            check(self, name, value, value > 0, "a number above 0")
        check(self, "margin", margin, 0 <= margin <= 1, "a number in [0, 1]")
        check(self, "scope", scope, scope in ("image", "batch"), "one of image, batch")
        self.scope = scope
        self.arguments = {"margin": margin, **positive}

    def compute(self, samples: Samples) -> Tensor:
        if not len(samples.labels):
            return samples.logits.sum() * 0
        group = samples.image_index if self.scope == "image" else None
        groups = 1 if group is None else samples.images
        if group is None:
            group = torch.zeros_like(samples.labels)
        if 1 / self.arguments["lambda_neg"] > SHARPEST:
            loss = dr_loss(samples.logits, samples.onehot, group, groups, **self.arguments)
        else:
            loss = fast_dr_loss(samples, group, groups, **self.arguments)
        return loss.mean()
