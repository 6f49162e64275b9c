"""ACSL: adaptive class suppression, which pushes down only the classes that a sample is taken for.

    w_ij = 1 if y_ij = 1, or else
           foreground sample i:  [sigmoid(z_ij) >= xi]
           background sample i:  [i is sampled for the group of class j]
    L    = sum_j w_ij BCE(z_ij, y_ij),  mean over samples

Column K is background, a task of its own that belongs to no group: foreground samples treat it as
any other class. Of the B background samples, each group of classes has its own sample without
replacement: all of them for frequent classes, 0.1 B for common and 0.01 B for rare ones.

Source: Wang et al., Adaptive Class Suppression Loss for Long-Tail Object Detection,
arXiv:2104.00885, equations 3 to 5, and its released code. Mean over samples. The release rounds
0.01 B down, so that no rare class is suppressed by less than 100 background samples; here the
remainder decides at random, which keeps the rate in small batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses, softplus
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss


def acsl_loss(
    logits: Tensor, target: Tensor, sampled: Tensor, score_threshold: float = 0.7
) -> Tensor:
    """Adaptive class suppression loss of every column of every sample.

    Args:
        logits: (R, K + 1), the last column background.
        target: (R, K + 1) in {0, 1}, one 1 per sample.
        sampled: (R, K + 1) bool, the columns that background samples train.
        score_threshold: xi, score from which a foreground sample trains another class, in (0, 1).

    Returns:
        (R, K + 1).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 3.0], [0.0, 0.5, -2.0]])
        >>> target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> acsl_loss(logits, target, sampled=torch.tensor([[True, False, True]] * 2))
        tensor([[0.1269, 0.0000, 3.0486],
                [0.6931, 0.0000, 2.1269]])
    """
    confident = logits.detach().sigmoid() >= score_threshold
    trained = torch.where(target[:, -1:] > 0, sampled, confident) | (target > 0)
    return sigmoid_ce_loss(logits, target) * trained


@torch.no_grad()
def sample_background(background: Tensor, fractions: Sequence[float]) -> Tensor:
    """Sample background samples without replacement, for each fraction by itself.

    Args:
        background: (R,) bool.
        fractions: G numbers in [0, 1], of the number of background samples.

    Returns:
        (G, R) bool.
    """
    size = (len(fractions), len(background))
    noise = torch.rand(size, device=background.device).masked_fill(~background, 2.0)
    rank = noise.argsort(dim=1).argsort(dim=1)  # background first
    wanted = torch.stack([background.sum() * fraction for fraction in fractions])  # (G,)
    return rank < (wanted + torch.rand_like(wanted)).floor().unsqueeze(1)


class _NegativeACSL:
    """Cross-entropy of negatives for `entry_losses`, of the logits at or above a bound.

    Args:
        bounds: (G, C), the bounds of G groups of samples.
        group: (R,) int64 in [0, G).
    """

    def __init__(self, bounds: Tensor, group: Tensor) -> None:
        self.bounds, self.group = bounds, group

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        trained = logits >= self.bounds.index_select(0, self.group[chunk])
        softplus(logits, out=value).mul_(trained)
        if grad is not None:
            torch.sigmoid(logits, out=grad).mul_(trained)


@CLS_LOSSES.register("ACSL")
class ACSLLoss(ClassificationLoss):
    """Adaptive class suppression loss (arXiv:2104.00885) for sigmoid RoI heads.

    The authors train the classifier of a trained softmax model alone (MODEL.BALANCE.TRAINABLE),
    with MODEL.BALANCE.PRIOR_PROB 0.01. At test time the score is sigmoid(z_j).

    Args:
        class_count: (K,) training images of each class.
        score_threshold: xi, score from which a foreground sample trains another class, in (0, 1).
        cuts: classes of at most so many images are rare, and common; two rising numbers.
        fractions: of the background samples that train rare, and common classes, in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> loss = ACSLLoss(class_count=[500, 50, 5])
        >>> logits = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
        >>> loss(logits, torch.tensor([0]))  # of the other columns only one has a score of 0.7
        tensor([[0.1269, 0.0000, 1.3133, 0.0000]])
    """

    elementwise = True
    activation = "sigmoid"
    all_reduced = False

    class_count: Tensor

    def __init__(
        self,
        *,
        class_count: Tensor | Sequence[float],
        score_threshold: float = 0.7,
        cuts: Sequence[int] = (10, 100),
        fractions: Sequence[float] = (0.01, 0.1),
    ) -> None:
        super().__init__()
        count = torch.as_tensor(class_count, dtype=torch.float64)
        check(self, "class_count", class_count, bool((count >= 0).all()), "K counts of at least 0")
        rule = "a number in (0, 1)"
        check(self, "score_threshold", score_threshold, 0 < score_threshold < 1, rule)
        rising = len(cuts) == 2 and 0 <= cuts[0] <= cuts[1]
        check(self, "cuts", cuts, rising, "two rising numbers of at least 0")
        inside = len(fractions) == 2 and all(0 <= f <= 1 for f in fractions)
        check(self, "fractions", fractions, inside, "two numbers in [0, 1]")
        self.score_threshold = score_threshold
        self.cuts, self.fractions = tuple(cuts), tuple(fractions)
        self.num_classes = len(count)
        self.register_buffer("class_count", count)

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1

    @property
    def group(self) -> Tensor:
        """(K,) int64, 0 for rare, 1 for common and 2 for frequent classes."""
        return torch.stack([self.class_count > cut for cut in self.cuts]).sum(dim=0)

    def _bounds(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Logits from which a column is trained: (5, K + 1), and (R,) int64, which of the 5 holds.

        Entries 0 to 3 are for background samples that are sampled for neither group, for rare, for
        common, and for both; entry 4 is for foreground.
        """
        group = F.pad(self.group, (0, 1), value=2)  # background samples train their own column
        rare, common = sample_background(~samples.foreground, self.fractions)
        code = torch.arange(4, device=group.device)
        trained = torch.stack([code % 2 > 0, code > 1, code >= 0], dim=1)[:, group]  # (4, K + 1)
        bound = math.log(self.score_threshold / (1 - self.score_threshold))
        bounds = samples.logits.new_full((5, len(group)), bound)
        bounds[:4] = torch.where(trained, -torch.inf, torch.inf)
        return bounds, torch.where(samples.foreground, 4, rare.long() + 2 * common)

    def compute(self, samples: Samples) -> Tensor:
        return entry_losses(
            samples.logits,
            samples.labels.unsqueeze(1),  # every sample has a positive: background is column K
            _NegativeACSL(*self._bounds(samples)),
            lambda own: sigmoid_ce_loss(own, torch.ones_like(own)),
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()
