"""Refuses settings that the chosen model would leave unused without a word."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN

from d2_balance.config import add_balance_config
from d2_balance.utils.config_tree import leaves, value_of
from d2_balance.utils.names import BALANCED


def check_losses_are_used(cfg: CfgNode) -> None:
    """Refuse losses that a stock model would leave unused without a word.

    Raises:
        ValueError: saying which model or heads to set.
    """
    balance = cfg.MODEL.BALANCE
    check_rpn_losses_are_used(cfg)
    check_regions_are_used(cfg)
    keys = (
        "CLS_LOSS",
        "BOX_LOSS",
        "REWEIGHTERS",
        "PROPOSAL_SAMPLER",
        "ANCHOR_SAMPLER",
        "GUIDED_SCALE",
        "PRIOR_FILE",
        "CLASS_THRESHOLDS",
    )
    wanted = [f"MODEL.BALANCE.{key}" for key in keys if balance[key]]
    if balance.BETA_DECAY.ENABLED:
        wanted.append("MODEL.BALANCE.BETA_DECAY.ENABLED")
    if not wanted:
        return
    arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    parts = {"MODEL.META_ARCHITECTURE": arch}
    if issubclass(arch, GeneralizedRCNN):
        parts["MODEL.ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
    changes = []
    for key, cls in parts.items():
        balanced = BALANCED[key]
        if not cls.__module__.startswith("detectron2."):
            continue  # ours, or a user's own
        if cls.__name__ in balanced:
            changes.append(f"{key} {balanced[cls.__name__]} in place of {cls.__name__}")
        else:
            allowed = ", ".join(balanced.values())
            changes.append(f"{key} to one of {allowed}; {cls.__name__} has no balanced form")
    if changes:
        verb, them = ("is", "it") if len(wanted) == 1 else ("are", "them")
        raise ValueError(
            f"{', '.join(wanted)} {verb} set, but the model would not use {them}: set "
            f"{' and '.join(changes)}."
        )


def check_rpn_losses_are_used(cfg: CfgNode) -> None:
    """Refuse keys of MODEL.BALANCE.RPN where there is no BalancedRPN to use them.

    Raises:
        ValueError: saying what to set.
    """
    stock = get_cfg()
    add_balance_config(stock)
    default = dict(leaves(stock.MODEL.BALANCE.RPN, "MODEL.BALANCE.RPN."))
    now = dict(leaves(cfg.MODEL.BALANCE.RPN, "MODEL.BALANCE.RPN."))
    changed = [key for key, value in now.items() if value != default.get(key)]
    if not changed:
        return
    arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if issubclass(arch, DenseDetector):
        raise ValueError(
            f"{', '.join(changed)} set losses of the RPN and {arch.__name__} has no RPN; take them "
            "out, or set MODEL.META_ARCHITECTURE BalancedRCNN."
        )
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if balanced := BALANCED["MODEL.PROPOSAL_GENERATOR.NAME"].get(name):
        raise ValueError(
            f"{', '.join(changed)} set losses of the RPN, but {name} would not use them: set "
            f"MODEL.PROPOSAL_GENERATOR.NAME {balanced}."
        )


def check_regions_are_used(cfg: CfgNode) -> None:
    """Refuse ignore regions, and sets that have boxes without masks, in parts that ignore them.

    Raises:
        ValueError: saying what to set.
    """
    wanted = [k for k in ("IGNORE_REGIONS", "EXTERNAL") if cfg.DATASETS[k]]
    if not wanted:
        return
    arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    # the names of other parts than the first belong to two-stage models
    keys = list(BALANCED) if issubclass(arch, GeneralizedRCNN) else ["MODEL.META_ARCHITECTURE"]
    names = {key: BALANCED[key].get(value_of(cfg, key)) for key in keys}
    changes = [f"{key} {name}" for key, name in names.items() if name]
    if changes:
        raise ValueError(
            f"DATASETS.{wanted[0]} gives ignore regions or boxes without masks, which parts of the "
            f"model do not know: set {' and '.join(changes)}."
        )
