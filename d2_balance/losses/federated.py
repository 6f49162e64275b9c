"""Federated loss: each image trains only some classes.

    L = (1/R) sum_i sum_{j in S_n(i)} BCE(z_ij, y_ij)

S_n holds the classes present in the batch and the classes that annotators verified in image n, and
is filled up to `num_sampled` foreground classes by drawing without replacement with probability
proportional to image_count^power. Background takes no place in it. More present classes than
`num_sampled` are all kept; with fewer classes than `num_sampled` all take part. A class that is not
annotated exhaustively in image n trains its positive rows there and no negatives, which may be
objects that nobody marked.

Source: Zhou et al., Probabilistic Two-Stage Detection, arXiv:2103.07461, appendix D; image-level
labels: Gupta et al., LVIS, arXiv:1908.03195, section 3. Mean over rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._samples import Samples
from .cross_entropy import weighted_ce
from .eql import uses_image_labels


@torch.no_grad()
def federated_classes(required: Tensor, weight: Tensor, num_sampled: int) -> Tensor:
    """Draws the classes of each image.

    Args:
        required: (N, K) bool, classes that take part in any case.
        weight: (K,) at least 0, how likely a class is drawn; 0: never.
        num_sampled: classes per image, at least 1.

    Returns:
        (N, K) bool.
    """
    noise = -torch.empty_like(required, dtype=torch.float32).exponential_().log()  # Gumbel
    score = (weight.log().float() + noise).masked_fill(required, torch.inf)
    chosen = score.topk(min(num_sampled, required.shape[1]), dim=1).indices
    drawn = torch.zeros_like(required).scatter_(1, chosen, True)
    return (drawn & (weight > 0)) | required


@CLS_LOSSES.register("Federated")
class FederatedLoss(ClassificationLoss):
    """Federated loss (arXiv:2103.07461) for sigmoid RoI heads.

    Args:
        class_count: (K,) training images of each class.
        num_sampled: foreground classes that take part per image, at least 1.
        power: exponent of the image count, at least 0.
        use_image_level_labels: "always" takes the classes verified in the image, and no negatives
            of those that are not annotated exhaustively there; "never" does not; "auto" does so if
            the data have such labels.

    Raises:
        ValueError: an argument is out of range.
    """

    elementwise = True
    activation = "sigmoid"
    all_reduced = False

    def __init__(
        self,
        *,
        class_count: Tensor | Sequence[float],
        num_sampled: int = 50,
        power: float = 0.5,
        use_image_level_labels: bool | str = "auto",
    ) -> None:
        super().__init__()
        count = torch.as_tensor(class_count, dtype=torch.float64)
        check(self, "class_count", class_count, bool((count >= 0).all()), "K counts of at least 0")
        check(self, "num_sampled", num_sampled, num_sampled >= 1, "an integer of at least 1")
        check(self, "power", power, power >= 0, "a number of at least 0")
        self.num_sampled = num_sampled
        self.use_image_level_labels = uses_image_labels(self, use_image_level_labels)
        self.register_buffer("weight", count.pow(power) * (count > 0))

    def compute(self, samples: Samples) -> Tensor:
        required = samples.class_counts.unsqueeze(0) > 0  # (1, K)
        if self.use_image_level_labels and samples.verified is not None:
            required = required | samples.verified
        chosen = federated_classes(required, self.weight, self.num_sampled)  # (1 or N, K)
        if self.use_image_level_labels and samples.not_exhaustive is not None:
            chosen = chosen & ~samples.not_exhaustive
        chosen = chosen.to(samples.logits.dtype)  # whose negatives train
        if len(chosen) == 1 or samples.image_index is None:
            own = chosen[0][samples.column]
            return weighted_ce(samples, chosen[0], torch.maximum(own, samples.hit))
        own = chosen[samples.image_index, samples.column.squeeze(1)].unsqueeze(1)
        weight = torch.maximum(own, samples.hit)  # positives always train
        return weighted_ce(samples, lambda rows: chosen[samples.image_index[rows]], weight)
