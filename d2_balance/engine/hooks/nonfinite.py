"""Ends a run whose loss is no longer finite, with a message that says why.

The check stands between the backward pass and the step of the optimizer, so that no weights and no
checkpoint are corrupt. What it costs in healthy iterations is a sum of the losses, which Detectron2
reads at the same place, and with several ranks one number that they add up.

In mixed precision the losses are checked before they are scaled, so that an overflow of scaled
gradients is none of this module's business: `StepTrainer` skips that step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from d2_balance.data.unreadable import image_name
from d2_balance.utils.distributed import world_size
from d2_balance.utils.names import listed

from ..errors import RunStopped
from ..replay.saved_batch import BatchSaver
from ..replay.search import Replay, bad_inputs, first_non_finite, speaks_of_non_finite

_BAD_WEIGHTS = "Lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True."
_OVERFLOW = (
    "In float32 the loss of this batch is finite: half precision has overflowed in the forward "
    "pass. Set SOLVER.AMP.PRECISION bf16 or SOLVER.AMP.ENABLED False."
)
_BAD_INPUT = "Fix these images or their annotations, or take them out."
_SHOWN = 8  # images and classes that a message lists

logger = logging.getLogger(__name__)


class NonFiniteLossError(FloatingPointError):
    """A loss or the weights are infinite or NaN.

    Args:
        message: what a user reads.
        iteration: from 0.
        losses: names in the loss dict that are not finite; empty where the model gave no losses.
        images: file names (or image ids) of the images they come from.
        classes: names of the classes they come from; empty where no class stands out.
        everywhere: whether all ranks raise the same error.
    """

    def __init__(
        self,
        message: str,
        *,
        iteration: int,
        losses: Iterable[str] = (),
        images: Iterable[str] = (),
        classes: Iterable[str] = (),
        everywhere: bool = True,
    ) -> None:
        super().__init__(message)
        self.iteration = iteration
        self.losses, self.images, self.classes = tuple(losses), tuple(images), tuple(classes)
        self.everywhere = everywhere


@dataclass
class Report:
    """What one rank found.

    Args:
        losses: values of the losses that are not finite.
        parameter: name of the first parameter that is not finite, "" for none.
        bad_input: whether the batch itself is not finite.
        images: name of each suspect image and what is wrong with it.
        classes: names of the classes, without repetition.
        overflow: whether the loss is finite in float32.
        saved: file with the batch, "" for none.
    """

    losses: dict[str, float] = field(default_factory=dict)
    parameter: str = ""
    bad_input: bool = False
    images: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    overflow: bool = False
    saved: str = ""


class FiniteLosses(HookBase):
    """Raises `NonFiniteLossError` on all ranks, before the step, where a rank's loss is not finite.

    Belongs to the trainer that calls the optimizer: DefaultTrainer's `_trainer`. The all-reduce
    also tells whether one of them has been asked to stop.

    Args:
        model: wrapped in DDP or not.
        class_names: K names; None: classes are called by their index.
        saver: keeps the batch for `d2-balance replay`; None drops it.

    Attributes:
        wants_to_stop: says whether this rank has been asked to stop.
        stop_everywhere: whether any rank had been asked before the last backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str] | None = None,
        saver: BatchSaver | None = None,
    ) -> None:
        self._model = getattr(model, "module", model)
        self._names, self._saver = class_names, saver
        self._batch: list[dict[str, Any]] = []
        self._losses: dict[str, Tensor] = {}
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.stop_everywhere = False
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model: nn.Module, inputs: tuple) -> None:
        if model.training:
            self._batch, self._losses = inputs[0] if inputs else [], {}

    def _after_forward(self, model: nn.Module, inputs: tuple, losses: Any) -> None:
        if model.training:
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            self._losses = {name: value.detach() for name, value in losses.items()}

    def after_backward(self) -> None:
        total = torch.stack([value.float() for value in self._losses.values()]).sum()
        bad = (~total.isfinite()).float()
        if world_size() == 1:
            if bad.item():
                raise self.error()
            return
        both = torch.stack([bad, torch.full_like(bad, float(self.wants_to_stop()))])
        dist.all_reduce(both)
        failed, stops = both.tolist()
        self.stop_everywhere = stops > 0
        if failed:
            raise self.error()

    def error(self) -> NonFiniteLossError:
        """Return the error of the present batch; every rank must call this."""
        mine = self._report() if _non_finite(self._losses) else Report()
        reports = comm.all_gather(mine)
        return _error(reports, self.trainer.iter, everywhere=True)

    def error_of_forward(self, cause: Exception) -> NonFiniteLossError | None:
        """Return the error where the model of this rank did not get as far as its losses.

        Returns:
            None where `cause` has nothing to do with values that are not finite.
        """
        if not (speaks_of_non_finite(cause) or bad_inputs(self._batch).bad_input):
            return None
        return _error([self._report()], self.trainer.iter, everywhere=False, cause=str(cause))

    def error_of_step(self, parameter: str) -> NonFiniteLossError:
        """Return the error where the step of a finite loss has corrupted the weights."""
        names = [image_name(record) for record in self._batch]
        return NonFiniteLossError(
            f"The step of iteration {self.trainer.iter} has made the weights infinite or NaN, "
            f"though its loss was finite; the first such parameter is {parameter}. The images of "
            f"the batch were {listed(names, _SHOWN)}. {_BAD_WEIGHTS}",
            iteration=self.trainer.iter,
            images=names,
        )

    def _report(self) -> Report:
        batch, report = self._batch, Report(_non_finite(self._losses))
        precision = getattr(self.trainer, "precision", None)
        key = getattr(self.trainer, "random_key", None)
        settings = {"key": key, "iteration": self.trainer.iter}
        replay = Replay(self._model, batch, precision=precision, **settings)
        try:
            if self._saver is not None:
                report.saved = self._saver.save(batch, precision=precision, **settings)
            report.parameter = first_non_finite(self._model.named_parameters())
            found = replay.run()
            if precision is not None and not (found.bad_input or report.parameter):
                report.overflow = Replay(self._model, batch, **settings).is_finite()
        except Exception:  # a second error must not hide the first one
            logger.exception("The batch of the loss that is not finite could not be run again.")
            found = bad_inputs(batch)
        finally:
            self._batch = batch  # the hooks have seen the images that were run again
        if not found.images:
            report.images = {image_name(record): "" for record in batch}
            return report
        suspects = sorted(found.images)
        report.bad_input = found.bad_input
        report.images = {image_name(batch[i]): found.images[i] for i in suspects}
        classes = set().union(*(found.classes[i] for i in suspects))
        report.classes = [self._class_name(index) for index in sorted(classes)]
        return report

    def _class_name(self, index: int) -> str:
        if self._names is None or index >= len(self._names):
            return f"class {index}"
        return self._names[index]


