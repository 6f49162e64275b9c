"""Collects the statistics of LogN when a training ends, so that its checkpoint can be calibrated.

Source: Zhao et al., arXiv:2203.17020; see `modeling.postprocess.calibration.LogN`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from d2_balance.data.checks.classes import configured_num_classes
from d2_balance.data.class_counts import ClassCounts
from d2_balance.modeling.postprocess.statistics import (
    logit_statistics,
    logn_modules,
    measured_logits,
)
from d2_balance.utils.progress import progress

from ..resume.checkpoint import BalancedCheckpointer
from ..resume.random_state import seeded

Loader = Callable[[CfgNode], Iterable[list[dict[str, Any]]]]


def collect_logits(
    cfg: CfgNode,
    build_loader: Loader,
    model: nn.Module,
) -> dict[str, Any]:
    """Measure the logits of a model on MODEL.BALANCE.CALIBRATION.MAX_ITER training batches.

    Every rank must call this. Proposals are sampled by SEED, and random generators go on
    afterwards as if nothing had been sampled.

    Args:
        cfg: full config; its datasets are registered.
        build_loader: makes the training loader.
        model: not wrapped in DDP.

    Returns:
        `logit_mean` and `logit_variance` as `CalibrationStatistics` has them.

    Raises:
        ValueError: the model has no RoI heads.
    """
    node = cfg.MODEL.BALANCE.CALIBRATION
    steps = node.MAX_ITER
    if not steps:
        steps = math.ceil(ClassCounts.from_config(cfg).num_images / cfg.SOLVER.IMS_PER_BATCH)
    seed = max(cfg.SEED, 0)
    with torch.random.fork_rng(), seeded(seed):
        torch.manual_seed(seed)  # of accelerators as well
        batches = itertools.islice(iter(build_loader(cfg)), steps)
        shown = progress(batches, "counting logits", steps, unit="batches")
        classes = configured_num_classes(cfg)
        return measured_logits(logit_statistics(model, shown, classes, node.MOMENTUM or None))


class CollectLogits(HookBase):
    """Runs the pass of `d2-balance calibrate` behind the last step, before the final checkpoint.

    Until then LogN changes nothing. Every rank has one.

    Args:
        cfg: config of the run.
        build_loader: makes the training loader.
        model: wrapped in DDP or not.
        measuring: block in which the model has the weights that are evaluated.
        checkpointers: save the statistics from then on.
    """

    def __init__(
        self,
        cfg: CfgNode,
        build_loader: Loader,
        model: nn.Module,
        measuring: Callable[[], AbstractContextManager[None]],
        checkpointers: Sequence[BalancedCheckpointer],
    ) -> None:
        self._cfg, self._build_loader = cfg, build_loader
        self._model = getattr(model, "module", model)
        self._measuring, self._checkpointers = measuring, checkpointers

    @property
    def wanted(self) -> bool:
        """Whether there is a LogN without a file of statistics."""
        given = self._cfg.MODEL.BALANCE.CALIBRATION.STATISTICS
        return bool(logn_modules(self._model)) and not given

    @property
    def missing(self) -> bool:
        """Whether there is a LogN without statistics."""
        return any(module.measured is None for module in logn_modules(self._model))

    def before_train(self) -> None:
        for module in logn_modules(self._model) if self.wanted else ():
            module.forget()

    def after_step(self) -> None:
        if self.wanted and self.trainer.iter + 1 >= self.trainer.max_iter:
            self.collect()

    def collect(self) -> None:
        """Measure, calibrate the model, and save the statistics with it from now on."""
        for module in logn_modules(self._model):
            module.forget()
        with self._measuring():
            measured = collect_logits(self._cfg, self._build_loader, self._model)
        columns = [torch.tensor(values, dtype=torch.float64) for values in measured.values()]
        for module in logn_modules(self._model):
            module.fill(*columns)
        for checkpointer in self._checkpointers:
            checkpointer.add_calibration(measured)
