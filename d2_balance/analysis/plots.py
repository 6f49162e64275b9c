"""Images of an analysis. K: classes, S: objects that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from d2_balance.data.groups import GROUPS
from d2_balance.utils.plotting import GROUP_COLOURS, count_ticks, new_figure, style_axes

from .report import Analysis
from .tail import tail_at

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .anchors import AnchorReport
    from .table import DataTable
    from .tail import RepeatFactors

NAMED = 60  # classes whose names fit below an axis
LIGHT = "#BBBBBB"


def box_sizes(found: Analysis) -> tuple[np.ndarray, str]:
    """(S,) roots of box areas, and whose pixels they are in."""
    table = _table(found)
    kept = ~table.crowd
    area = np.sqrt(table.boxes[kept, 2] * table.boxes[kept, 3])
    if found.cfg is None:
        return area, "the images as they are"
    scale = np.ones(len(table.sizes))
    known: dict[tuple[int, int], float] = {}
    for n, size in enumerate(map(tuple, table.sizes.tolist())):
        if size not in known:
            known[size] = _scale(found, size)
        scale[n] = known[size]
    return area * scale[table.image[kept]], "training"


def _scale(found: Analysis, size: tuple[int, int]) -> float:
    import torch

    from d2_balance.data.priors.foreground import training_size

    height, width = training_size(found.cfg, size, torch.zeros(0, 4))[0]
    return float(np.sqrt(height * width / (size[0] * size[1])))


def _table(found: Analysis) -> DataTable:
    if found.table is None:
        raise ValueError(f"{found.source.name} has no boxes")
    return found.table


def median_sizes(found: Analysis) -> np.ndarray:
    """(K,) median size of the boxes of each class; NaN without objects."""
    sizes, _ = box_sizes(found)
    table = _table(found)
    label = table.label[~table.crowd]
    order = np.argsort(label, kind="stable")
    parts = np.split(sizes[order], np.searchsorted(label[order], np.arange(1, table.num_classes)))
    return np.array([np.median(part) if len(part) else np.nan for part in parts])


def plot_classes(found: Analysis) -> Figure:
    """Images of each class by rank, coloured by group; objects as dots."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    order, counts = found.order, found.statistics
    images = counts.image_count[order]
    objects = counts.instance_count[order]
    colours = [GROUP_COLOURS[found.groups[k]] for k in order]
    figure = new_figure(9, 4)
    axes = figure.add_subplot()
    _bars(axes, images, colours)
    size = 14 if len(order) <= NAMED else 3
    seen = np.flatnonzero(objects)
    axes.plot(seen, objects[seen], ".", color="#1a1a1a", ms=size**0.5 * 1.6)
    handles: list[Artist] = [
        Patch(color=GROUP_COLOURS[g], label=f"{name}: images")
        for g, name in GROUPS.items()
        if g in found.groups
    ]
    handles.append(Line2D([], [], marker=".", ls="", color="#1a1a1a", label="objects"))
    _legend(figure, handles)
    _class_axis(axes, [counts.class_names[k] for k in order])
    _count_axis(axes, np.concatenate([images, objects]))
    return figure


def plot_levels(report: AnchorReport) -> Figure:
    """Foreground and background of each level."""
    figure = new_figure(6.5, 2.6)
    axes = figure.add_subplot()
    places = np.arange(len(report.levels))
    positives = np.array([n.positives for n in report.levels])
    background = np.array([n.samples - n.positives for n in report.levels])
    axes.bar(places - 0.2, np.maximum(background, 0.5), 0.4, color=LIGHT, label="background")
    axes.bar(places + 0.2, np.maximum(positives, 0.5), 0.4, color="#0072B2", label="foreground")
    axes.set_xticks(places, [n.name for n in report.levels])
    _legend(figure, axes.get_legend_handles_labels()[0])
    _count_axis(axes, np.concatenate([positives, background]), "anchors")
    return figure


