"""Training of chosen parts of a model, with everything else frozen.

Decoupled training (Kang et al., arXiv:1910.09217) learns the features first and the classifier
afterwards, with another sampling or loss. BAGS trains the last classifier layer of a trained model,
LOCE the output layers, the RPN and the mask head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2_balance.utils.names import closest

KEY = "MODEL.BALANCE.TRAINABLE"
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

logger = logging.getLogger(__name__)


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze every parameter whose name holds none of `names`, in place.

    Batch norms that have no parameter left to train become Detectron2's FrozenBatchNorm2d: their
    running statistics stay as they are loaded, in training mode too. Names in checkpoints stay.
    What is frozen already stays frozen.

    Args:
        model: before it is wrapped in DDP and before its optimizer is made.
        names: parts of names of parameters, such as "box_predictor.cls_score"; empty: leaves the
            model alone.

    Raises:
        ValueError: an entry is no part of the name of a parameter that trains.
    """
    if not names:
        return
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for entry in names:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"{KEY}: {entry!r} must be a part of a parameter's name.")
        if not any(entry in name for name in trained):
            raise ValueError(
                f"{KEY}: {entry!r} is no part of the name of a parameter that trains; "
                f"{_hint(entry, trained)}"
            )
    kept = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad &= any(entry in name for entry in names)
        kept += parameter.requires_grad
    frozen = _freeze_batch_norms(model)
    logger.info(
        f"{KEY}: {kept} of {len(trained)} parameters train; {frozen} batch norms keep their "
        "statistics."
    )


def _hint(entry: str, names: Sequence[str]) -> str:
    """Parts of names of the same depth that look like `entry`."""
    depth = entry.count(".") + 1
    parts = set()
    for name in names:
        names = name.split(".")
        for length in {depth, 1}:
            parts |= {".".join(names[i : i + length]) for i in range(len(names) - length + 1)}
    return closest(entry, (part for part in parts if not part.isdigit())) or (
        "it must be a part such as roi_heads.box_predictor, or the whole name."
    )


def _freeze_batch_norms(model: nn.Module) -> int:
    """Replace the batch norms without a parameter that trains; return how many."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BATCH_NORMS):
                continue
            # RetinaNet's norms of levels share the parameters of the list that holds them
            own = list(child.parameters()) or list(parent.parameters())
            if not any(p.requires_grad for p in own):
                parent.add_module(name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
                replaced += 1
    return replaced
