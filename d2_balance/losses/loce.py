"""LOCE's equilibrium loss: margins between classes follow how well each class is recognised.

    L = -log( s_y e^{z_y} / sum_k s_k e^{z_k} ) = CE(z + log s, y)

s_c is the mean probability softmax(z)_c that samples of class c get. A well recognised class pushes
others down, a weak one is pushed less. With m objects of class c in a batch of all ranks,

    s_c <- a^m s_c + (1 - a^m) * mean over these objects of the mean score of the object's samples

before the loss of the batch; s of background is fixed. Scores at test time are softmax(z).

Source: Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection,
arXiv:2108.07507, section 3.3. Mean over samples. Its feature memory is
`d2_balance.modeling.roi_heads.feature_memory`; the release also counts the memory's samples in s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._samples import Samples

LEAST_SCORE = 1e-12  # a score that underflows to 0 has no logarithm


def equilibrium_loss(logits: Tensor, labels: Tensor, mean_score: Tensor) -> Tensor:
    """Softmax cross-entropy with the logits shifted by the logarithm of the mean scores.

    Args:
        logits: (R, K + 1), the last column background, or (R, K).
        labels: (R,) int64 in [0, K].
        mean_score: (K + 1,) in (0, 1].

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> equilibrium_loss(logits, torch.tensor([0, 1]), torch.tensor([0.9, 0.5, 0.1]))
        tensor([0.0418, 0.7458])
    """
    shift = mean_score[: logits.shape[1]].clamp(min=LEAST_SCORE).log().to(logits.dtype)
    return F.cross_entropy(logits + shift, labels, reduction="none")


def object_score_sums(
    scores: Tensor, labels: Tensor, gt_index: Tensor | None, num_classes: int
) -> Tensor:
    """Number of objects of each class, and the sum of their mean scores.

    Args:
        scores: (P,) probability of the own class.
        labels: (P,) int64 in [0, K).
        gt_index: (P,) int64 id of the sample's object; samples with a negative id are left out.
            None: every sample is an object of its own.
        num_classes: K.

    Returns:
        (2, K) float64.
    """
    weight = torch.ones_like(scores, dtype=torch.float64)
    if gt_index is not None:  # the samples of an object count as one
        ids = gt_index.sort().values
        after = torch.searchsorted(ids, gt_index, right=True)
        samples = after - torch.searchsorted(ids, gt_index)
        weight = (gt_index >= 0) / samples.double()
    values = torch.stack([weight, weight * scores.double()])  # (2, P)
    return values.new_zeros(2, num_classes).index_add_(1, labels, values)


@CLS_LOSSES.register("LOCE")
class LOCELoss(ClassificationLoss):
    """Equilibrium loss of LOCE (arXiv:2108.07507) for softmax RoI heads.

    Buffer `mean_score` (K + 1,) float64, from 0.01 on; counted across all ranks.

    Args:
        num_classes: K.
        momentum: a, fraction of the old mean score per object, in [0, 1].
        background_score: fixed mean score of background, in (0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> LOCELoss(num_classes=3)(logits, labels)
        tensor([0.0496, 0.6110])
    """

    elementwise = True
    activation = "softmax"

    mean_score: Tensor

    def __init__(
        self, *, num_classes: int, momentum: float = 0.9, background_score: float = 0.01
    ) -> None:
        super().__init__()
        check(self, "num_classes", num_classes, num_classes >= 1, "an integer of at least 1")
        check(self, "momentum", momentum, 0 <= momentum <= 1, "a number in [0, 1]")
        rule = "a number in (0, 1]"
        check(self, "background_score", background_score, 0 < background_score <= 1, rule)
        self.momentum = momentum
        self.num_classes = num_classes
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