class FiniteWeights(HookBase):
    """Raises `NonFiniteLossError` before weights that are not finite would be saved.

    A finite loss can have a gradient that is not. Stands before PeriodicCheckpointer.

    Args:
        model: wrapped in DDP or not.
        period: iterations between two checkpoints.
        finite_losses: knows the last batch.
    """

    def __init__(self, model: nn.Module, period: int, finite_losses: FiniteLosses) -> None:
        self._model, self._period, self._losses = model, period, finite_losses

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period and done < self.trainer.max_iter:
            return
        if name := first_non_finite(self._model.named_parameters()):
            raise self._losses.error_of_step(name.removeprefix("module."))


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """Detectron2 logs what ends a run; inside of the block errors for users by their message only.

    Where it was raised tells a user nothing.
    """

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NonFiniteLossError | RunStopped):
            record.msg, record.args, record.exc_info = str(error), (), None
        return True

    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(shorten)
    try:
        yield
    finally:
        log.removeFilter(shorten)


def _non_finite(losses: dict[str, Tensor]) -> dict[str, float]:
    """Losses that are not finite; all of them where only their sum is not."""
    values = {name: float(value) for name, value in losses.items()}
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    return bad if bad or math.isfinite(sum(values.values())) else values


def _error(
    reports: Sequence[Report], iteration: int, *, everywhere: bool, cause: str = ""
) -> NonFiniteLossError:
    """Join the reports of the ranks to one error."""
    losses = {name: value for report in reports for name, value in report.losses.items()}
    images = {name: what for report in reports for name, what in report.images.items()}
    classes = list(dict.fromkeys(name for report in reports for name in report.classes))
    parameter = next((report.parameter for report in reports if report.parameter), "")
    if cause:
        text = [f"The model stopped at iteration {iteration}: {cause}"]
    else:
        values = ", ".join(f"{name} = {value}" for name, value in losses.items())
        text = [f"The loss is not finite at iteration {iteration}: {values}."]
    if parameter:
        text.append(f"The weights are not finite; the first such parameter is {parameter}.")
    if classes:
        text.append(f"Classes: {listed(classes, _SHOWN)}.")
    shown = [f"{name} ({what})" if what else name for name, what in images.items()]
    if shown:
        text.append(f"Images: {listed(shown, _SHOWN)}.")
    bad_input = any(report.bad_input for report in reports)
    if any(report.overflow for report in reports):
        text.append(_OVERFLOW)
    else:
        text.append(_BAD_INPUT if bad_input and not parameter else _BAD_WEIGHTS)
    files = [report.saved for report in reports if report.saved]
    text += [f"Run the batch again: d2-balance replay {path}" for path in files[:1]]
    return NonFiniteLossError(
        " ".join(text),
        iteration=iteration,
        losses=losses,
        images=images,
        classes=classes,
        everywhere=everywhere,
    )
