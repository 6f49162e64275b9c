"""Learning rate and schedule for another batch size, and a word where they were forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode

from d2_balance.utils.config_tree import value_of
from d2_balance.utils.rules import check_values

from .config_file import config_layers
from .rules import RULES

_LENGTHS = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS")
_PERIODS = (
    "TEST.EVAL_PERIOD",
    "TEST.LOSS.PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
    "MODEL.BALANCE.BETA_DECAY.PERIOD",
)
_BATCH, _RATE = "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR"


def check_reference_batch(cfg: CfgNode) -> None:
    """Check SOLVER.REFERENCE_IMS_PER_BATCH, and that nothing else scales.

    Raises:
        ValueError: naming the key.
    """
    check_values(cfg, RULES, "SOLVER.REFERENCE_IMS_PER_BATCH")
    if cfg.SOLVER.REFERENCE_IMS_PER_BATCH and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            "SOLVER.REFERENCE_IMS_PER_BATCH scales by IMS_PER_BATCH and "
            "SOLVER.REFERENCE_WORLD_SIZE by the number of GPUs; one of them must be 0."
        )


def scale_to_batch(cfg: CfgNode) -> str:
    """Scale a config that was made for SOLVER.REFERENCE_IMS_PER_BATCH images to IMS_PER_BATCH.

    The learning rate grows with the batch (Goyal et al., arXiv:1706.02677); lengths, steps and
    periods shrink, so that as many images are seen. REFERENCE_IMS_PER_BATCH is IMS_PER_BATCH
    afterwards, so that the config is not scaled twice.

    Args:
        cfg: not frozen; changed in place.

    Returns:
        What was changed, for the log; "" for nothing.

    Raises:
        ValueError: see `check_reference_batch`.
    """
    check_reference_batch(cfg)
    before, now = cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if before in (0, now) or now < 1:
        return ""
    scale = now / before
    cfg.SOLVER.BASE_LR *= scale
    cfg.SOLVER.STEPS = tuple(round(step / scale) for step in cfg.SOLVER.STEPS)
    for key in (*_LENGTHS, *_PERIODS):
        path, _, name = key.rpartition(".")
        node = value_of(cfg, path)
        if node[name] > 0:
            node[name] = max(round(node[name] / scale), 1)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = now
    return (
        f"The config was made for a batch of {before} and is scaled to {now}: BASE_LR "
        f"{cfg.SOLVER.BASE_LR:g}, WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS}, MAX_ITER "
        f"{cfg.SOLVER.MAX_ITER}, STEPS {cfg.SOLVER.STEPS}."
    )


def batch_warning(cfg: CfgNode, config_file: str = "", overrides: Sequence[str] = ()) -> str:
    """Say so where IMS_PER_BATCH was changed and the learning rate of another batch was kept.

    A learning rate belongs to the batch of the file, or of the command line, that sets it.

    Args:
        cfg: the config that they give.
        config_file: YAML, as given to `read_config`.
        overrides: as given to `read_config`.

    Returns:
        The message; "" where there is nothing to say.
    """
    if cfg.SOLVER.REFERENCE_IMS_PER_BATCH:
        return ""
    batch = rate_batch = 16  # Detectron2's default, of the model zoo too
    where = "Detectron2's defaults"
    layers = [
        (path, {f"SOLVER.{key}": value for key, value in (layer.get("SOLVER") or {}).items()})
        for path, layer in (config_layers(config_file) if config_file else ())
    ]
    for source, values in (*layers, ("the command line", _pairs(overrides))):
        batch = values.get(_BATCH, batch)
        if _RATE in values:
            rate_batch, where = batch, source
    if batch == rate_batch or batch != cfg.SOLVER.IMS_PER_BATCH:
        return ""
    rate = cfg.SOLVER.BASE_LR
    return (
        f"{_BATCH} is {batch}, and {_RATE} {rate:g} was chosen for {rate_batch} ({where}). "
        f"SOLVER.REFERENCE_IMS_PER_BATCH {rate_batch} scales it to "
        f"{rate * batch / rate_batch:g}, and the schedule with it; or set {_RATE} yourself."
    )


def _pairs(overrides: Sequence[str]) -> dict[str, Any]:
    values = {}
    for key, value in zip(overrides[::2], overrides[1::2], strict=False):
        if key in (_BATCH, _RATE):
            values[key] = yaml.safe_load(value) if isinstance(value, str) else value
    return values
