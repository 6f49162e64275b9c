"""Losses on the test sets while a run trains, which leave the run as it was.

An image is measured by itself, as one of IMS_PER_BATCH images that are all like it: normalisers
and densities see what they would see of such a batch, and the result depends neither on the number
of processes nor on which images come together. Batch norms use what they have counted so far.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MapDataset, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from d2_balance.data.unreadable import SKIPPED, SkipUnreadable
from d2_balance.utils.distributed import MicroBatches
from d2_balance.utils.workers import leave_signals_for_a_while

from ..errors import RunStopped
from ..resume.random_state import seed_everything, seeded

logger = logging.getLogger(__name__)


def check_validation_loss(cfg: CfgNode) -> None:
    """Refuse TEST.LOSS without a test set.

    Raises:
        ValueError: naming both keys.
    """
    if cfg.TEST.LOSS.PERIOD and not cfg.DATASETS.TEST:
        raise ValueError(
            "TEST.LOSS.PERIOD is above 0 and DATASETS.TEST is empty; must be at least one "
            "dataset, or PERIOD 0."
        )


class ValidationLoss(HookBase):
    """Writes the mean losses over the images of all test sets, as val_loss/<name>.

    Every rank measures a part of the images. val_loss/total_loss is their sum.

    Args:
        model: wrapped in DDP or not.
        images: what the model takes in training, with annotations; indexed, a sequence.
        period: iterations between two measurements, at least 1; the last iteration is measured too.
        batch: IMS_PER_BATCH.
        seed: what an image draws at random is a function of it and of the image.
        num_workers: workers.
        weights: makes a block in which the model has the weights that are measured.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Any,
        period: int,
        *,
        batch: int,
        seed: int,
        num_workers: int,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = getattr(model, "module", model)
        self._images, self._period, self._batch = images, period, batch
        self._seed, self._num_workers, self._weights = max(seed, 0), num_workers, weights

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> ValidationLoss | None:
        """Return the hook that TEST.LOSS describes; None where it is switched off."""
        if not cfg.TEST.LOSS.PERIOD:
            return None
        return cls(
            model,
            validation_images(cfg),
            cfg.TEST.LOSS.PERIOD,
            batch=cfg.SOLVER.IMS_PER_BATCH,
            seed=cfg.SEED,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            weights=weights,
        )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            losses = self.measure()
            if comm.is_main_process():
                named = {f"val_loss/{name}": value for name, value in losses.items()}
                self.trainer.storage.put_scalars(**named, smoothing_hint=False)
                logger.info(f"Losses on the test sets: total {losses['total_loss']:.4g}")

    def measure(self) -> dict[str, float]:
        """Return the mean losses of all images; every rank must call this.

        Returns:
            Name to mean, on every rank.
        """
        rank, ranks = comm.get_rank(), comm.get_world_size()
        mine = range(rank, len(self._images), ranks)
        with _unchanged(self._model), self._weights():
            found = [
                self._losses(i, record)
                for i, record in zip(mine, self._load(mine))  # noqa: B905
                if SKIPPED not in record
            ]
        everything = [losses for part in comm.all_gather(found) for losses in part]
        if not everything:
            raise RunStopped("TEST.LOSS: no image of DATASETS.TEST can be read.", everywhere=True)
        names = sorted({name for losses in everything for name in losses})
        # fsum is exact: the mean does not depend on how the images were shared out
        means = {n: math.fsum(x.get(n, 0.0) for x in everything) / len(everything) for n in names}
        return means | {"total_loss": math.fsum(means.values())}

    def _load(self, indices: range) -> Iterator[Any]:
        # a generator of its own: the loader would draw from that of the run
        generator = torch.Generator().manual_seed(self._seed)
        return iter(
            DataLoader(
                torch.utils.data.Subset(self._images, indices),
                batch_size=None,
                num_workers=self._num_workers,
                generator=generator,
                collate_fn=_as_it_is,
                worker_init_fn=leave_signals_for_a_while,
            )
        )

    @torch.no_grad()
    def _losses(self, index: int, record: dict[str, Any]) -> dict[str, float]:
        steps = getattr(self.trainer, "_trainer", None)
        precision = getattr(steps, "precision", None)
        device = next(self._model.parameters()).device.type
        seed_everything(self._seed, index)
        like_it = MicroBatches(max(self._batch // comm.get_world_size(), 1))
        with (
            _state_kept(self._model),
            EventStorage(self.trainer.iter),  # what the heads log is not of the run
            like_it.counting(),
            torch.autocast(device, dtype=precision, enabled=precision is not None),
        ):
            # not __call__: hooks on it watch the batches that train
            losses = self._model.forward([record])
        if isinstance(losses, torch.Tensor):
            losses = {"loss": losses}
        values = torch.stack([value.double() for value in losses.values()]).tolist()
        return dict(zip(losses, values, strict=True))


def validation_images(cfg: CfgNode) -> Any:
    """Return the images of DATASETS.TEST at test size, with annotations, without augmentation."""
    limit, dicts = cfg.TEST.LOSS.IMAGES, []
    for name in cfg.DATASETS.TEST:
        found = get_detection_dataset_dicts(
            [name], filter_empty=False, min_keypoints=0, check_consistency=False
        )
        dicts += found[:limit] if limit else found
    arguments = DatasetMapper.from_config(cfg, is_train=True)
    arguments |= {"augmentations": build_augmentation(cfg, False), "recompute_boxes": False}
    return MapDataset(dicts, SkipUnreadable(DatasetMapper(**arguments)))


def _as_it_is(record: Any) -> Any:
    return record


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Set training mode, with batch norms and dropout as at test time; restore it afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    model.train()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.training = False
    try:
        with torch.random.fork_rng(devices=devices), seeded(0):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back, and the numbers that Detectron2's own models keep as attributes."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numbers = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    ]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, name, value in numbers:
            setattr(module, name, value)
