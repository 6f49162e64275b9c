"""One training step: mixed precision, gradient accumulation, and overflows that end no run.

Replaces Detectron2's SimpleTrainer and AMPTrainer, of which it keeps the order: forward,
backward, hooks, log, optimizer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, defaults
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_balance.data.unreadable import image_name
from d2_balance.losses import BoxLoss, ClassificationLoss
from d2_balance.modeling.criterion import Normalizer
from d2_balance.reweight import GuidedScale
from d2_balance.utils.distributed import MicroBatches

from .hooks.nonfinite import NonFiniteLossError
from .replay.search import first_non_finite
from .resume.random_state import seed_everything

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)

# State that a batch changes once, however many micro-batches it is split into.
_COUNTED_ONCE = (ClassificationLoss, BoxLoss, Normalizer, GuidedScale)

logger = logging.getLogger(__name__)


class StepTrainer(SimpleTrainer):
    """Runs the steps of a run.

    With `micro_batches` of n a batch is split into n parts that count as n ranks: the statistics
    of the losses (positives, densities, class counts) are summed over them in a first forward pass
    under `no_grad`, and the state of the losses moves once per step. Losses that are all-reduced
    have then the gradients of the whole batch. What each rank does for itself each micro-batch does
    for itself: batch norm in training mode, losses that rank their samples, Detectron2's losses.

    Args:
        model: wrapped in DDP or not.
        data_loader: batches of this rank.
        optimizer: of the model.
        precision: of autocast; None: float32 throughout.
        scaler: of the gradients, for float16; None: they are not scaled.
        micro_batches: n, at least 1; divides the batches.
        seed: of `SeedSteps`; below 0 random numbers are not a function of the iteration.
        max_skipped: overflows in a row that end the run, at least 1.

    Attributes:
        random_key: what the random generators of the present forward pass were seeded with; None:
            unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype | None = None,
        scaler: RanksGradScaler | None = None,
        micro_batches: int = 1,
        seed: int = -1,
        max_skipped: int = 50,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.precision, self.scaler = precision, scaler
        self.micro_batches = micro_batches
        self.random_key: tuple[int, ...] | None = None
        self._seed, self._max_skipped = seed, max_skipped
        self._skipped, self._skipped_in_row = 0, 0
        self._device = next(model.parameters()).device
        module = getattr(model, "module", model)
        if precision == torch.bfloat16 and self._device.type == "cpu":
            widen_inputs_of_strided_convs(module)
        joined = [m for m in module.modules() if isinstance(m, _COUNTED_ONCE)]
        self._once = list({id(b): b for m in joined for b in m.buffers()}.values())
        self._passes = 1 + any(isinstance(m, GuidedScale) for m in joined)

    @classmethod
    def from_config(cls, cfg: CfgNode, *parts: Any) -> StepTrainer:
        """Return the steps that SOLVER describes, of a model, a loader and an optimizer."""
        amp, scaler = cfg.SOLVER.AMP, None
        precision = PRECISIONS[amp.PRECISION] if amp.ENABLED else None
        if precision == torch.float16:
            device = torch.device(cfg.MODEL.DEVICE).type
            scaler = RanksGradScaler(device, init_scale=amp.INIT_SCALE)
        return cls(
            *parts,
            precision=precision,
            scaler=scaler,
            micro_batches=cfg.SOLVER.GRAD_ACCUM_STEPS,
            seed=cfg.SEED,
            max_skipped=amp.MAX_SKIPPED,
        )

    def run_step(self) -> None:
        """One step of the optimizer.

        Raises:
            NonFiniteLossError: too many overflows in a row.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        if self.micro_batches == 1:
            self.random_key = None
            if self._seed >= 0:  # of the hook SeedSteps
                self.random_key = (self._seed, comm.get_rank(), self.iter)
            losses = self._train_on(data)
        else:
            losses = self._accumulate(data)
        self._write_metrics(losses, data_time)
        self._update(data)

    def _train_on(
        self, data: list[dict[str, Any]], sums: MicroBatches | None = None
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch, or of one that `sums` splits; return its losses."""
        with nullcontext() if sums is None else sums.summed():
            losses = self._forward(self.model, data)
        total: Any = sum(losses.values())
        if sums is not None:
            total = total / sums.count
        (total if self.scaler is None else self.scaler.scale(total)).backward()
        self.after_backward()
        return losses

    def _forward(self, model: nn.Module, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        enabled = self.precision is not None
        with torch.autocast(self._device.type, dtype=self.precision, enabled=enabled):
            losses = model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _accumulate(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Add the gradients of the micro-batches; return the means of their losses."""
        size, rest = divmod(len(data), self.micro_batches)
        if rest:
            raise ValueError(f"{len(data)} images cannot be split into {self.micro_batches}.")
        parts = [data[i * size : (i + 1) * size] for i in range(self.micro_batches)]
        seed = self._seed if self._seed >= 0 else int(torch.randint(2**31, ()))
        keys: list[tuple[int, ...]] = [
            (seed, comm.get_rank(), self.iter, i) for i in range(len(parts))
        ]
        before = [buffer.clone() for buffer in self._once]
        sums = MicroBatches(len(parts))
        if self._once:
            for _ in range(self._passes):
                self._count(parts, keys, before, sums)
        found = []
        for i, part in enumerate(parts):
            _put_back(self._once, before)  # so that the state moves once, by the sums
            self.random_key = keys[i]
            seed_everything(*keys[i])
            last = i + 1 == len(parts)
            with nullcontext() if last else self._without_ddp_reduction():
                found.append(self._train_on(part, sums))
        with torch.no_grad():
            sums_of: dict[str, Any] = {n: sum(x[n] for x in found) for n in found[0]}
            return {name: value / len(found) for name, value in sums_of.items()}

    @torch.no_grad()
    def _count(
        self,
        parts: list[list[dict[str, Any]]],
        keys: list[tuple[int, ...]],
        before: list[Tensor],
        sums: MicroBatches,
    ) -> None:
        """Note the statistics of the micro-batches, and leave the model as it was."""
        module: Any = getattr(self.model, "module", self.model)
        buffers = list(module.buffers())
        saved = [buffer.clone() for buffer in buffers]
        with EventStorage(self.iter):  # what the heads log counts in the second pass
            for part, key in zip(parts, keys, strict=True):
                _put_back(self._once, before)
                seed_everything(*key)
                with sums.counting():
                    self._forward(module, part)
        sums.total()
        _put_back(buffers, saved)

    def _without_ddp_reduction(self) -> Any:
        ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if ddp else nullcontext()

    def _update(self, data: list[dict[str, Any]]) -> None:
        """The optimizer's step; left out where scaled gradients have overflowed."""
        if self.scaler is None:
            self.optimizer.step()
            return
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.overflowed
        self._skipped += skipped
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        storage = get_event_storage()
        storage.put_scalar("amp/scale", scale, smoothing_hint=False)
        storage.put_scalar("amp/skipped_steps", self._skipped, smoothing_hint=False)
        if self._skipped_in_row >= self._max_skipped:
            raise self._stuck(scale, data)
        if skipped:
            logger.warning(
                f"Iteration {self.iter}: gradients overflow {self.precision} at a loss scale of "
                f"{scale:g}; the step is skipped, and the scale is now "
                f"{self.scaler.get_scale():g}. {self._skipped} skipped in all."
            )

    @property
    def took_step(self) -> bool:
        """Whether the last iteration has changed the weights."""
        return self.scaler is None or not self.scaler.overflowed

    def _stuck(self, scale: float, data: list[dict[str, Any]]) -> NonFiniteLossError:
        gradients = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        name = first_non_finite(gradients).removeprefix("module.") or "unknown"
        return NonFiniteLossError(
            f"The gradients of {self._skipped_in_row} steps in a row were infinite or NaN, though "
            f"the losses were finite, and the loss scale has fallen to {scale:g}; the first such "
            f"gradient at iteration {self.iter} is that of {name}. Set SOLVER.AMP.PRECISION bf16 "
            "or SOLVER.AMP.ENABLED False.",
            iteration=self.iter,
            images=[image_name(record) for record in data],
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.scaler is not None:
            state["grad_scaler"] = self.scaler.state_dict()
            state["skipped"] = [self._skipped, self._skipped_in_row]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.scaler is not None and state.get("grad_scaler"):
            self.scaler.load_state_dict(state["grad_scaler"])
            self._skipped, self._skipped_in_row = state.get("skipped", [0, 0])


@torch.no_grad()
def _put_back(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


@contextmanager
def our_steps(cfg: CfgNode) -> Iterator[None]:
    """Inside of the block DefaultTrainer makes a `StepTrainer` instead of its own two."""
    before = defaults.SimpleTrainer, defaults.AMPTrainer

    def make(*parts: Any) -> StepTrainer:
        return StepTrainer.from_config(cfg, *parts)

    defaults.SimpleTrainer = defaults.AMPTrainer = make
    try:
        yield
    finally:
        defaults.SimpleTrainer, defaults.AMPTrainer = before


class RanksGradScaler(torch.amp.GradScaler):
    """A GradScaler that skips a step on every rank where one rank has an overflow.

    Attributes:
        overflowed: whether the last `step` was skipped.
    """

    overflowed = False

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        # DDP has averaged the gradients and ranks agree; a model that is not wrapped need not
        if comm.get_world_size() > 1:
            for value in found.values():
                dist.all_reduce(value, op=dist.ReduceOp.MAX)
        self.overflowed = any(value.item() for value in found.values())


def widen_inputs_of_strided_convs(model: nn.Module) -> None:
    """Keep oneDNN from the case in which its gradients are memory that was never written.

    That is the weight gradient of a 3 x 3 convolution with stride 2, in bfloat16 on a CPU, whose
    input is one column wide (torch 2.14): P7 of a small image. A second column of zeros is what
    the padding would have put there, and the output is the same.
    """

    def widen(conv: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if inputs[0].shape[-1] == 1:
            return (nn.functional.pad(inputs[0], (0, 1)), *inputs[1:])
        return None

    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size[1], module.stride[1]) == (3, 2)
            and module.padding_mode == "zeros"
            and module.padding[1] == 1
        ):
            module.register_forward_pre_hook(widen)


def clipped(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> torch.optim.Optimizer:
    """Return an optimizer that clips gradients before its steps, as SOLVER.CLIP_GRADIENTS says."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
        return maybe_add_gradient_clipping(cfg, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip_all(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_all)
    return optimizer
