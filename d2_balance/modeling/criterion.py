"""Weight, sum and normalise the losses of a head.

    loss_cls     = cls_weight * sum(sample weight * elementwise loss) / normaliser
    loss_box_reg = box_weight * sum(positive weight * elementwise loss) / normaliser

and with guided loss scaling, last of all, loss_cls = guided(loss_cls, loss_box_reg).

A loss that ranks or normalises over a set is used as it is, times its weight. Normalisers count
across all ranks and are divided by the number of ranks: Detectron2 averages gradients across ranks,
and the average then equals one process on the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2_balance.losses import BoxLoss, ClassificationLoss, Samples
from d2_balance.losses._base import per_sample
from d2_balance.reweight import GuidedScale, Reweighter
from d2_balance.sampling import AnchorSampler
from d2_balance.sampling.hard_negatives import positives_per_image
from d2_balance.utils.distributed import sum_across_ranks, world_size

Watcher = Callable[[Samples, tuple[Any, ...], Tensor, Tensor], None]


class Normalizer(nn.Module):
    """Denominator of elementwise losses, counted across all ranks.

    Subclasses `count` a batch and keep the sum across ranks in `update`; `value` is the denominator
    for one rank.
    """

    watcher: Watcher | None = None
    """Sees every batch of the head, see `watched`."""

    def count(self, samples: Samples) -> Tensor:
        """0-d count of this rank's batch."""
        raise NotImplementedError

    def update(self, total: Tensor) -> None:
        """Take the count summed across ranks."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """0-d denominator for this rank, above 0."""
        raise NotImplementedError


class SampleNormalizer(Normalizer):
    """Number of samples R: Fast R-CNN's denominator (see Detectron2's `box_reg_loss` for why)."""

    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("samples", torch.ones((), dtype=torch.float64), persistent=False)

    def count(self, samples: Samples) -> Tensor:
        return torch.full_like(self.samples, len(samples.labels))

    def update(self, total: Tensor) -> None:
        self.samples.copy_(total.clamp(min=1))

    def value(self) -> Tensor:
        return self.samples / world_size()


class PositiveNormalizer(SampleNormalizer):
    """Number of positives in the batch, of all ranks: a mean over positives."""

    def count(self, samples: Samples) -> Tensor:
        return samples.foreground.sum()


class ImagePositives(SampleNormalizer):
    """Number of positives of all ranks, each image with at least one: with an anchor sampler."""

    def count(self, samples: Samples) -> Tensor:
        return positives_per_image(samples).clamp(min=1).sum()


class PositiveEMA(Normalizer):
    """Moving average of the number of positives: RetinaNet's denominator.

    Detectron2 keeps it as a float of each rank that a resumed run forgets; here it is a buffer,
    counted across all ranks.

    Args:
        initial: value before the first batch.
        momentum: fraction of the old value, in [0, 1).
    """

    loss_normalizer: Tensor

    def __init__(self, initial: float = 100.0, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("loss_normalizer", torch.tensor(initial, dtype=torch.float64))

    def count(self, samples: Samples) -> Tensor:
        return samples.foreground.sum()

    def update(self, total: Tensor) -> None:
        self.loss_normalizer.mul_(self.momentum).add_(total.clamp(min=1), alpha=1 - self.momentum)

    def value(self) -> Tensor:
        return self.loss_normalizer / world_size()


@contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Show every batch of a model's heads to `watcher(samples, box_inputs, cls, box)`.

    It sees what `detection_losses` starts from: the prediction and the target of the positives in
    the space of the box loss, and both losses before they are weighted and summed.
    """
    heads = [module for module in model.modules() if isinstance(module, Normalizer)]
    for head in heads:
        head.watcher = watcher
    try:
        yield
    finally:
        for head in heads:
            head.watcher = None


def box_inputs(samples: Samples, loss: BoxLoss) -> tuple[Any, ...]:
    """Predictions and targets of the positives in the space of the loss, both (P, 4).

    A loss that works level by level also gets the positives' levels (P,) and how many there are.
    """
    inputs = _pred_and_target(samples, loss)
    if getattr(loss, "per_level", False) and samples.level is not None:
        return *inputs, samples.level[samples.pos], samples.num_levels
    return inputs


def _pred_and_target(samples: Samples, loss: BoxLoss) -> tuple[Tensor, Tensor]:
    assert samples.pred_deltas is not None and samples.gt_boxes is not None
    if loss.space == "boxes":
        return samples.pred_boxes, samples.gt_boxes.to(samples.pred_boxes.dtype)
    pred, target = samples.pred_deltas, samples.target_deltas.to(samples.pred_deltas.dtype)
    weights = getattr(samples.box_transform, "weights", ())  # FCOS's distances have none
    if loss.unit_weights and any(weight != 1 for weight in weights):
        return _unit(pred, weights), _unit(target, weights)
    return pred, target


