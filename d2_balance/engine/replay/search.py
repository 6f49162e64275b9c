"""Runs a batch again to find the images and classes whose loss is not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_balance.losses import Samples
from d2_balance.modeling.criterion import watched
from d2_balance.utils.distributed import without_other_ranks

from ..resume.random_state import seed_everything

logger = logging.getLogger(__name__)


@dataclass
class Suspects:
    """What is known about a batch, by index of the image.

    Args:
        images: suspect images and what is wrong with them.
        classes: indices of the classes that stand out.
        bad_input: whether the images or their annotations are not finite themselves.
    """

    images: dict[int, str] = field(default_factory=dict)
    classes: dict[int, set[int]] = field(default_factory=dict)
    bad_input: bool = False

    def add(self, image: int, what: str, classes: Iterable[int] = ()) -> None:
        """Note what is wrong with an image; what was noted first stays."""
        self.images.setdefault(image, what)
        self.classes.setdefault(image, set()).update(classes)


class Replay:
    """Runs a batch of this rank once more, in training mode and under `no_grad`.

    Buffers are as before afterwards; nothing waits for other ranks.

    Args:
        model: in training mode, not wrapped in DDP.
        batch: Detectron2's inputs.
        key: what the random generators of the step were seeded with; None: unknown.
        iteration: from 0.
        precision: of mixed precision; None if it is off.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: list[dict[str, Any]],
        *,
        key: tuple[int, ...] | None,
        iteration: int,
        precision: torch.dtype | None = None,
    ) -> None:
        self._model, self._batch = model, batch
        self._key, self._iteration, self._precision = key, iteration, precision
        self.losses: dict[str, float] = {}  # of the whole batch, once it was run

    def run(self) -> Suspects:
        """Look at the inputs, then at the samples of all heads, then at each image alone."""
        found = bad_inputs(self._batch)
        if found.bad_input:
            return found
        in_heads = Suspects()
        with self._untouched():
            finite = self._forward(self._batch, in_heads)
            alone = [i for i, x in enumerate(self._batch) if self._forward([x]) is False]
        # An image of which both are true is the cause: batch norm and the state of the losses
        # carry what is not finite from one image to the others.
        both = [index for index in in_heads.images if index in alone]
        for index in both or in_heads.images or alone:
            what = in_heads.images.get(index, "its loss is not finite when it is run alone")
            found.add(index, what, in_heads.classes.get(index, ()))
        if not found.images:
            what = "its loss was finite when it was run again"
            if finite is False:
                what = "one of these images, or all of them together"
            for index in range(len(self._batch)):
                found.add(index, what)
        return found

    def is_finite(self) -> bool:
        """Return whether the losses of the whole batch are finite."""
        with self._untouched():
            return self._forward(self._batch, Suspects()) is True

    def _forward(
        self, batch: list[dict[str, Any]], in_heads: Suspects | None = None
    ) -> bool | None:
        """Return whether the losses of a batch are finite; None where the model cannot run it."""
        found = Suspects() if in_heads is None else in_heads
        if self._key is not None:
            seed_everything(*self._key)
        try:
            with watched(self._model, lambda *seen: _bad_samples(found, *seen)):
                losses = self._model(batch)
        except Exception as error:
            if speaks_of_non_finite(error):
                return False
            # such as batch norm over a single value
            logger.debug(f"{type(error).__name__} when {len(batch)} images were run: {error}")
            return None
        losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
        if in_heads is not None:
            self.losses = {name: float(value) for name, value in losses.items()}
        return bool(sum(losses.values()).isfinite())

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Save the buffers; those that the failed step has corrupted start from zero meanwhile."""
        model = self._model
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        joined = [m for m in model.modules() if isinstance(m, _JOINING_RANKS) and m.training]
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(EventStorage(self._iteration))
            stack.enter_context(without_other_ranks())
            if self._precision is not None:
                device = next(model.parameters()).device.type
                stack.enter_context(torch.autocast(device, dtype=self._precision))
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.nan_to_num_(posinf=torch.inf, neginf=-torch.inf)
            for module in joined if comm.get_world_size() > 1 else ():
                module.eval()
            try:
                yield
            finally:
                for module in joined:
                    module.train()
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])


_JOINING_RANKS = (nn.SyncBatchNorm, NaiveSyncBatchNorm)


def speaks_of_non_finite(error: Exception) -> bool:
    """Return whether Detectron2 refused values that are not finite, in the RPN or in Boxes."""
    return isinstance(error, FloatingPointError) or (
        isinstance(error, AssertionError) and "NaN" in str(error)
    )


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor with an entry that is infinite or NaN, "" for none."""
    named = list(tensors)
    if not named:
        return ""
    finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in named])  # one wait
    bad = (~finite).nonzero().flatten().tolist()
    return named[bad[0]][0] if bad else ""


def bad_inputs(batch: list[dict[str, Any]]) -> Suspects:
    """Images with pixels or ground truth boxes that are not finite."""
    found = Suspects()
    for index, record in enumerate(batch):
        if not record["image"].isfinite().all():
            found.add(index, "pixels are not finite")
        objects = record.get("instances")
        if objects is None or not objects.has("gt_boxes"):
            continue
        bad = ~objects.gt_boxes.tensor.isfinite().all(dim=1)
        if bad.any():
            found.add(index, "a ground truth box is not finite", objects.gt_classes[bad].tolist())
    found.bad_input = bool(found.images)
    return found


def _bad_samples(
    found: Suspects, samples: Samples, boxes: tuple[Tensor, ...], cls: Tensor, box: Tensor
) -> None:
    """Note the images and classes of what is not finite in one head; the first cause counts."""
    pred, target = boxes[:2]
    index = torch.arange(len(samples.labels), device=samples.labels.device)
    for what, values, of, has_classes in (
        ("class scores are not finite", samples.logits, index, True),
        ("a target box is not finite", target, samples.pos, False),
        ("a predicted box is not finite", pred, samples.pos, False),
        ("the classification loss is not finite", cls, index, cls.dim() == 2),
        ("the box loss is not finite", box, samples.pos, False),
        ("the weight of a sample is not finite", samples.sample_weight, index, False),
    ):
        # a 0-d loss of a set belongs to no sample
        if values is None or values.dim() == 0 or values.isfinite().all():
            continue
        images, classes = _pairs(samples, ~values.isfinite(), of, has_classes).unbind(1)
        for image, column in zip(images.tolist(), classes.tolist(), strict=True):
            found.add(image, what, [column] if column < samples.num_classes else [])
        return


def _pairs(samples: Samples, bad: Tensor, index: Tensor, has_classes: bool) -> Tensor:
    """Pairs of image and class that are not finite, each once; class K is none.

    Columns of classes name their class where the sample has others that are finite. Without columns
    the label does.

    Args:
        samples: the batch.
        bad: (n,) or (n, C) bool.
        index: (n,) which samples of the batch they are.
        has_classes: whether the C columns are classes.

    Returns:
        (m, 2) int64.
    """
    images = torch.zeros_like(index) if samples.image_index is None else samples.image_index[index]
    if not has_classes:
        hit = bad if bad.dim() == 1 else bad.any(dim=1)
        return torch.stack([images[hit], samples.labels[index[hit]]], dim=1).unique(dim=0)
    partly = bad & ~bad.all(dim=1, keepdim=True)
    sample, column = partly.nonzero().unbind(1)
    whole = images[bad.all(dim=1)]
    named = torch.stack([images[sample], column], dim=1)
    unnamed = torch.stack([whole, torch.full_like(whole, samples.num_classes)], dim=1)
    return torch.cat([named, unnamed]).unique(dim=0)
