"""FCBL: foreground classification balance loss of BACL, with margins from what is confused.

    C_yj     = mean of softmax(z_1..K)_j over all samples of class y so far, at least 0.001
    delta_ij = alpha log(C_yj / C_jy)                          for a sample i of class y, j < K
    w_ij     = 1 if j = y, j = K, p_j >= p_y or p_j >= xi, else 0
    L        = sum_j w_ij BCE(z_ij + delta_ij, y_ij),  mean over samples

Column K is background, a task of its own without a margin. Background samples have no margins and
weights of 1. At test time, and in w, the score is p_j = sigmoid(z_j) (1 - sigmoid(z_background)).
A class that is taken for j more often than the other way round raises the logit of j in the loss.

Source: Qi et al., Balanced Classification: A Unified Framework for Long-Tailed Object Detection,
arXiv:2308.02213, section 3, and its released code. A batch meets the margins of the batches before
it. The feature hallucination of the paper is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.entries import entry_losses, softplus
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss
from .eqlv2 import objectness_probabilities

LEAST_CONFUSION = 1e-3


def fcbl_loss(
    logits: Tensor,
    labels: Tensor,
    margin: Tensor,
    score_threshold: float = 0.7,
    reweight: bool = True,
) -> Tensor:
    """Foreground classification balance loss of every column of every sample.

    Args:
        logits: (R, K + 1), the last column background.
        labels: (R,) int64 in [0, K].
        margin: (K, K), of a sample's class and of the column.
        score_threshold: xi, score from which a foreground sample trains another class, in (0, 1).
        reweight: whether foreground samples leave out classes of lower scores.

    Returns:
        (R, K + 1).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 3.0, -2.0]])
        >>> margin = torch.tensor([[0.0, 0.5, -0.5], [-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
        >>> fcbl_loss(logits, torch.tensor([0]), margin)
        tensor([[0.1269, 0.0000, 2.5789, 0.1269]])
    """
    target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    loss = sigmoid_ce_loss(logits + F.pad(margin, (0, 1, 0, 1))[labels], target)
    if not reweight:
        return loss
    score = objectness_probabilities(logits.detach())
    own = score.gather(1, labels.unsqueeze(1))
    kept = (score >= own) | (score >= score_threshold)
    kept[:, -1] = True
    return loss * (kept | (labels == len(margin)).unsqueeze(1))


def confusion_margin(confusion: Tensor, seen: Tensor, alpha: float) -> Tensor:
    """Margins between classes.

    Args:
        confusion: (K, K) sums of the scores of each class over the samples of each class.
        seen: (K,) samples of each class.
        alpha: factor of the margins.

    Returns:
        (K, K), 0 on the diagonal; in the type of `confusion`.
    """
    rate = (confusion / seen.clamp(min=1).unsqueeze(1)).clamp_(min=LEAST_CONFUSION).log_()
    return alpha * (rate - rate.t())


class _NegativeFCBL:
    """Cross-entropy of negatives with margins for `entry_losses`.

    Args:
        margin: (K + 1, K + 1).
        labels: (R,) int64 in [0, K].
        bound: (R, 1), the logit from which a class is trained.
    """

    def __init__(self, margin: Tensor, labels: Tensor, bound: Tensor) -> None:
        self.margin, self.labels, self.bound = margin, labels, bound

    def write(self, logits: Tensor, chunk: slice, value: Tensor, grad: Tensor | None) -> None:
        shifted = self.margin.index_select(0, self.labels[chunk]).add_(logits)
        trained = logits >= self.bound[chunk]
        trained[:, -1] = True
        softplus(shifted, out=value).mul_(trained)
        if grad is not None:
            torch.sigmoid(shifted, out=grad).mul_(trained)


@CLS_LOSSES.register("FCBL")
class FCBLLoss(ClassificationLoss):
    """Foreground classification balance loss (arXiv:2308.02213) for sigmoid RoI heads.

    Buffers, float64, summed across ranks and batches: `confusion` (K, K), the scores of each class
    over the samples of each class, and `seen` (K,), their number. For LVIS v1 they take 11.6 MB,
    which are all-reduced in each step. The authors train the RoI heads of a trained model.

    Args:
        num_classes: K.
        alpha: factor of the margins, at least 0.
        score_threshold: xi, score from which a foreground sample trains another class, in (0, 1).
        reweight: whether foreground samples leave out the classes with a score below xi and below
            that of their own.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 3.0, -2.0]])
        >>> FCBLLoss(num_classes=3)(logits, torch.tensor([0]))  # no margin before the first batch
        tensor([[0.1269, 0.0000, 3.0486, 0.1269]])
    """

    elementwise = True
    activation = "sigmoid"
    update_after = True

    confusion: Tensor
    seen: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float = 0.85,
        score_threshold: float = 0.7,
        reweight: bool = True,
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "alpha", alpha, alpha >= 0, "a number of at least 0")
        rule = "a number in (0, 1)"
        check(self, "score_threshold", score_threshold, 0 < score_threshold < 1, rule)
        self.alpha, self.score_threshold, self.reweight = alpha, score_threshold, reweight
        self.num_classes = num_classes
        sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)
        self.register_buffer("confusion", sums)
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.float64))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1

    @property
    def margin(self) -> Tensor:
        """(K, K) float64, see `confusion_margin`."""
        return confusion_margin(self.confusion, self.seen, self.alpha)

    @torch.no_grad()
    def batch_statistics(self, samples: Samples) -> tuple[Tensor, None]:
        """(K, K + 1): sums of scores by the sample's class, and in the last column its samples."""
        pos, num_classes = samples.pos, samples.num_classes
        scores = samples.logits[pos, :num_classes].double().softmax(dim=1)
        sums = scores.new_zeros(num_classes, num_classes + 1)
        return sums.index_add_(0, samples.labels[pos], F.pad(scores, (0, 1), value=1.0)), None

    def update(self, total: Tensor) -> None:
        self.confusion += total[:, :-1]
        self.seen += total[:, -1]

    def _bound(self, samples: Samples) -> Tensor:
        """(R, 1) logit from which a foreground sample trains a class; -inf for background."""
        if not self.reweight:
            return samples.logits.new_full((len(samples.labels), 1), -torch.inf)
        logits = samples.logits.detach()
        # both scores have the factor 1 - sigmoid(z_background); xi is divided by it
        needed = self.score_threshold * (1 + logits[:, -1:].exp())
        alone = torch.where(needed < 1, needed.logit(), torch.inf)
        own = logits.gather(1, samples.labels.unsqueeze(1))
        return torch.where(samples.foreground.unsqueeze(1), torch.minimum(own, alone), -torch.inf)

    def compute(self, samples: Samples) -> Tensor:
        margin = F.pad(self.margin.to(samples.logits.dtype), (0, 1, 0, 1))
        return entry_losses(
            samples.logits,
            samples.labels.unsqueeze(1),  # every sample has a positive: background is column K
            _NegativeFCBL(margin, samples.labels, self._bound(samples)),
            lambda own: sigmoid_ce_loss(own, torch.ones_like(own)),
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        return objectness_probabilities(logits)

    def log_values(self) -> dict[str, Tensor]:
        return {"recall": self.confusion.diagonal() / self.seen.clamp(min=1)}
