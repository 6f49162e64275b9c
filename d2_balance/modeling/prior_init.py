"""What a counted prior (`d2-balance prior`) sets in a model: initial bias and score thresholds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from d2_balance.data.model_classes import ModelClasses, read_checkpoint
from d2_balance.data.priors.foreground import ForegroundPrior, PartCount
from d2_balance.data.priors.sample_counts import PARTS, RPN

_FILE, _THRESHOLDS = "MODEL.BALANCE.PRIOR_FILE", "MODEL.BALANCE.CLASS_THRESHOLDS"

logger = logging.getLogger(__name__)


def load_prior(cfg: CfgNode) -> ForegroundPrior | None:
    """The counts of MODEL.BALANCE.PRIOR_FILE; None if that is empty.

    None as well if the file is missing and MODEL.WEIGHTS were trained with a prior, which lies in
    the bias of their classifiers.

    Raises:
        ValueError: the file cannot be read, or MODEL.BALANCE.CLASS_THRESHOLDS has none.
    """
    path = cfg.MODEL.BALANCE.PRIOR_FILE
    if not path:
        if cfg.MODEL.BALANCE.CLASS_THRESHOLDS:
            raise _no_file()
        return None
    if not PathManager.isfile(path) and _in_weights(cfg.MODEL.WEIGHTS):
        logger.info(f"{_FILE}: {path} is not here; the prior is that of MODEL.WEIGHTS.")
        return None
    try:
        return ForegroundPrior.load(path)
    except ValueError as error:
        raise ValueError(f"{_FILE}: {error}") from error


def wanted_thresholds(cfg: CfgNode, prior: ForegroundPrior | None) -> bool | Sequence[float]:
    """Whether classes have thresholds of their own, for `set_class_thresholds`.

    Those that are saved with MODEL.WEIGHTS take the place of a file that is missing.
    """
    if not cfg.MODEL.BALANCE.CLASS_THRESHOLDS or prior is not None:
        return bool(cfg.MODEL.BALANCE.CLASS_THRESHOLDS)
    saved = ModelClasses.of_weights(cfg.MODEL.WEIGHTS)
    return True if saved is None or saved.score_thresholds is None else saved.score_thresholds


def _in_weights(weights: str) -> bool:
    model = read_checkpoint(weights).get("model", {}) if weights.endswith(".pth") else {}
    return any(name.endswith("foreground_prior") for name in model)


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
    owner: nn.Module,
    wanted: bool | Sequence[float],
    prior: ForegroundPrior | None,
    part: str,
    num_classes: int,
) -> None:
    """Replace `owner.test_score_thresh` by a (K,) buffer, which Detectron2 compares by columns.

    It belongs to this training set, not to the weights, and is not saved with them.

    Args:
        owner: the head.
        wanted: False leaves the threshold, True takes those of `prior`, K numbers are taken.
        prior: counts.
        part: entry of `PARTS`.
        num_classes: K.

    Raises:
        ValueError: there are no counts, or they do not fit.
    """
    if wanted is False:
        return
    if isinstance(wanted, bool):
        if prior is None:
            raise _no_file()
        _count(prior, part, num_classes)
        thresholds = prior.class_thresholds(part).float()
    else:
        thresholds = torch.tensor(wanted)
    del owner.test_score_thresh
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
