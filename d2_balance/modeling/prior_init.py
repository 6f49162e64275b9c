"""What a counted prior (`d2-balance prior`) sets in a model: initial bias and score thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from d2_balance.data.priors.foreground import ForegroundPrior, PartCount
from d2_balance.data.priors.sample_counts import PARTS, RPN

_FILE, _THRESHOLDS = "MODEL.BALANCE.PRIOR_FILE", "MODEL.BALANCE.CLASS_THRESHOLDS"


def load_prior(cfg: CfgNode) -> ForegroundPrior | None:
    """The counts of MODEL.BALANCE.PRIOR_FILE; None if that is empty.

    Raises:
        ValueError: the file cannot be read, or MODEL.BALANCE.CLASS_THRESHOLDS has none.
    """
    path = cfg.MODEL.BALANCE.PRIOR_FILE
    if not path:
        if cfg.MODEL.BALANCE.CLASS_THRESHOLDS:
            raise _no_file()
        return None
    try:
        return ForegroundPrior.load(path)
    except ValueError as error:
        raise ValueError(f"{_FILE}: {error}") from error


def set_class_prior(
    owner: nn.Module,
    classifier: Any,
    prior: ForegroundPrior,
    part: str,
    num_classes: int,
    logit: Callable[[float], float] | None = None,
) -> None:
    """Start a classifier of separate classes at the counted prior, `owner.foreground_prior`.

    Args:
        owner: gets the buffer.
        classifier: last layer, with a bias.
        prior: counts.
        part: entry of `PARTS`, the classifiers that are counted.
        num_classes: K of the owner; 1 in the RPN.
        logit: the logit of a probability; None is that of the sigmoid.

    Raises:
        ValueError: the counts lack this classifier, or are of other classes.
    """
    count = _count(prior, part, num_classes)
    nn.init.constant_(classifier.bias, count.bias if logit is None else logit(count.prior))
    owner.register_buffer("foreground_prior", torch.tensor(count.prior, dtype=torch.float64))


def set_softmax_prior(
    owner: nn.Module, classifier: nn.Linear, prior: ForegroundPrior, part: str, num_classes: int
) -> None:
    """As `set_class_prior` for a softmax: classes have bias 0, background, the last, above."""
    if classifier.out_features != num_classes + 1:
        raise ValueError(
            f"{_FILE} sets the start of softmax losses with one output for each class and one for "
            f'background; this one has {classifier.out_features - num_classes - 1} more: set "".'
        )
    count = _count(prior, part, num_classes)
    nn.init.zeros_(classifier.bias)
    nn.init.constant_(classifier.bias[-1:], count.background_bias)
    owner.register_buffer("foreground_prior", torch.tensor(count.prior, dtype=torch.float64))


def set_class_thresholds(
    owner: nn.Module, prior: ForegroundPrior | None, part: str, num_classes: int
) -> None:
    """Replace `owner.test_score_thresh` by a (K,) buffer, which Detectron2 compares by columns.

    It belongs to this training set, not to the weights, and is not saved with them.

    Raises:
        ValueError: there are no counts, or they do not fit.
    """
    if prior is None:
        raise _no_file()
    _count(prior, part, num_classes)
    del owner.test_score_thresh
    thresholds = prior.class_thresholds(part).float()
    owner.register_buffer("test_score_thresh", thresholds, persistent=False)


def _count(prior: ForegroundPrior, part: str, num_classes: int) -> PartCount:
    source = prior.source or "the prior"
    if part not in prior.parts:
        counted = ", ".join(name for name in PARTS if name in prior.parts) or "nothing"
        raise ValueError(
            f"{_FILE}: {source} has counts of {counted} and the model needs those of {part}; run "
            "`d2-balance prior` with the configuration of this model."
        )
    classes = 1 if part == RPN else len(prior.class_names)
    if classes != num_classes or prior.parts[part].outputs != num_classes:
        raise ValueError(
            f"{_FILE}: {source} was counted for {prior.parts[part].outputs} outputs of {part} and "
            f"{len(prior.class_names)} classes, and the model has {num_classes}; run `d2-balance "
            "prior` with the configuration of this model."
        )
    return prior.parts[part]


def _no_file() -> ValueError:
    return ValueError(
        f"{_THRESHOLDS} True needs {_FILE}, which is empty; must be a file that `d2-balance "
        "prior --output FILE` wrote."
    )
