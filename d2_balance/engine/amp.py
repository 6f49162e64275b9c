"""Mixed precision: its keys, and a gradient scaler whose ranks skip a step together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_step(cfg: CfgNode) -> None:
    """Checks SOLVER.AMP and SOLVER.GRAD_ACCUM_STEPS.

    Raises:
        ValueError: naming the key and what is allowed.
    """
    amp, ranks = cfg.SOLVER.AMP, comm.get_world_size()
    if amp.PRECISION not in PRECISIONS:
        raise ValueError(
            f"SOLVER.AMP.PRECISION is {amp.PRECISION!r}; must be one of {', '.join(PRECISIONS)}."
        )
    if not 0 < amp.INIT_SCALE < float("inf") or amp.MAX_SKIPPED < 1:
        raise ValueError(
            f"SOLVER.AMP.INIT_SCALE is {amp.INIT_SCALE} and MAX_SKIPPED {amp.MAX_SKIPPED}; allowed "
            "are a number above 0 and an integer of at least 1."
        )
    cuda = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    if amp.ENABLED and amp.PRECISION == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise ValueError("SOLVER.AMP.PRECISION bf16 is beyond this GPU; set fp16.")
    count, batch = cfg.SOLVER.GRAD_ACCUM_STEPS, cfg.SOLVER.IMS_PER_BATCH
    if count < 1 or batch % (ranks * count):
        raise ValueError(
            f"SOLVER.GRAD_ACCUM_STEPS is {count}; must be an integer of at least 1 that divides "
            f"the images of a rank, SOLVER.IMS_PER_BATCH {batch} over {ranks} processes."
        )


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
    """Keeps oneDNN from the case in which its gradients are memory that was never written.

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
