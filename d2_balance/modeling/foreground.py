"""What a counted prior (`d2-balance prior`) sets in a model: start bias and score thresholds."""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..data.prior import PARTS, RPN, ForegroundPrior, PartCount

_KEY = "MODEL.BALANCE.PRIOR_FILE"


def part_prior(cfg: CfgNode, part: str, num_classes: int) -> PartCount | None:
    """Counts of a part of the model from MODEL.BALANCE.PRIOR_FILE; None where that is empty.

    Args:
        cfg: full config.
        part: one of `PARTS`.
        num_classes: K of the model, 1 in the RPN.

    Raises:
        ValueError: the file cannot be read, lacks the part, or was counted for other classes.
    """
    return _checked(cfg, part, num_classes).parts[part] if cfg.MODEL.BALANCE.PRIOR_FILE else None


def class_thresholds(cfg: CfgNode, part: str, num_classes: int) -> Tensor | None:
    """(K,) score thresholds where MODEL.BALANCE.CLASS_THRESHOLDS is True; else None.

    Raises:
        ValueError: there is no MODEL.BALANCE.PRIOR_FILE, or as `part_prior`.
    """
    if not cfg.MODEL.BALANCE.CLASS_THRESHOLDS:
        return None
    if not cfg.MODEL.BALANCE.PRIOR_FILE:
        raise ValueError(
            f"MODEL.BALANCE.CLASS_THRESHOLDS True needs {_KEY}, which is empty; allowed is a file "
            "that `d2-balance prior --output FILE` wrote."
        )
    return _checked(cfg, part, num_classes).class_thresholds(part)


def _checked(cfg: CfgNode, part: str, num_classes: int) -> ForegroundPrior:
    path = cfg.MODEL.BALANCE.PRIOR_FILE
    try:
        prior = ForegroundPrior.load(path)
    except ValueError as error:
        raise ValueError(f"{_KEY}: {error}") from error
    if part not in prior.parts:
        found = ", ".join(name for name in PARTS if name in prior.parts) or "nothing"
        raise ValueError(
            f"{_KEY}: {path} has counts of {found} and the model needs those of {part}; run "
            "`d2-balance prior` with the configuration of this model."
        )
    classes = 1 if part == RPN else len(prior.class_names)
    if classes != num_classes or prior.parts[part].outputs != num_classes:
        raise ValueError(
            f"{_KEY}: {path} was counted for {prior.parts[part].outputs} outputs and "
            f"{len(prior.class_names)} classes, but the model has {num_classes}; run `d2-balance "
            "prior` with the configuration of this model."
        )
    return prior


def prior_bias(prior: float) -> float:
    """Bias of a sigmoid that starts at `prior`, in (0, 1)."""
    return -math.log((1 - prior) / prior)


def set_prior(owner: nn.Module, classifier: nn.Module, count: PartCount | None) -> None:
    """Starts a sigmoid classifier at the counted prior, kept in `owner.foreground_prior`.

    Args:
        owner: gets the buffer.
        classifier: last layer, with a bias.
        count: None changes nothing.
    """
    if count is not None:
        nn.init.constant_(classifier.bias, count.bias)
        owner.register_buffer("foreground_prior", torch.tensor(count.prior, dtype=torch.float64))


def set_softmax_prior(owner: nn.Module, classifier: nn.Linear, count: PartCount | None) -> None:
    """The same for a softmax whose last output is background: classes 0, background above them."""
    if count is not None:
        nn.init.zeros_(classifier.bias)
        nn.init.constant_(classifier.bias[-1:], count.background_bias)
        owner.register_buffer("foreground_prior", torch.tensor(count.prior, dtype=torch.float64))


def set_class_thresholds(owner: nn.Module, thresholds: Tensor | None) -> None:
    """Replaces `owner.test_score_thresh` by a (K,) buffer, which Detectron2 compares by columns.

    It belongs to this training set, not to the weights, and is not saved with them.
    """
    if thresholds is not None:
        del owner.test_score_thresh
        owner.register_buffer("test_score_thresh", thresholds.float(), persistent=False)
