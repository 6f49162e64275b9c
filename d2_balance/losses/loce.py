"""LOCE's equilibrium loss: margins between classes follow how well each class is recognised.

    L = -log( s_y e^{z_y} / sum_k s_k e^{z_k} ) = CE(z + log s, y)

s_c is the mean probability softmax(z)_c that rows of class c get. A well recognised class pushes
others down, a weak one is pushed less. With m objects of class c in a batch of all ranks,

    s_c <- a^m s_c + (1 - a^m) * mean over these objects of the mean score of the object's rows

before the loss of the batch; s of background is fixed. Scores at test time are softmax(z).

Source: Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection,
arXiv:2108.07507, section 3.3. Mean over rows. Its feature memory is
`d2_balance.modeling.roi_heads.feature_memory`; the release also counts the rows of the memory in s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._samples import Samples

LEAST_SCORE = 1e-12  # a score that underflows to 0 has no logarithm


def equilibrium_loss(logits: Tensor, labels: Tensor, mean_score: Tensor) -> Tensor:
    """Softmax cross-entropy with the logits moved by the logarithm of the mean scores.

    Args:
        logits: (R, K + 1), the last column background.
        labels: (R,) int64 in [0, K].
        mean_score: (K + 1,) in (0, 1].

    Returns:
        (R,).
    """
    shift = mean_score.clamp(min=LEAST_SCORE).log().to(logits.dtype)
    return F.cross_entropy(logits + shift, labels, reduction="none")


def object_score_sums(
    scores: Tensor, labels: Tensor, gt_index: Tensor | None, num_classes: int
) -> Tensor:
    """Number of objects of each class, and the sum of their mean scores.

    Args:
        scores: (P,) probability of the own class.
        labels: (P,) int64 in [0, K).
        gt_index: (P,) int64 id of the row's object; rows with a negative id are left out. None:
            every row is an object of its own.
        num_classes: K.

    Returns:
        (2, K) float64.
    """
    share = torch.ones_like(scores, dtype=torch.float64)
    if gt_index is not None:  # each row counts as one part of its object
        ids = gt_index.sort().values
        after = torch.searchsorted(ids, gt_index, right=True)
        rows = after - torch.searchsorted(ids, gt_index)
        share = (gt_index >= 0) / rows.double()
    parts = torch.stack([share, share * scores.double()])  # (2, P)
    return parts.new_zeros(2, num_classes).index_add_(1, labels, parts)


@CLS_LOSSES.register("LOCE")
class LOCELoss(ClassificationLoss):
    """Equilibrium loss of LOCE (arXiv:2108.07507) for softmax RoI heads.

    Buffer `mean_score` (K + 1,) float64, from 0.01 on; counted across all ranks.

    Args:
        num_classes: K.
        momentum: a, share of the old mean score per object, in [0, 1].
        background_score: fixed mean score of background, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    elementwise = True
    activation = "softmax"

    def __init__(
        self, *, num_classes: int, momentum: float = 0.9, background_score: float = 0.01
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "momentum", momentum, 0 <= momentum <= 1, "a number in [0, 1]")
        rule = "a number in (0, 1]"
        check(self, "background_score", background_score, 0 < background_score <= 1, rule)
        self.momentum = momentum
        score = torch.full((num_classes + 1,), 0.01, dtype=torch.float64)
        score[-1] = background_score
        self.register_buffer("mean_score", score)

    def batch_statistics(self, samples: Samples) -> tuple[Tensor, None]:
        """(2, K): objects of each class, sum of their mean scores."""
        labels = samples.labels[samples.pos]
        probs = samples.logits[samples.pos].softmax(dim=1)
        scores = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        return object_score_sums(scores, labels, samples.gt_index, samples.num_classes), None

    def update(self, total: Tensor) -> None:
        count, score = total
        kept = self.momentum**count
        mean = score / count.clamp(min=1e-12)
        self.mean_score[:-1].mul_(kept).add_((1 - kept) * mean)

    def compute(self, samples: Samples) -> Tensor:
        return equilibrium_loss(samples.logits, samples.labels, self.mean_score)

    def log_values(self) -> dict[str, Tensor]:
        return {"mean_score": self.mean_score}
