"""BAGS: balanced group softmax, where classes compete with classes of about their own size.

Foreground classes form groups G_1 ... G_n by their number of training objects. Each group
has an output "others" of its own, and one more group tells object from background:

    L = sum over groups g of  (1 / |U_g|) sum_{i in U_g} -log softmax_g(z_i)[target_g(i)]

    target_g(i)   the class of sample i, if it is in g; "others" in all other groups; object or
                  background in the last group
    U_g           the samples of g's classes, and beta times as many sampled from its "others";
                  all samples in the last group. A group without a sample of its classes adds
                  nothing.

    score of class j in group g:  softmax_g(z)[j] * p_object,    of background:  p_background

Source: Li et al., Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced
Group Softmax, arXiv:2006.10408, section 3.2. Each rank samples and averages by itself.

G: groups of classes. C = K + G + 2 columns: K classes, G "others", object, background.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ._base import CLS_LOSSES, ClassificationLoss, check
from ._kernels.chunks import map_chunks
from ._kernels.entries import total_of, with_grad
from ._samples import Samples


def group_targets(labels: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """The column that each sample should choose in each group.

    Args:
        labels: (R,) int64 in [0, K]; K is background.
        group: (K,) int64 in [0, G), the group of each class.
        num_groups: G.

    Returns:
        (R, G + 1) int64 in [0, C).
    """
    num_classes = len(group)
    foreground = labels < num_classes
    own = group[labels.clamp(max=num_classes - 1)].masked_fill(~foreground, -1)  # (R,)
    groups = torch.arange(num_groups, device=labels.device)
    inside = own.unsqueeze(1) == groups  # (R, G)
    columns = torch.where(inside, labels.unsqueeze(1), num_classes + groups)
    last = num_classes + num_groups + (~foreground).long()
    return torch.cat([columns, last.unsqueeze(1)], dim=1)


@torch.no_grad()
def sample_others(inside: Tensor, beta: float) -> Tensor:
    """Sample what trains each group: its classes, and beta times as many others at random.

    Args:
        inside: (R, G) bool, whether the class of the sample is in the group.
        beta: others per sample of the group, at least 0; their number is rounded down.

    Returns:
        (R, G) bool.
    """
    key = torch.rand(inside.shape, device=inside.device).masked_fill(inside, torch.inf)
    rank = key.argsort(dim=0).argsort(dim=0)  # among the keys of the group
    wanted = (inside.sum(dim=0) * beta).floor()
    return inside | (rank < wanted)


def group_softmax_loss(logits: Tensor, target: Tensor, member: Tensor, used: Tensor) -> Tensor:
    """Sum over groups of the mean cross-entropy of the samples that the group uses.

    Args:
        logits: (R, C).
        target: (R, G + 1) int64 in [0, C), a column of each group.
        member: (G + 1, C) bool, the columns of each group, at least one.
        used: (R, G + 1) bool.

    Returns:
        0-d tensor.

    Example:
        >>> logits, target = torch.zeros(2, 5), torch.tensor([[0, 3], [2, 4]])
        >>> member = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
        >>> group_softmax_loss(logits, target, member, torch.ones(2, 2, dtype=torch.bool))
        tensor(1.7918)
    """
    log_sum = logits.unsqueeze(1).masked_fill(~member, -torch.inf).logsumexp(dim=2)  # (R, G + 1)
    # masked_fill would hide the NaN of a sample that is not used, but not its gradient
    loss = (log_sum - logits.gather(1, target)) * used
    return (loss.sum(dim=0) / used.sum(dim=0).clamp(min=1)).sum()


def _arrange_loaded(loss: BAGSLoss, _: object) -> None:
    """Called after `load_state_dict`; not a lambda, which could not be pickled with the loss."""
    loss._arrange()


@CLS_LOSSES.register("BAGS")
class BAGSLoss(ClassificationLoss):
    """Balanced group softmax (arXiv:2006.10408) for softmax RoI heads.

    The release trains only the last classifier layer of a trained model; see
    MODEL.BALANCE.TRAINABLE.

    Args:
        instance_count: (K,) training objects of each class.
        cuts: least number of objects of every group but the first, rising, at least 1.
        beta: samples of other classes per sample of the group's own classes, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> loss = BAGSLoss(instance_count=[5000, 50, 5])
        >>> loss.num_outputs(3)  # 3 classes, 4 times "others", object and background
        9
        >>> loss(torch.zeros(2, 9), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    elementwise = False
    class_logits = False
    activation = "softmax"
    all_reduced = False

    instance_count: Tensor
    group: Tensor
    member: Tensor
    order: Tensor

    def __init__(
        self,
        *,
        instance_count: Tensor | Sequence[float],
        cuts: Sequence[int] = (10, 100, 1000),
        beta: float = 8.0,
    ) -> None:
        super().__init__()
        count = torch.as_tensor(instance_count, dtype=torch.float64)
        rule = "K counts of at least 0"
        check(self, "instance_count", instance_count, bool((count >= 0).all()), rule)
        edges = [0, *cuts]
        rising = all(a < b for a, b in pairwise(edges))
        check(self, "cuts", cuts, rising, "rising numbers of at least 1")
        check(self, "beta", beta, beta >= 0, "a number of at least 0")
        self.beta, self.num_groups, self.num_classes = beta, len(edges), len(count)
        group = torch.bucketize(count, torch.tensor(cuts, dtype=torch.float64), right=True)
        groups = torch.arange(self.num_groups)
        owner = torch.cat([group, groups, groups.new_full((2,), self.num_groups)])  # (C,)
        self.register_buffer("instance_count", count)
        self.register_buffer("group", group)
        self.register_buffer("member", owner == torch.arange(self.num_groups + 1).unsqueeze(1))
        self.register_buffer("order", torch.empty_like(owner), persistent=False)
        self._arrange()
        self.register_load_state_dict_post_hook(_arrange_loaded)

    def _arrange(self) -> None:
        """Order the columns by group; the groups come with a checkpoint, too."""
        self.order.copy_(self.member.long().argmax(dim=0).argsort(stable=True))  # (C,)
        self._sizes = self.member.sum(dim=1).tolist()

    def _by_group(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Bring the columns of each group side by side.

        Returns:
            (R, C) logits, the groups as (R, c) views of them, and (R, G + 1) log sum exp.
        """
        ordered = logits.index_select(1, self.order)
        groups = ordered.split(self._sizes, dim=1)
        return ordered, groups, torch.stack([group.logsumexp(dim=1) for group in groups], dim=1)

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + self.num_groups + 2

    def column_counts(self, num_classes: int) -> tuple[int, ...]:
        return (self.num_outputs(num_classes),)

    def compute(self, samples: Samples) -> Tensor:
        target = group_targets(samples.labels, self.group, self.num_groups)
        used = sample_others(target[:, :-1] < samples.num_classes, self.beta)
        used = torch.cat([used, torch.ones_like(target[:, -1:], dtype=torch.bool)], dim=1)
        return with_grad(
            samples.logits, *self._value_and_grad(samples.logits.detach(), target, used)
        )

    @torch.no_grad()
    def _value_and_grad(
        self, logits: Tensor, target: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`group_softmax_loss` and its (R, C) derivative, chunk by chunk."""
        weight = used.to(logits.dtype) / used.sum(dim=0).clamp(min=1)  # (R, G + 1)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        back = self.order.argsort()

        def work(chunk: slice) -> Tensor:
            ordered, groups, log_sum = self._by_group(logits[chunk])
            weights = weight[chunk].split(1, dim=1)
            for group, total, factor in zip(groups, log_sum.split(1, dim=1), weights, strict=True):
                group.sub_(total).exp_().mul_(factor)
            torch.index_select(ordered, 1, back, out=grad[chunk])
            return ((log_sum - logits[chunk].gather(1, target[chunk])) * weight[chunk]).sum()

        value = total_of(map_chunks(work, logits), logits.new_zeros(()))
        return value, grad.scatter_add_(1, target, -weight)

    def probabilities(self, logits: Tensor) -> Tensor:
        _, _, log_sum = self._by_group(logits)
        classes = (logits[:, : len(self.group)] - log_sum[:, self.group]).exp()  # (R, K)
        objectness = logits[:, -2:].softmax(dim=1)  # (R, 2), object and background
        return torch.cat([classes * objectness[:, :1], objectness[:, 1:]], dim=1)
