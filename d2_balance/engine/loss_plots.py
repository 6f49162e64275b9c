"""Plots of a training run: loss curves and the gradient density of GHM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from d2_balance.utils.plotting import COLOURS, new_figure, save_figure, style_axes

_COLOURS = ("#000000", *COLOURS[:6], "#666666")  # the total is black
_EARLIER = (_COLOURS[5], _COLOURS[2])  # colours of the earlier densities, drawn as lines
_WIDE_RANGE = 30.0  # losses that differ by more are drawn on a logarithmic axis


def plot_losses(metrics: Sequence[Mapping[str, float]], path: str, title: str = "") -> None:
    """Draw every loss against the iteration, as PNG.

    Args:
        metrics: records of metrics.json, each with "iteration".
        path: file to write; replaced atomically.
        title: heading.

    Raises:
        ValueError: no record has a loss.
    """
    curves = _loss_curves(metrics)
    if not curves:
        raise ValueError(f"{path}: the metrics hold no loss")
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    values = [v for _, losses in curves.values() for v in losses]
    for number, (name, (iterations, losses)) in enumerate(curves.items()):
        axes.plot(
            iterations,
            losses,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            lw=2.2 if name == "total_loss" else 1.4,
            ls="--" if number >= len(_COLOURS) else "-",
            marker="o" if len(iterations) < 3 else None,
        )
    positive = [v for v in values if v > 0]
    if positive and max(positive) > _WIDE_RANGE * min(positive):
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
    else:
        axes.set_ylim(bottom=min(0.0, *values))
        axes.set_ylabel("loss")
    axes.set_xlabel("iteration")
    axes.set_xlim(0, 1.02 * max(i for iterations, _ in curves.values() for i in iterations) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title or "training losses, medians of 20 iterations", fontsize=11)
    style_axes(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)


def plot_density(records: Sequence[Mapping[str, Any]], source: str, path: str) -> None:
    """Draw the gradient density of a GHM loss and the weights that follow from it, as PNG.

    Args:
        records: what `LossStats` writes, in the order of time.
        source: the loss, a key of the records' "stats", with the vectors "density" and "weight".
        path: file to write; replaced atomically.

    Raises:
        ValueError: the records hold no density of `source`.
    """
    records = [r for r in records if "density" in r["stats"].get(source, {})]
    if not records:
        raise ValueError(f"{path}: the records hold no density of {source}")
    *earlier, last = records
    if len(earlier) > len(_EARLIER):
        earlier = [earlier[0], earlier[len(earlier) // 2]]
    density, weight = (last["stats"][source][key] for key in ("density", "weight"))
    dead = sum(value <= 0 for value in density)

    figure = new_figure(10, 4)
    figure.suptitle(
        f"{source}: gradient density after {last['iteration']:,} iterations, "
        f"{dead} of {len(density)} bins empty",
        fontsize=11,
    )
    left, right = figure.subplots(1, 2)
    label = f"iteration {last['iteration']:,}"
    _draw_bars(left, density, label)
    for record, colour in zip(earlier, _EARLIER, strict=False):
        values = record["stats"][source]["density"]
        edges = [i / len(values) for i in range(len(values) + 1)]
        line = [v if v > 0 else math.nan for v in values]
        left.stairs(line, edges, color=colour, label=f"iteration {record['iteration']:,}", lw=1.6)
    left.set_ylabel("entries per bin (log scale)")
    left.legend(fontsize=8, framealpha=0.9)
    _draw_bars(right, weight, label)
    right.axhline(1, color="#444444", lw=0.8, ls="--")
    right.set_ylabel("weight of an entry, mean 1 (log scale)")
    for axes in (left, right):
        axes.set_xlabel("gradient norm g")
        axes.set_xlim(0, 1)
        axes.set_yscale("log")
        style_axes(axes)
    save_figure(figure, path)


def _loss_curves(
    metrics: Sequence[Mapping[str, float]],
) -> dict[str, tuple[list[float], list[float]]]:
    """Iterations and values by name; the total first, the others in alphabetical order."""
    names = {key for record in metrics for key in record if "loss" in key and "/" not in key}
    ordered = sorted(names, key=lambda name: (name != "total_loss", name))
    curves = {}
    for name in ordered:
        points = [
            (r["iteration"], r[name]) for r in metrics if name in r and math.isfinite(r[name])
        ]
        if points:
            curves[name] = [p[0] for p in points], [p[1] for p in points]
    return curves


def _draw_bars(axes: Axes, values: Sequence[float], label: str) -> None:
    width = 1 / len(values)
    centres = [(i + 0.5) * width for i in range(len(values))]
    axes.bar(centres, values, width=0.92 * width, color=_COLOURS[1], alpha=0.75, label=label)
