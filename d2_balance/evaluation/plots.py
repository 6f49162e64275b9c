"""Images of an evaluation."""

import math
from collections.abc import Sequence

from d2_balance.data.groups import GROUPS
from d2_balance.utils.files import atomic_path
from d2_balance.utils.plotting import GROUP_COLOURS, count_ticks, new_figure

_MAX_LABELS = 30
# Where a label may stand beside its point: (dx, dy) in points, horizontal, vertical alignment.
_PLACES = (
    (5, 4, "left", "bottom"),
    (5, -4, "left", "top"),
    (-5, 4, "right", "bottom"),
    (-5, -4, "right", "top"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
)


def plot_ap_by_count(
    per_class: dict[str, dict], path: str, metric: str = "AP", title: str | None = None
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
        if r.get("train_image_count") is not None and not _missing(r.get(metric))
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
    _write_names(figure, axes, points)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_group(axes, points: Sequence[tuple], group: str | None) -> None:
    if not points:
        return
    counts, values = [p[0] for p in points], [p[1] for p in points]
    mean = sum(values) / len(values)
    name = GROUPS.get(group, "no group")
    label = f"{name}: mean {mean:.1f} ({len(points)} class{'es' * (len(points) > 1)})"
    colour = GROUP_COLOURS[group]
    size = 28 if len(points) <= 100 else 10
    axes.scatter(counts, values, s=size, color=colour, alpha=0.75, linewidths=0, zorder=3)
    # A group of one count would have a line of no length: widen by a fifth either way.
    axes.plot(
        [min(counts) / 1.2, max(counts) * 1.2], [mean, mean], color=colour, lw=1.8, label=label
    )


def _style_axes(axes, points: Sequence[tuple], metric: str) -> None:
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.6, high * 1.9)
    axes.set_ylim(-3, min(max(max(p[1] for p in points) * 1.15, 10), 104))
    zero = [0.5] if low < 1 else []
    ticks = count_ticks(low / 1.6, high * 1.9)
    axes.set_xticks([*zero, *ticks], ["0"] * len(zero) + [f"{t:,}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training images that show the class")
    axes.set_ylabel(f"{metric} (%)")
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _write_names(figure, axes, points: Sequence[tuple]) -> None:
    """Write class names where they cover neither a point nor another name."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [line.get_window_extent().padded(2) for line in axes.lines]
    written = 0
    dots = axes.transData.transform([p[:2] for p in points])
    reach = 4 * figure.dpi / 72  # radius of a point, and some air, in pixels
    for index in _by_interest(points)[: 5 * _MAX_LABELS]:
        if written == _MAX_LABELS:
            return
        count, value, group, name = points[index]
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                name,
                (count, value),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7,
                color=GROUP_COLOURS[group],
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


def _by_interest(points: Sequence[tuple]) -> list[int]:
    """Order of naming: groups in turn, in each the classes farthest from its mean first."""
    ranked = []
    for group in {p[2] for p in points}:
        members = [i for i, p in enumerate(points) if p[2] == group]
        mean = sum(points[i][1] for i in members) / len(members)
        members.sort(key=lambda i: -abs(points[i][1] - mean))
        ranked += enumerate(members)
    return [index for _, index in sorted(ranked)]


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
