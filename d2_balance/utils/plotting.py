"""What all plots share: figures without pyplot, colours, axes, names of points, files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#666666")
"""Colours of curves, runs or classes, in this order."""

GROUP_COLOURS = {"r": "#D55E00", "c": "#009E73", "f": "#0072B2", None: "#666666"}
"""Colours of frequency groups."""


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """Return a figure made without pyplot, so that a caller's own backend stays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # commands without plots do without
    from matplotlib.figure import Figure

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


def count_axis(
    axes: Axes, counts: Sequence[float], before: float = 1.4, after: float = 1.4
) -> None:
    """Make the x axis a logarithm of counts; one of 0 stands at 0.5, left of 1.

    Args:
        axes: what to change.
        counts: of all points, 0.5 for 0.
        before: air on the left, as a factor above 1.
        after: air on the right.
    """
    low, high = min(counts) / before, max(counts) * after
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    zero = [0.5] if min(counts) < 1 else []
    ticks = count_ticks(low, high)
    axes.set_xticks([*zero, *ticks], ["0"] * len(zero) + [f"{t:,}" for t in ticks])
    axes.set_xticks([], minor=True)


def style_axes(axes: Axes, grid: str = "both") -> None:
    """Draw a light grid behind the data, and no frame above and to the right.

    Args:
        axes: what to style.
        grid: "x", "y" or "both": lines at the ticks of these axes.
    """
    axes.grid(axis=grid, color="#dddddd", lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure as PNG; a file that is there is replaced atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


# Where a name may stand beside its point: (dx, dy) in points, horizontal, vertical alignment.
_PLACES = (
    (5, 4, "left", "bottom"),
    (5, -4, "left", "top"),
    (-5, 4, "right", "bottom"),
    (-5, -4, "right", "top"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
)


def name_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colours: Sequence[str],
    order: Sequence[int],
    limit: int = 30,
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write names beside points where they cover neither a point nor another name.

    Args:
        axes: of a figure whose limits and lines are final.
        points: x and y of each point.
        names: their names.
        colours: their colours.
        order: indices of the points to name, the most interesting first.
        limit: names to write at most.
        others: points that have no name and are not covered either.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = []
    covered = [*points, *others]
    for line in axes.lines:
        vertices = np.asarray(line.get_xydata()).tolist()
        if len(vertices) <= 2:
            taken.append(line.get_window_extent().padded(2))
        else:  # the box around a curve is mostly empty
            covered += vertices
    dots = axes.transData.transform(covered)
    reach = 4 * figure.dpi / 72  # radius of a point, and some air, in pixels
    written = 0
    for index in order[: 5 * limit]:
        if written == limit:
            return
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                names[index],
                points[index],
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7,
                color=colours[index],
            )
            box = text.get_window_extent()
            clear = not any(
                box.x0 - reach < x < box.x1 + reach and box.y0 - reach < y < box.y1 + reach
                for n, (x, y) in enumerate(dots)
                if n != index
            )
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0
            if clear and inside and box.y1 <= frame.y1 and not box.count_overlaps(taken):
                taken.append(box)
                written += 1
                break
            text.remove()
