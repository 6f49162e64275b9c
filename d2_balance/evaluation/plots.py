"""Images of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from d2_balance.data.groups import GROUPS
from d2_balance.utils.plotting import (
    GROUP_COLOURS,
    count_axis,
    name_points,
    new_figure,
    save_figure,
    style_axes,
)
from d2_balance.utils.text import plural

from .record import Records, is_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float, str | None, str]
"""Training images, AP, frequency group and name of a class."""


def plot_ap_by_count(
    per_class: Records, path: str, metric: str = "AP", title: str | None = None
) -> None:
    """Draw AP of each class against its number of training images, as PNG.

    Points are coloured by frequency group, a line marks the mean of each group, and as many class
    names are written as fit. Classes without ground truth (AP NaN) or without a count are left
    out and counted in a note below the plot. A count of 0 stands left of 1.

    Args:
        per_class: records of an evaluator (`per_class`) or of `read_per_class`.
        path: file to write; replaced atomically.
        metric: key of the records: AP, AP50, AP_segm or AP50_segm, in percent.
        title: heading; None: "<metric> of each class by training images".

    Raises:
        ValueError: no class that has both the metric and a count.
    """
    points = [
        (max(r["train_image_count"], 0.5), r[metric], r.get("group"), name)
        for name, r in per_class.items()
        if r.get("train_image_count") is not None and not is_missing(r.get(metric))
    ]
    if not points:
        raise ValueError(f"{path}: no class has both {metric} and a number of training images")
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    for group in (*GROUPS, None):
        _draw_group(axes, [p for p in points if p[2] == group], group)
    _style_axes(axes, points, metric)
    # The legend stands between title and axes, where it can cover no class.
    axes.set_title(title or f"{metric} of each class by training images", fontsize=11, pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, fontsize=8, frameon=False)
    left_out = len(per_class) - len(points)
    if left_out:
        note = f"{left_out} of {len(per_class)} classes not shown: no ground truth or no count"
        figure.supxlabel(note, fontsize=8, color="#555555", x=0.99, ha="right")
    colours = [GROUP_COLOURS[p[2]] for p in points]
    order = _by_interest(points)
    name_points(axes, [p[:2] for p in points], [p[3] for p in points], colours, order)
    save_figure(figure, path)


def _draw_group(axes: Axes, points: Sequence[Point], group: str | None) -> None:
    if not points:
        return
    counts, values = [p[0] for p in points], [p[1] for p in points]
    mean = sum(values) / len(values)
    name = GROUPS[group] if group else "no group"
    label = f"{name}: mean {mean:.1f} ({plural(len(points), 'class')})"
    colour = GROUP_COLOURS[group]
    size = 28 if len(points) <= 100 else 10
    axes.scatter(counts, values, s=size, color=colour, alpha=0.75, linewidths=0, zorder=3)
    # A group of one count would have a line of no length: widen by a fifth either way.
    axes.plot(
        [min(counts) / 1.2, max(counts) * 1.2], [mean, mean], color=colour, lw=1.8, label=label
    )


def _style_axes(axes: Axes, points: Sequence[Point], metric: str) -> None:
    count_axis(axes, [p[0] for p in points], 1.6, 1.9)
    axes.set_ylim(-3, min(max(max(p[1] for p in points) * 1.15, 10), 104))
    axes.set_xlabel("training images that show the class")
    axes.set_ylabel(f"{metric} (%)")
    style_axes(axes)


def _by_interest(points: Sequence[Point]) -> list[int]:
    """Order of naming: groups in turn, in each the classes farthest from its mean first."""
    ranked: list[tuple[int, int]] = []
    for group in {p[2] for p in points}:
        members = [i for i, p in enumerate(points) if p[2] == group]
        mean = sum(points[i][1] for i in members) / len(members)
        members.sort(key=lambda i: -abs(points[i][1] - mean))
        ranked += enumerate(members)
    return [index for _, index in sorted(ranked)]
