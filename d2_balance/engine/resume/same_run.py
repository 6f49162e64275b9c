"""Whether a config continues the run that a checkpoint comes from."""

from __future__ import annotations

from typing import Any

import yaml
from detectron2.config import CfgNode

from d2_balance.data.checks.classes import num_classes_key
from d2_balance.utils.config_tree import leaves
from d2_balance.utils.names import listed

# With another value of these the checkpoint is one of another model.
MODEL_KEYS = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS.DEPTH",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.BALANCE.CLS_LOSS",
    "MODEL.BALANCE.BOX_LOSS",
    "MODEL.BALANCE.REWEIGHTERS",
    "MODEL.BALANCE.PROPOSAL_SAMPLER",
    "MODEL.BALANCE.ANCHOR_SAMPLER",
    "MODEL.BALANCE.RPN.CLS_LOSS",
    "MODEL.BALANCE.RPN.BOX_LOSS",
    "MODEL.BALANCE.RPN.ANCHOR_SAMPLER",
)
# With another value of the rest a run continues, but not as it would have without the stop.
_SECTIONS = ("MODEL.", "DATASETS.", "DATALOADER.", "INPUT.", "SOLVER.", "SEED")
_WITHOUT_EFFECT = (
    "MODEL.WEIGHTS",  # a resumed run does not read it
    "MODEL.DEVICE",
    "DATASETS.TEST",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
)
_SHOWN = 8  # keys that a message lists


def check_same_model(saved: str, cfg: CfgNode, source: str) -> None:
    """Refuse to continue a run with another architecture, number of classes or loss.

    Args:
        saved: config of the run, as `cfg.dump()` wrote it; keys that it lacks are not compared.
        cfg: config now.
        source: what `saved` comes from, for the message.

    Raises:
        ValueError: naming the keys, their values then and now, and what to do.
    """
    differing = _differing(saved, cfg)
    keys = [key for key in (*MODEL_KEYS, num_classes_key(cfg)) if key in differing]
    if keys:
        raise ValueError(
            f"--resume continues the same model, and {source} is of another one: "
            f"{_listed(keys, differing)}. Set what it was to continue, or start a run in another "
            "OUTPUT_DIR with MODEL.WEIGHTS set to the checkpoint."
        )


def changed_settings(saved: str, cfg: CfgNode) -> str:
    """Settings that make the rest of a run another one than without the stop; "" for none."""
    differing = _differing(saved, cfg)
    keys = [k for k in differing if k.startswith(_SECTIONS) and k not in _WITHOUT_EFFECT]
    return _listed(keys, differing)


def _differing(saved: str, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Keys of both with their values then and now, where these differ."""
    before = dict(leaves(yaml.safe_load(saved) or {}))
    now = dict(leaves(yaml.safe_load(cfg.dump())))
    return {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    }


def _listed(keys: list[str], differing: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} was {differing[key][0]!r} and is {differing[key][1]!r}" for key in keys]
    return listed(shown, _SHOWN)
