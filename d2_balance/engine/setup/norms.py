"""Normalisation that joins the ranks: where it works."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm

NORMS = ("RESNETS.NORM", "FPN.NORM", "ROI_BOX_HEAD.NORM", "ROI_MASK_HEAD.NORM", "RETINANET.NORM")

logger = logging.getLogger(__name__)


def check_norms(cfg: CfgNode) -> None:
    """Check that norms which join the ranks can do so on the device.

    On one process SyncBN is a batch norm, on the CPU as well; several processes can join on GPUs
    only, and PyTorch says so in the middle of the first step.

    Raises:
        ValueError: naming the keys and what works.
    """
    keys = [f"MODEL.{key}" for key in NORMS if _norm(cfg, key) in ("SyncBN", "nnSyncBN")]
    if not keys or cfg.MODEL.DEVICE != "cpu":
        return
    if comm.get_world_size() > 1:
        raise ValueError(
            f"{', '.join(keys)} SyncBN cannot join {comm.get_world_size()} processes on the CPU; "
            "must be naiveSyncBN, which can, BN or GN."
        )
    logger.warning(f"{', '.join(keys)}: SyncBN is a plain batch norm of this one process.")


def _norm(cfg: CfgNode, key: str) -> str:
    part, name = key.split(".")
    return cfg.MODEL[part][name]