def _unit(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """(P, 4) deltas without the box coder's weights; by columns, which needs no host copy."""
    return torch.stack([d / w for d, w in zip(deltas.unbind(1), weights, strict=True)], dim=1)


def _total(loss: Tensor, weight: Tensor | None, elementwise: bool, denominator: Tensor) -> Tensor:
    if not elementwise:
        return loss
    if weight is not None:  # by sample: no weighted copy of every entry
        loss = (loss.sum(dim=1) if loss.dim() > weight.dim() else loss) * weight
    return loss.sum() / denominator.to(loss.dtype)


def _product(factor: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Product of weights (R,) or (R, C); None is all 1."""
    if factor is None or other is None:
        return other if factor is None else factor
    if factor.dim() < other.dim():
        factor = factor.unsqueeze(1)
    elif other.dim() < factor.dim():
        other = other.unsqueeze(1)
    return factor * other


def detection_losses(
    samples: Samples,
    cls_loss: ClassificationLoss,
    box_loss: BoxLoss,
    reweighters: Iterable[Reweighter],
    normalizer: Normalizer,
    *,
    cls_weight: float = 1.0,
    box_weight: float = 1.0,
    guided: GuidedScale | None = None,
    anchor_sampler: AnchorSampler | None = None,
) -> dict[str, Tensor]:
    """The losses of one head for one batch.

    In training mode the state of both losses and of the normaliser is updated from one all-reduce.
    Guided scaling needs the losses themselves, and so a second one, of two numbers.

    Args:
        samples: the batch, with the box fields filled.
        cls_loss: classification loss.
        box_loss: box loss, given the positives only.
        reweighters: applied in order; their weights multiply.
        normalizer: denominator of the elementwise losses.
        cls_weight: factor of the classification loss.
        box_weight: factor of the box loss.
        guided: scales the classification loss to the size of the box loss; None leaves it.
        anchor_sampler: keeps some samples by their classification loss; None keeps all.

    Returns:
        "loss_cls" and "loss_box_reg", 0-d tensors with gradient, also without any sample.
    """
    # autocast would bring matrix products inside of a loss back to half precision
    with torch.autocast(samples.logits.device.type, enabled=False):
        samples = samples.upcast()
        boxes = box_inputs(samples, box_loss)
        if normalizer.training:
            cls_sums, intermediate = cls_loss.batch_statistics(samples)
            box_sums, box_intermediate = box_loss.batch_statistics(*boxes)
            cls_sums, box_sums, count = sum_across_ranks(
                [cls_sums, box_sums, normalizer.count(samples)]
            )
            assert count is not None
            normalizer.update(count)
            cls = cls_loss.step(cls_sums, intermediate, samples)
            box = box_loss.step(box_sums, box_intermediate, *boxes)
        else:
            intermediate = None
            cls, box = cls_loss.compute(samples), box_loss.compute(*boxes)
        if normalizer.watcher is not None:
            normalizer.watcher(samples, boxes, cls, box)

        cls_factor, box_factor = samples.sample_weight, None
        if anchor_sampler is not None:
            kept = anchor_sampler(samples, per_sample(cls.detach()))
            cls_factor = _product(cls_factor, kept.to(cls.dtype))
        for reweighter in reweighters:
            on_cls, on_box = reweighter(samples, cls, box)
            cls_factor = _product(cls_factor, on_cls)
            box_factor = _product(box_factor, on_box)
        denominator = normalizer.value()
        if cls_loss.couples_boxes:
            box = cls_loss.coupled_box_loss(samples, cls, box, intermediate)
        else:
            box = _total(box, box_factor, box_loss.elementwise, denominator)
        cls = _total(cls, cls_factor, cls_loss.elementwise, denominator)
        cls, box = cls * cls_weight, box * box_weight
        if guided is not None:
            cls = guided(cls, box)
        return {"loss_cls": cls, "loss_box_reg": box}


class LossHead:
    """What all heads share: two losses with their weights, and the denominator.

    Attributes:
        cls_loss: classification loss.
        box_loss: box loss.
        reweighters: modules that weight samples.
        cls_weight: factor of the classification loss.
        box_weight: factor of the box loss.
        guided: scales the classification loss to the size of the box loss; None leaves it.
        anchor_sampler: keeps some samples by their classification loss; None keeps all.
        normalizer: denominator of the elementwise losses.
    """

    cls_loss: ClassificationLoss
    box_loss: BoxLoss
    reweighters: Iterable[Any]
    cls_weight: float
    box_weight: float
    guided: GuidedScale | None
    anchor_sampler: AnchorSampler | None
    normalizer: Normalizer
    training_only: tuple[str, ...] = (
        "cls_loss",
        "box_loss",
        "reweighters",
        "guided",
        "anchor_sampler",
        "normalizer",
    )

    def sample_losses(self, samples: Samples) -> dict[str, Tensor]:
        """The losses of a batch; see `detection_losses`."""
        return detection_losses(
            samples,
            self.cls_loss,
            self.box_loss,
            self.reweighters,
            self.normalizer,
            cls_weight=self.cls_weight,
            box_weight=self.box_weight,
            guided=self.guided,
            anchor_sampler=self.anchor_sampler,
        )
