"""The best model by any metric, and the end of a run that gets no better.

What was best so far is part of a checkpoint, so that a resumed run does not replace a better model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from d2_balance.utils.names import closest

from ..errors import StopTraining
from ..resume.checkpoint import BalancedCheckpointer
from ..resume.run_state import RunState

FILE = "model_best"
"""Name of the file of the best model, without its ending."""

LOSS_PREFIX = "val_loss/"
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
_OUR_EVALUATORS = ("coco", "lvis")

logger = logging.getLogger(__name__)


def metric_period(cfg: CfgNode) -> int:
    """Iterations between two measurements of TEST.BEST.METRIC; 0: at the end only."""
    losses = cfg.TEST.BEST.METRIC.startswith(LOSS_PREFIX)
    return cfg.TEST.LOSS.PERIOD if losses else cfg.TEST.EVAL_PERIOD


def check_best(cfg: CfgNode) -> None:
    """Check what the keys of TEST.BEST ask of each other, before anything is measured.

    Raises:
        ValueError: naming the key.
    """
    node = cfg.TEST.BEST
    if not node.METRIC:
        if node.PATIENCE:
            raise ValueError(
                f"TEST.BEST.PATIENCE is {node.PATIENCE} and TEST.BEST.METRIC is empty; must be "
                "the name of a metric, such as bbox/AP, or PATIENCE 0."
            )
        return
    losses = node.METRIC.startswith(LOSS_PREFIX)
    if losses and (node.MODE == "max" or cfg.TEST.LOSS.PERIOD < 1):
        raise ValueError(
            f"TEST.BEST.METRIC {node.METRIC} is a loss: set TEST.BEST.MODE min and "
            f"TEST.LOSS.PERIOD to at least 1; they are {node.MODE} and {cfg.TEST.LOSS.PERIOD}."
        )
    if node.PATIENCE and metric_period(cfg) < 1:
        raise ValueError(
            "TEST.BEST.PATIENCE counts evaluations, and TEST.EVAL_PERIOD is 0, which evaluates at "
            "the end only; must be an EVAL_PERIOD of at least 1, or PATIENCE 0."
        )
    if not losses:
        _check_name(cfg, node.METRIC)


def _check_name(cfg: CfgNode, metric: str) -> None:
    """Refuse a metric that our evaluators of the test sets do not measure."""
    names = cfg.DATASETS.TEST
    kinds = [MetadataCatalog.get(name).get("evaluator_type") for name in names]
    if not names or cfg.MODEL.KEYPOINT_ON or not set(kinds) <= set(_OUR_EVALUATORS):
        return
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    prefixes = [f"{name}/" for name in names] if len(names) > 1 else [""]
    allowed = [f"{p}{task}/{m}" for p in prefixes for task in tasks for m in _METRICS]
    if metric not in allowed:
        raise ValueError(
            f"TEST.BEST.METRIC: {metric!r} is not measured; {closest(metric, allowed)}"
        )


class BestModel(HookBase):
    """Saves the model when a metric is better than ever, and says when it no longer improves.

    Stands behind the hooks that measure, on every rank: the first rank tells the others the value,
    so that all of them know what is best and end together.

    A value that is missing, infinite or NaN (APr without rare classes) is neither better nor worse.

    Args:
        metric: name in the EventStorage.
        period: iterations between two measurements; 0: at the end only.
        checkpointer: one that saves the model alone; MODEL.WEIGHTS takes the file.
        mode: "max" or "min".
        patience: measurements without an improvement that end the run; 0: none do.
        min_delta: how much better is an improvement, for `patience`.
        at_the_end: whether the last measurement comes when training has ended, as evaluations do.
        weights: makes a block in which the model has the weights that were measured.
    """

    def __init__(
        self,
        metric: str,
        period: int,
        checkpointer: BalancedCheckpointer,
        *,
        mode: str,
        patience: int,
        min_delta: float,
        at_the_end: bool,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._metric, self._period, self._checkpointer = metric, period, checkpointer
        self._sign = 1 if mode == "max" else -1
        self._patience, self._min_delta = patience, min_delta
        self._at_the_end, self._weights = at_the_end, weights
        self.value: float | None = None
        self.iteration = -1
        self._reference: float | None = None  # what has to be improved on
        self._without = 0  # measurements since

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        checkpointer: BalancedCheckpointer,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> BestModel | None:
        """Return the hook that TEST.BEST describes; None where there is no metric."""
        node = cfg.TEST.BEST
        if not node.METRIC:
            return None
        return cls(
            node.METRIC,
            metric_period(cfg),
            checkpointer,
            mode=node.MODE,
            patience=node.PATIENCE,
            min_delta=node.MIN_DELTA,
            at_the_end=not node.METRIC.startswith(LOSS_PREFIX),
            weights=weights,
        )

    @property
    def gave_up(self) -> bool:
        """Whether the metric has not improved for `patience` measurements."""
        return self._patience > 0 and self._without >= self._patience

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        due = self._period > 0 and done % self._period == 0
        if (due and not (last and self._at_the_end)) or (last and not self._at_the_end):
            self._look(self.trainer.iter)

    def after_train(self) -> None:
        # a run that has failed does not get there
        ended = self.trainer.iter >= self.trainer.max_iter and not self.gave_up
        if self._at_the_end and ended:
            self._look(self.trainer.iter)

    def _look(self, iteration: int) -> None:
        """Record what was measured in an iteration; every rank must call this."""
        value, when = self.trainer.storage.latest().get(self._metric, (None, -1))
        value = comm.all_gather(float(value) if when == iteration else None)[0]
        if value is None or not math.isfinite(value):
            if comm.is_main_process():
                self._explain(value)
            return
        if self._better(value, self.value, 0):
            before = self.value
            self.value, self.iteration = value, min(iteration, self.trainer.max_iter - 1)
            self._save(before)
        if self._better(value, self._reference, self._min_delta):
            self._reference, self._without = value, 0
        else:
            self._without += 1
        if self.gave_up:
            logger.info(
                f"TEST.BEST: {self._metric} has not improved on {self._reference:.4g} in "
                f"{self._without} measurements; the run ends. The best was {self.value:.4g}, in "
                f"iteration {self.iteration}."
            )

    def _better(self, value: float, than: float | None, by: float) -> bool:
        return than is None or self._sign * (value - than) > by

    def _save(self, before: float | None) -> None:
        was = "" if before is None else f", before {before:.4g}"
        logger.info(f"TEST.BEST: {self._metric} is {self.value:.4g}{was}; {FILE}.pth is saved")
        with self._weights():
            self._checkpointer.save(
                FILE, iteration=self.iteration, metric=self._metric, value=self.value
            )

    def _explain(self, value: float | None) -> None:
        if value is not None:
            logger.warning(f"TEST.BEST.METRIC {self._metric} is {value}; no best model is chosen.")
            return
        names = [name for name in self.trainer.storage.latest() if "/AP" in name or "val_" in name]
        logger.warning(
            f"TEST.BEST.METRIC {self._metric} was not measured; no best model is chosen. "
            f"Measured: {', '.join(sorted(names)) or 'nothing'}."
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._metric,
            "value": self.value,
            "iteration": self.iteration,
            "reference": self._reference,
            "without": self._without,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] != self._metric:
            logger.warning(
                f"TEST.BEST.METRIC was {state['metric']} and is {self._metric}: the best model is "
                "chosen anew."
            )
            return
        self.value, self.iteration = state["value"], state["iteration"]
        self._reference, self._without = state["reference"], state["without"]


class StopEarly(HookBase):
    """Ends a run whose `BestModel` gave up, as if it had had no more iterations.

    Stands behind all hooks but FinishIteration, on every rank.

    Args:
        best: says when.
        state: part of the last checkpoint.
        checkpointer: of the run, with its state.
    """

    def __init__(
        self, best: BestModel, state: RunState, checkpointer: BalancedCheckpointer
    ) -> None:
        self._best, self._state, self._checkpointer = best, state, checkpointer

    def after_step(self) -> None:
        if self._best.gave_up and self.trainer.iter + 1 < self.trainer.max_iter:
            for hook in self.trainer._hooks:
                if hasattr(hook, "gather"):  # what checkpoints need of the other ranks
                    hook.gather()
            self._state.finished = True
            self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def before_step(self) -> None:
        if self._best.gave_up:
            # hooks see the iterations done as the length of the run, and finish their work
            self.trainer.max_iter = self.trainer.iter
            raise StopTraining
