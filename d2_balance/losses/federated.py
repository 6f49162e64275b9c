"""Federated loss: each image trains only some classes.

    L = (1/R) sum_i sum_{j in S_n(i)} BCE(z_ij, y_ij)

S_n holds the classes present in the batch and the classes that annotators verified in image n, and
is filled up to `num_sampled` foreground classes by sampling without replacement with probability
proportional to image_count^power. Background is not in it. More present classes than `num_sampled`
are all kept. A class that is not annotated exhaustively in image n trains its positives there and
no negatives, which may be objects without an annotation.

The softmax form, which is ours, leaves the other classes out of the sum; background stays:

    L = -(1/R) sum_i log( e^{z_y} / sum_{k in S_n(i), k = y or k = K} e^{z_k} )

Source: Zhou et al., Probabilistic Two-Stage Detection, arXiv:2103.07461, appendix D; image-level
labels: Gupta et al., LVIS, arXiv:1908.03195, section 3. Mean over samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._base import CLS_LOSSES, Activation, ClassificationLoss, check
from ._kernels.softmax import softmax_losses
from ._samples import Samples
from .cross_entropy import sigmoid_ce_loss, weighted_ce
from .eql import uses_image_labels


@torch.no_grad()
def federated_classes(required: Tensor, weight: Tensor, num_sampled: int) -> Tensor:
    """Sample the classes of each image.

    Args:
        required: (N, K) bool, classes that are always chosen.
        weight: (K,) at least 0, how likely a class is sampled; 0: never.
        num_sampled: classes per image, at least 1.

    Returns:
        (N, K) bool.
    """
    noise = -torch.empty_like(required, dtype=torch.float32).exponential_().log()  # Gumbel
    score = (weight.log().float() + noise).masked_fill(required, torch.inf)
    chosen = score.topk(min(num_sampled, required.shape[1]), dim=1).indices
    sampled = torch.zeros_like(required).scatter_(1, chosen, True)
    return (sampled & (weight > 0)) | required


def federated_loss(logits: Tensor, onehot: Tensor, chosen: Tensor) -> Tensor:
    """Federated loss of every class of every sample, for the classes of `federated_classes`.

    Args:
        logits: (R, K).
        onehot: (R, K) in {0, 1}.
        chosen: (R, K) or (K,) bool, classes whose negatives train.

    Returns:
        (R, K).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> onehot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> federated_loss(logits, onehot, chosen=torch.tensor([True, True, False]))
        tensor([[0.1269, 0.3133, 0.0000],
                [0.6931, 0.9741, 0.0000]])
    """
    return sigmoid_ce_loss(logits, onehot) * (chosen | (onehot > 0))


def federated_softmax_loss(logits: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Softmax cross-entropy over some classes, for the classes of `federated_classes`.

    Args:
        logits: (R, K + 1), the last column background, or (R, K).
        labels: (R,) int64.
        chosen: (R, K) or (K,) bool, classes that stay in the sum; background and the own class do.

    Returns:
        (R,).

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0, 0.5], [0.0, 0.5, -2.0, 1.0]])
        >>> chosen = torch.tensor([False, True, False])
        >>> federated_softmax_loss(logits, torch.tensor([0, 3]), chosen)
        tensor([0.2413, 0.4741])
    """
    shift = torch.zeros_like(chosen, dtype=logits.dtype).masked_fill(~chosen, -torch.inf)
    shift = F.pad(shift, (0, logits.shape[1] - shift.shape[-1])).expand_as(logits)
    shift = shift.scatter(1, labels.unsqueeze(1), 0.0)
    return F.cross_entropy(logits + shift, labels, reduction="none")


@CLS_LOSSES.register("Federated")
class FederatedLoss(ClassificationLoss):
    """Federated loss (arXiv:2103.07461) for sigmoid RoI heads.

    Args:
        class_count: (K,) training images of each class.
        num_sampled: foreground classes per image, at least 1.
        power: exponent of the image count, at least 0.
        use_image_level_labels: "always" takes the classes verified in the image, and no negatives
            of those that are not annotated exhaustively there; "never" does not; "auto" does so if
            the data have such labels.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 3])
        >>> FederatedLoss(class_count=[90, 9, 1])(logits, labels)
        tensor([[0.1269, 0.3133, 0.6931],
                [0.6931, 0.9741, 0.1269]])
    """

    elementwise = True
    activation: Activation = "sigmoid"
    all_reduced = False

    weight: Tensor

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
        self.num_sampled, self.num_classes = num_sampled, len(count)
        self.use_image_level_labels = uses_image_labels(self, use_image_level_labels)
        self.register_buffer("weight", count.pow(power) * (count > 0))

    def classes(self, samples: Samples) -> Tensor:
        """(1 or N, K) bool, the classes of which negatives train, sampled for this batch."""
        required = samples.class_counts.unsqueeze(0) > 0  # (1, K)
        if self.use_image_level_labels and samples.verified is not None:
            required = required | samples.verified
        chosen = federated_classes(required, self.weight, self.num_sampled)  # (1 or N, K)
        if self.use_image_level_labels and samples.not_exhaustive is not None:
            chosen = chosen & ~samples.not_exhaustive
        return chosen

    def compute(self, samples: Samples) -> Tensor:
        chosen = self.classes(samples).to(samples.logits.dtype)
        image = samples.image_index
        if len(chosen) == 1 or image is None:
            own = chosen[0][samples.column]
            return weighted_ce(samples, chosen[0], torch.maximum(own, samples.hit))
        own = chosen[image, samples.column.squeeze(1)].unsqueeze(1)
        weight = torch.maximum(own, samples.hit)  # positives always train
        return weighted_ce(samples, lambda chunk: chosen[image[chunk]], weight)


@CLS_LOSSES.register("FederatedSoftmax")
class FederatedSoftmaxLoss(FederatedLoss):
    """Softmax form of the federated loss (arXiv:2103.07461) for softmax RoI heads.

    Args:
        class_count: (K,) training images of each class.
        num_sampled: foreground classes per image, at least 1.
        power: exponent of the image count, at least 0.
        use_image_level_labels: "always" takes the classes verified in the image, and leaves those
            that are not annotated exhaustively there out of the sums of other samples; "never" does
            not; "auto" does so if the data have such labels.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, -2.0]])
        >>> labels = torch.tensor([0, 1])
        >>> FederatedSoftmaxLoss(class_count=[90, 9, 1])(logits, labels)
        tensor([0.1698, 0.5239])
    """

    activation = "softmax"

    def compute(self, samples: Samples) -> Tensor:
        logits, labels = samples.logits, samples.labels.unsqueeze(1)
        hidden = ~self.classes(samples)
        shift = torch.zeros_like(hidden, dtype=logits.dtype).masked_fill_(hidden, -torch.inf)
        shift = F.pad(shift, (0, logits.shape[1] - samples.num_classes))  # (1 or N, C)
        image = samples.image_index
        if len(shift) == 1 or image is None:
            image = torch.zeros_like(samples.labels)

        def moved(logits: Tensor, chunk: slice) -> Tensor:
            return shift.index_select(0, image[chunk]).scatter_(1, labels[chunk], 0.0).add_(logits)

        return softmax_losses(logits, samples.labels, moved)
