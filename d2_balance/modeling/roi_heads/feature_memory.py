"""Memory-augmented feature sampling of LOCE: features of weak classes that train once more.

A queue per class keeps pooled RoI features of positives. Each training step samples some classes
with probability proportional to 1 / s_c, s_c the mean score of the class (see `LOCE`), without
replacement, and some entries of each. These memory samples join the batch before the box head and
train box head and classifier; they have no box to learn.

Source: Feng et al., arXiv:2108.07507, section 3.4. The release pools jittered ground truth boxes
for the memory, and trains their boxes as well; here the positives of the batch are kept.

A step: `append_memory_samples`, a hook before the box head, adds M memory samples; the output
layers hand their scores back in `split`; `join` adds them to the samples of the loss; `remember`
keeps the positives.

Ranks: each rank keeps what it saw and samples for itself. A checkpoint has the entries of the first
rank, and a resumed run starts with these on all ranks. The mean scores are those of all ranks.

Memory samples of empty queues are zeros of weight 0. A box head with batch norm would count them.

L: entries per class. M: memory samples of a step, classes_per_step * features_per_class.
C, h, w: feature shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from d2_balance.losses import BOX_LOSSES, LOCELoss, Samples
from d2_balance.losses._base import check
from d2_balance.losses._kernels.ranks import rank_within
from d2_balance.losses.loce import LEAST_SCORE

from ..criterion import SampleNormalizer

KEY = "MODEL.BALANCE.LOCE_MEMORY"


@dataclass
class MemorySamples:
    """The memory samples that were added to a batch.

    Args:
        pooled: (R, C, h, w) features of the samples of the batch itself, detached.
        labels: (M,) int64 in [0, K).
        weight: (M,) 1, or 0 if the queue of the class was empty.
        scores: (M, K + 1) logits, once the output layers have run.
    """

    pooled: Tensor
    labels: Tensor
    weight: Tensor
    scores: Tensor | None = None


class FeatureMemory(nn.Module):
    """Queues of pooled RoI features, one per class, all of the same length.

    Buffers: `features` (K * L + 1, C, h, w) float16, class by class, the last entry always zero;
    `count` (K,) entries of each class; `pointer` (K,) where the next entry goes.

    Args:
        num_classes: K.
        feature_shape: C, h, w.
        capacity: entries of all classes together, at least K.
        per_class: entries of one class at most, at least 1; L = min(per_class, capacity // K).
        classes_per_step: classes sampled in a step, at least 1, limited to K.
        features_per_class: entries sampled of each of them with replacement, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """

    features: Tensor
    count: Tensor
    pointer: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        feature_shape: Sequence[int],
        capacity: int = 4096,
        per_class: int = 80,
        classes_per_step: int = 8,
        features_per_class: int = 4,
    ) -> None:
        super().__init__()
        rule = f"an integer of at least {num_classes}, one entry per class"
        check(self, "capacity", capacity, capacity >= num_classes, rule)
        check(self, "per_class", per_class, per_class >= 1, "an integer of at least 1")
        rule = "an integer of at least 1"
        check(self, "classes_per_step", classes_per_step, classes_per_step >= 1, rule)
        check(self, "features_per_class", features_per_class, features_per_class >= 1, rule)
        self.length = min(per_class, capacity // num_classes)
        self.classes_per_step = min(classes_per_step, num_classes)
        self.features_per_class = features_per_class
        entries = num_classes * self.length + 1
        self.register_buffer("features", torch.zeros(entries, *feature_shape, dtype=torch.float16))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64))
        self.batch: MemorySamples | None = None

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Append entries; they replace the oldest of a full class.

        Args:
            features: (P, C, h, w).
            labels: (P,) int64 in [0, K).
        """
        if not len(labels):
            return
        new = torch.zeros_like(self.count).index_add_(0, labels, torch.ones_like(labels))
        slot = self.slots(labels, new)
        most = torch.finfo(self.features.dtype).max
        self.features.index_copy_(0, slot, features.clamp(-most, most).to(self.features.dtype))
        self.features[-1].zero_()
        self.pointer.add_(new).remainder_(self.length)
        self.count.add_(new).clamp_(max=self.length)

    def slots(self, labels: Tensor, new: Tensor) -> Tensor:
        """Where entries go: (P,) indices of `features`, none of them twice but the last one.

        More entries of a class than it has room for: the last ones stay, the others go to the last
        slot. Which of two writes to one slot wins is not defined on a GPU.

        Args:
            labels: (P,) int64 in [0, K).
            new: (K,) how many of them each class has.
        """
        rank: Tensor = rank_within(labels, torch.arange(len(labels), device=labels.device))
        slot = labels * self.length + (self.pointer[labels] + rank) % self.length
        dropped = torch.lt(rank, new[labels] - self.length)
        return slot.masked_fill(dropped, len(self.features) - 1)

    @torch.no_grad()
    def sample(self, mean_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample entries for a step.

        Args:
            mean_score: (K,) at least 0.

        Returns:
            Features (M, C, h, w) float16, labels (M,), and weights (M,), 0 if no class with an
            entry was left to sample.
        """
        score = mean_score.float().clamp(min=LEAST_SCORE)
        gumbel = -torch.empty_like(score).exponential_().log()
        key = (gumbel - score.log()).masked_fill(self.count == 0, -torch.inf)
        classes = key.topk(self.classes_per_step).indices.unsqueeze(1)  # (n, 1)
        filled = self.count[classes]
        slot = torch.rand(len(classes), self.features_per_class, device=score.device) * filled
        slot = torch.minimum(slot.long(), (filled - 1).clamp(min=0))  # rounding may reach `filled`
        labels = classes.expand_as(slot).flatten()
        weight = (filled > 0).expand_as(slot).flatten().float()
        return self.features[labels * self.length + slot.flatten()], labels, weight

    def split(self, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the scores of memory samples; return those of the batch itself, and its deltas."""
        if self.batch is None or self.batch.scores is not None:
            return scores, deltas
        count = len(self.batch.pooled)
        self.batch.scores = scores[count:]
        return scores[:count], deltas[:count]

    def join(self, samples: Samples) -> Samples:
        """The samples with the memory samples behind them.

        Memory samples have negative ids of objects, which no statistic counts, and a box that is
        predicted exactly and has no gradient.
        """
        added = self.batch
        if added is None or added.scores is None:
            return samples
        labels, deltas, gt_boxes = added.labels, samples.pred_deltas, samples.gt_boxes
        assert samples.boxes is not None and deltas is not None and gt_boxes is not None
        weight, ids = samples.sample_weight, samples.gt_index
        if weight is None:
            weight = added.weight.new_ones(len(samples.labels))
        if ids is None:
            ids = torch.arange(len(samples.boxes), device=labels.device)
        box = torch.zeros(len(labels), 4, device=labels.device)
        box[:, 2:] = 1
        own = -1 - torch.arange(len(labels), device=labels.device)
        fields: dict[str, Any] = {
            "logits": (samples.logits, added.scores),
            "labels": (samples.labels, labels),
            "image_index": (samples.image_index, torch.zeros_like(labels)),
            "sample_weight": (weight, added.weight.to(weight.dtype)),
            "pred_deltas": (deltas, deltas.new_zeros(box.shape)),
            "boxes": (samples.boxes, box.to(samples.boxes.dtype)),
            "gt_boxes": (gt_boxes, box.to(gt_boxes.dtype)),
            "gt_index": (ids, own),
        }
        joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in fields.items()}
        return dataclasses.replace(samples, **joined)

    def remember(self, samples: Samples) -> None:
        """Keep the positives of the batch itself; `samples` has no memory samples."""
        if self.batch is not None:
            self.push(self.batch.pooled[samples.pos], samples.labels[samples.pos])
            self.batch = None


def append_memory_samples(
    memory: FeatureMemory, loss: LOCELoss, head: nn.Module, inputs: tuple[Tensor]
) -> tuple[Tensor] | None:
    """Hook before a box head; idle in evaluation and under `no_grad` (the mining pass of OHEM)."""
    memory.batch = None
    if not (head.training and torch.is_grad_enabled()):
        return None
    (pooled,) = inputs
    features, labels, weight = memory.sample(loss.mean_score[:-1])
    memory.batch = MemorySamples(pooled.detach(), labels, weight)
    return (torch.cat([pooled, features.to(pooled.dtype)]),)


class UsedSampleNormalizer(SampleNormalizer):
    """Number of samples with a weight above 0: those of empty queues do not count."""

    def count(self, samples: Samples) -> Tensor:
        if samples.sample_weight is None:
            return super().count(samples)
        return (samples.sample_weight > 0).sum()


def check_memory(cfg: CfgNode) -> None:
    """Refuse a memory without the loss that it belongs to.

    Raises:
        ValueError: naming both keys.
    """
    loss = cfg.MODEL.BALANCE.CLS_LOSS
    if cfg.MODEL.BALANCE.LOCE_MEMORY.ENABLED and loss != "LOCE":
        raise ValueError(
            f"{KEY}.ENABLED True samples by the mean scores of the loss LOCE and "
            f"MODEL.BALANCE.CLS_LOSS is {loss!r}; must be LOCE, or {KEY}.ENABLED False."
        )


def build_memories(cfg: CfgNode, roi_heads: Any, shapes: Mapping[str, ShapeSpec]) -> None:
    """Give the output layers of RoI heads their memories, as MODEL.BALANCE.LOCE_MEMORY says.

    Args:
        cfg: full config.
        roi_heads: standard or cascade RoI heads of this package; changed in place.
        shapes: shapes of the backbone's features.

    Raises:
        ValueError: naming the key and what it must be.
    """
    node = cfg.MODEL.BALANCE.LOCE_MEMORY
    check_memory(cfg)
    if not node.ENABLED:
        return
    layers: Any = getattr(roi_heads, "box_predictor", None)
    pairs = [(getattr(roi_heads, "box_head", None), layers)]
    if isinstance(layers, nn.ModuleList):
        pairs = list(zip(roi_heads.box_head, layers, strict=True))
    for head, layer in pairs:
        if head is None or not isinstance(getattr(layer, "cls_loss", None), LOCELoss):
            raise ValueError(
                f"{KEY}.ENABLED True needs MODEL.ROI_HEADS.NAME BalancedStandardROIHeads or "
                f"BalancedCascadeROIHeads, not {type(roi_heads).__name__}."
            )
        shape = shapes[roi_heads.box_in_features[0]].channels, *roi_heads.box_pooler.output_size
        arguments = {name.lower(): value for name, value in node.items() if name != "ENABLED"}
        try:
            memory = FeatureMemory(
                num_classes=roi_heads.num_classes, feature_shape=shape, **arguments
            )
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error
        add_memory(head, layer, memory)


def add_memory(head: nn.Module, layers: Any, memory: FeatureMemory) -> None:
    """Connect a memory with a box head and its `BalancedFastRCNNOutputLayers`.

    Raises:
        ValueError: the box loss, a reweighter or guided scaling compares the boxes of positives.
    """
    if not layers.box_loss.elementwise:
        allowed = sorted(name for name, loss in BOX_LOSSES if loss.elementwise)
        raise ValueError(
            f"{KEY}.ENABLED True adds samples without a box and BOX_LOSS "
            f"{layers.box_loss.name} counts all samples; BOX_LOSS that work: "
            f"{', '.join(allowed)}."
        )
    users = [f"REWEIGHTERS {reweighter.name}" for reweighter in layers.reweighters]
    users += [] if layers.guided is None else ["GUIDED_SCALE"]
    if users:
        raise ValueError(
            f"{KEY}.ENABLED True adds samples without a box and MODEL.BALANCE.{users[0]} "
            "compares the boxes of positives; switch one of them off."
        )
    layers.memory = memory
    layers.normalizer = UsedSampleNormalizer()
    head.register_forward_pre_hook(partial(append_memory_samples, memory, layers.cls_loss))
