"""Names in messages and configs: a few of many, what looks like an unknown one, balanced parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

BALANCED = {
    "MODEL.META_ARCHITECTURE": {
        "RetinaNet": "BalancedRetinaNet",
        "FCOS": "BalancedFCOS",
        "GeneralizedRCNN": "BalancedRCNN",
        "PanopticFPN": "BalancedPanopticFPN",
    },
    "MODEL.ROI_HEADS.NAME": {
        "StandardROIHeads": "BalancedStandardROIHeads",
        "CascadeROIHeads": "BalancedCascadeROIHeads",
        "Res5ROIHeads": "BalancedRes5ROIHeads",
    },
    "MODEL.PROPOSAL_GENERATOR.NAME": {"RPN": "BalancedRPN"},
}
"""Parts of Detectron2 by config key, and the names of the forms that read MODEL.BALANCE."""


def closest(name: str, allowed: Iterable[str]) -> str:
    """The end of a message: names that look like `name`, or all of them if few."""
    allowed = sorted(allowed)
    similar = get_close_matches(name, allowed, n=3, cutoff=0.6)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"must be one of {', '.join(allowed)}." if len(allowed) <= 30 else ""


def listed(texts: Sequence[object], limit: int = 5) -> str:
    """The first texts, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(map(str, texts[:limit])) + more