def plot_sizes(found: Analysis) -> Figure:
    """Histogram of box sizes by group, and the sizes of anchors."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    sizes, place = box_sizes(found)
    sizes = np.maximum(sizes, 1)
    table = _table(found)
    label = table.label[~table.crowd]
    group = np.array(found.groups)[label]
    report = found.anchors
    lines = (
        []
        if report is None or report.sizes is None
        else sorted(size for level in report.sizes for size in level)
    )
    ends = np.quantile(sizes, (0.002, 0.998))  # single boxes would stretch the axis
    low = min([ends[0], *lines[:1]]) / 1.1
    high = max([ends[1], *lines[-1:]]) * 1.1
    bins = np.geomspace(low, high, 45)
    figure = new_figure(8, 3.4)
    axes = figure.add_subplot()
    shown = [g for g in GROUPS if (group == g).any()]
    colours = [GROUP_COLOURS[g] for g in shown]
    axes.hist([sizes[group == g] for g in shown], bins.tolist(), stacked=True, color=colours)
    handles: list[Artist] = [Patch(color=GROUP_COLOURS[g], label=GROUPS[g]) for g in shown]
    for size in lines:
        axes.axvline(size, color="#1a1a1a", lw=0.8, ls=":")
    if lines:
        handles.append(Line2D([], [], color="#1a1a1a", lw=0.8, ls=":", label="anchor sizes"))
    _legend(figure, handles)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = count_ticks(low, high)
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=f"root of the box's area, pixels of {place}", ylabel="objects")
    style_axes(axes, "y")
    return figure


def plot_missed(found: Analysis, report: AnchorReport, order: Sequence[int]) -> Figure:
    """Draw the fraction of unmatched objects, before and with the suggestion."""
    figure = new_figure(7, 0.8 + 0.34 * len(order))
    axes = figure.add_subplot()
    places = np.arange(len(order))[::-1]
    before = 100 * report.missed()[list(order)]
    after = 100 * report.missed(suggested=True)[list(order)]
    axes.barh(places + 0.19, before, 0.36, color="#D55E00", label="sizes of the configuration")
    axes.barh(places - 0.19, after, 0.36, color="#0072B2", label="suggested sizes")
    for place, *values in zip(places, before, after, strict=True):
        for shift, value in zip((0.19, -0.19), values, strict=True):
            axes.text(value + 0.6, place + shift, f"{value:.1f}", va="center", fontsize=7)
    axes.set_yticks(places, [found.statistics.class_names[k] for k in order], fontsize=8)
    axes.set(xlabel="objects that no anchor reaches (%)", xlim=(0, 106))
    _legend(figure, axes.get_legend_handles_labels()[0])
    style_axes(axes, "x")
    return figure


def plot_tail(found: Analysis) -> Figure:
    """TR over lambda, as the step function that it is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    counts = found.statistics
    frequency = np.unique(counts.frequency)
    frequency = frequency[frequency > 0]
    # just above each class frequency; the classes of that frequency are tail from there on
    values = np.array([tail_at(counts, np.nextafter(f, 2)).ratio for f in frequency])
    figure = new_figure(7, 3)
    axes = figure.add_subplot()
    axes.axhspan(2, 10, color="#009E73", alpha=0.15, lw=0)
    low, high = frequency[0] / 1.5, min(frequency[-1] * 1.5, 1.5)
    axes.step(
        [low, *frequency, high],
        [0, *(100 * values), 100 * values[-1]],
        where="post",
        color="#0072B2",
    )
    handles: list[Artist] = [Patch(color="#009E73", alpha=0.15, label="useful: 2 to 10 %")]
    if found.tail is not None:
        axes.plot(found.tail.lambda_, 100 * found.tail.ratio, "o", color="#D55E00")
        label = f"suggested: {found.tail.lambda_:.3g}, {found.tail.classes} classes"
        handles.append(Line2D([], [], marker="o", ls="", color="#D55E00", label=label))
    _legend(figure, handles)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    marks = [m * 10.0**k for k in range(-7, 1) for m in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="lambda (fraction of images)", ylabel="TR (%)", ylim=(0, None))
    style_axes(axes, "y")
    return figure


def plot_repeats(found: Analysis, repeat: RepeatFactors) -> Figure:
    """Images of each class, and how often an epoch shows it with the suggested threshold."""
    from matplotlib.patches import Patch

    order = found.order
    images = found.statistics.image_count[order]
    shown = repeat.shown[order]
    figure = new_figure(9, 3.6)
    axes = figure.add_subplot()
    _bars(axes, shown, "#56B4E9")
    _bars(axes, images, "#0072B2")
    handles: list[Artist] = [
        Patch(color="#0072B2", label="images"),
        Patch(color="#56B4E9", label="added by repeating"),
    ]
    _legend(figure, handles)
    _class_axis(axes, [found.statistics.class_names[k] for k in order])
    _count_axis(axes, np.concatenate([images, shown]), "shown in an epoch")
    return figure


def _bars(axes: Axes, values: np.ndarray, colours) -> None:
    width = 0.8 if len(values) <= NAMED else 1.0
    axes.bar(range(len(values)), np.maximum(values, 0.5), width, color=colours, linewidth=0)


def _class_axis(axes: Axes, names: list[str]) -> None:
    axes.set_xlim(-0.7, len(names) - 0.3)
    if len(names) > NAMED:
        ranks = [1, *range(10 ** (len(str(len(names))) - 1), len(names) + 1, _step(len(names)))]
        axes.set_xticks([rank - 1 for rank in ranks], [f"{rank:,}" for rank in ranks])
        axes.set_xlabel("rank of the class")
        return
    few = len(names) <= 8
    shown = [name if len(name) <= 22 else name[:21] + "…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=0 if few else 60, fontsize=9 if few else 7)
    if not few:
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def _step(count: int) -> int:
    """Distance of ticks that part `count` ranks into 5 to 10."""
    decade = 10 ** (len(str(count)) - 1)
    return decade if count >= 5 * decade else max(decade // 5, 1)


def _count_axis(axes: Axes, values: np.ndarray, label: str = "number") -> None:
    from matplotlib.ticker import NullFormatter

    high = max(float(values.max()), 2.0)
    axes.set_yscale("log")
    low = 0.5 if values.min() < 1 else max(float(values.min()) / 2, 0.5)
    axes.set_ylim(low, high * 1.6)
    ticks = [t for t in (10**k for k in range(12)) if low <= t <= high * 1.6]
    if len(ticks) < 3:
        ticks = count_ticks(low, high * 1.6)
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)
    style_axes(axes, "y")


def _legend(figure: Figure, handles: list) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
