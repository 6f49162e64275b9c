"""What all plots share: figures without pyplot, the colours of groups, ticks of counts."""

from __future__ import annotations

import math

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GROUP_COLOURS = {"r": "#D55E00", "c": "#009E73", "f": "#0072B2", None: "#666666"}
"""Colours of frequency groups, told apart with any colour vision (Okabe and Ito)."""


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """Return a figure made without pyplot, so that a caller's own backend stays."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def count_ticks(low: float, high: float) -> list[int]:
    """Return integers from `low` to `high` that divide a log axis well."""
    decades = [10**k for k in range(math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 2, 5), range(1, 10)):
        ticks = sorted({t * m for t in decades for m in steps if low <= t * m <= high})
        if len(ticks) >= 4:
            break
    return ticks
