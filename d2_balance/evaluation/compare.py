"""Runs side by side: which groups and classes gained."""

import glob
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2_balance.data.groups import GROUPS
from d2_balance.utils.files import write_text
from d2_balance.utils.page import Page
from d2_balance.utils.plotting import (
    COLOURS,
    count_ticks,
    name_points,
    new_figure,
    save_figure,
    style_axes,
)
from d2_balance.utils.text import count as count_text
from d2_balance.utils.text import percent, signed, table

from .record import TASKS, Evaluation

METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf")
MOST_RUNS = 7
MOST_NAMES = 12  # classes named in the plot


@dataclass
class Run:
    """One evaluation to compare.

    Attributes:
        name: how it is called in tables and plots.
        found: its figures.
    """

    name: str
    found: Evaluation


def read_run(path: str, name: str = "", dataset: str = "") -> Run:
    """A run from the output directory of a training, or from the file of `d2-balance eval --json`.

    Args:
        path: directory or JSON file.
        name: how to call it; "": the directory's or file's name.
        dataset: which one, where a directory has evaluations of several datasets.

    Raises:
        ValueError: naming the path, without an evaluation, or with several of which none is chosen.
    """
    name = name or os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    if os.path.isfile(path):
        return Run(name, Evaluation.read(path))
    if not os.path.isdir(path):
        raise ValueError(
            f"{path} does not exist; a run is an output directory or an evaluation file"
        )
    pattern = os.path.join(glob.escape(path), "**", "evaluation_*.json")
    runs = [Run(name, Evaluation.read(file)) for file in sorted(glob.glob(pattern, recursive=True))]
    if not runs:
        raise ValueError(
            f"{path} holds no evaluation (inference/evaluation_*.json); evaluate it with "
            "train_net.py --eval-only, or its predictions with `d2-balance eval --json`"
        )
    chosen = [run for run in runs if dataset in ("", run.found.dataset)]
    if len(chosen) != 1:
        sets = ", ".join(sorted(run.found.dataset for run in runs))
        raise ValueError(f"{path} has evaluations of {sets}; choose one of them with --dataset")
    return chosen[0]


def check_comparable(runs: Sequence[Run]) -> list[str]:
    """Tasks that all runs have.

    Raises:
        ValueError: fewer than two runs or too many, equal names, other classes, ground truths or
            rules, or no task in common.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"compare takes 2 to {MOST_RUNS} runs, not {len(runs)}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs are called {', '.join(names)}; give them different --names")
    first = runs[0]
    for run in runs[1:]:
        for what, value in _identity(first).items():
            if _identity(run)[what] != value:
                raise ValueError(
                    f"{first.name} ({first.found.dataset}) and {run.name} ({run.found.dataset}) "
                    f"differ in their {what}; only evaluations of one dataset can be compared"
                )
    tasks = [t for t in TASKS if all(t in run.found.results for run in runs)]
    if not tasks:
        raise ValueError("the runs have no task in common: one has boxes only, another masks only")
    return tasks


def _identity(run: Run) -> dict[str, object]:
    found = run.found
    return {
        "rules": found.rules,
        "number of images": found.images,
        "limit of detections": found.max_dets,
        "classes or ground truths": {n: r["instances"] for n, r in found.classes.items()},
        "frequency groups": {n: r["group"] for n, r in found.classes.items()},
    }


def metric_rows(runs: Sequence[Run], task: str) -> list[list[str]]:
    """Metrics of each run, and after the first the difference to it."""
    first = runs[0].found.results[task]
    rows = []
    for run in runs:
        own = run.found.results[task]
        cells = [percent(own[m]) for m in METRICS]
        if run is not runs[0]:
            pairs = zip(cells, METRICS, strict=True)
            cells = [f"{cell} ({signed(own[m] - first[m])})" for cell, m in pairs]
        rows.append([run.name, *cells])
    return rows


def class_gains(runs: Sequence[Run], task: str) -> dict[str, list[float]]:
    """AP of each class over the runs, by how much the last run gained on the first, falling."""
    key = "AP" if task == "bbox" else f"AP_{task}"
    values = {n: [r.found.classes[n][key] for r in runs] for n in runs[0].found.classes}
    values = {n: v for n, v in values.items() if not any(map(math.isnan, v))}
    return dict(sorted(values.items(), key=lambda item: item[1][0] - item[1][-1]))


def plot_comparison(runs: Sequence[Run], task: str) -> Figure:
    """AP of each class against its training images, and AP by group, one colour a run."""
    key = "AP" if task == "bbox" else f"AP_{task}"
    figure = new_figure(10.5, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    classes = runs[0].found.classes
    points = {n: r for n, r in classes.items() if r["train_image_count"] is not None}
    for number, run in enumerate(runs):
        pairs = [
            (max(r["train_image_count"], 0.5), run.found.classes[n][key]) for n, r in points.items()
        ]
        pairs = sorted(p for p in pairs if not math.isnan(p[1]))
        if pairs:
            _scatter(left, np.array(pairs), COLOURS[number])
    if not points:
        note = "no class has a number of training images"
        left.text(0.5, 0.5, note, ha="center", transform=left.transAxes, color="#555555")
    left.set(xlabel="training images that show the class", ylabel=f"{TASKS[task]} AP (%)")
    if points:
        counts = [max(r["train_image_count"], 0.5) for r in points.values()]
        low, high = min(counts) / 1.4, max(counts) * 1.4
        left.set_xscale("log")
        left.set_xlim(low, high)
        ticks = count_ticks(low, high)
        zero = [0.5] if min(counts) < 1 else []
        left.set_xticks([*zero, *ticks], ["0"] * len(zero) + [f"{t:,}" for t in ticks])
        left.set_xticks([], minor=True)
    _bars(right, runs, task)
    for axes in (left, right):
        style_axes(axes, "both" if axes is left else "y")
    figure.legend(
        *right.get_legend_handles_labels(),
        fontsize=9,
        frameon=False,
        ncols=4,
        loc="outside upper left",
    )
    _name_classes(left, runs, task)
    return figure


def _name_classes(axes: Axes, runs: Sequence[Run], task: str) -> None:
    """Name the classes that gained and lost most, beside the points of the last run."""
    classes = runs[0].found.classes
    gains = {
        n: v
        for n, v in class_gains(runs, task).items()
        if classes[n]["train_image_count"] is not None
    }
    if not gains:
        return
    x = {n: max(classes[n]["train_image_count"], 0.5) for n in gains}
    names = sorted(gains, key=lambda n: -abs(gains[n][-1] - gains[n][0]))
    points = [(x[n], gains[n][-1]) for n in names]
    others = [(x[n], value) for n in names for value in gains[n][:-1]]
    colours = [COLOURS[len(runs) - 1]] * len(names)
    name_points(axes, points, names, colours, range(len(names)), MOST_NAMES, others)


def _scatter(axes: Axes, points: np.ndarray, colour: str) -> None:
    count = len(points)
    size = 24 if count <= 100 else 8
    axes.scatter(*points.T, s=size, color=colour, alpha=0.5, linewidths=0)
    # a running mean over a fifth of the classes shows the trend
    width = max(3, count // 5)
    if count >= width:
        kernel = np.ones(width) / width
        smooth = [
            np.convolve(column, kernel, "valid") for column in (np.log(points[:, 0]), points[:, 1])
        ]
        axes.plot(np.exp(smooth[0]), smooth[1], color=colour, lw=2)


def _bars(axes: Axes, runs: Sequence[Run], task: str) -> None:
    shown = ["AP", *(f"AP{g}" for g in GROUPS)]
    shown = [m for m in shown if not all(math.isnan(r.found.results[task][m]) for r in runs)]
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        values = [run.found.results[task][m] for m in shown]
        places = np.arange(len(shown)) + (number - (len(runs) - 1) / 2) * width
        axes.bar(places, np.nan_to_num(values), width, color=COLOURS[number], label=run.name)
        for x, value in zip(places, values, strict=True):
            text = percent(value)
            axes.text(x, np.nan_to_num(value) + 0.4, text, ha="center", va="bottom", fontsize=7)
    names = {"AP": "all"} | {f"AP{letter}": name for letter, name in GROUPS.items()}
    axes.set_xticks(range(len(shown)), [names[m] for m in shown])
    axes.set_ylabel(f"{TASKS[task]} AP (%)")


def comparison_page(runs: Sequence[Run], tasks: Sequence[str], classes: int = 10) -> Page:
    """Everything on one page; `classes` that gained and lost most are listed."""
    first = runs[0].found
    page = Page(" and ".join(run.name for run in runs) + f" on {first.dataset}")
    page.text(
        f"{first.images:,} images, {len(first.classes):,} classes, {first.rules.upper()} rules. "
        f"In brackets the difference to {runs[0].name}."
    )
    for task in tasks:
        page.heading(f"{TASKS[task].capitalize()} AP")
        page.table(metric_rows(runs, task), ["run", *METRICS])
        caption = "AP of each class against its training images, with a running mean over a fifth "
        page.figure(plot_comparison(runs, task), caption + "of the classes; AP by frequency group.")
        page.heading(f"Classes that gained and lost most, {runs[-1].name} against {runs[0].name}")
        page.table(gain_rows(runs, task, classes), gain_headers(runs))
    return page


def gain_headers(runs: Sequence[Run]) -> list[str]:
    return ["class", "group", "training images", *(run.name for run in runs), "gain"]


def gain_rows(runs: Sequence[Run], task: str, count: int) -> list[list[str]]:
    """The `count` classes that gained most and the `count` that lost most."""
    gains = list(class_gains(runs, task).items())
    ends = gains if len(gains) <= 2 * count else gains[:count] + gains[-count:]
    rows = []
    for name, values in ends:
        record = runs[0].found.classes[name]
        images = record["train_image_count"]
        middle = [record["group"] or "-", count_text(images)]
        gain = signed(values[-1] - values[0])
        rows.append([name, *middle, *map(percent, values), gain])
    return rows


def write_comparison(runs: Sequence[Run], tasks: Sequence[str], directory: str) -> list[str]:
    """Write compare.md, compare.html and a PNG per task into `directory`; returns their paths."""
    paths = []
    lines = [f"# {' and '.join(run.name for run in runs)} on {runs[0].found.dataset}"]
    for task in tasks:
        file = f"compare_{TASKS[task]}.png"
        paths.append(os.path.join(directory, file))
        save_figure(plot_comparison(runs, task), paths[-1])
        lines += [
            f"## {TASKS[task].capitalize()} AP",
            table(metric_rows(runs, task), ["run", *METRICS]),
            f"![AP of each class and by group]({file})",
            table(gain_rows(runs, task, 10), gain_headers(runs)),
        ]
    paths.insert(0, os.path.join(directory, "compare.html"))
    comparison_page(runs, tasks).write(paths[0])
    paths.insert(0, os.path.join(directory, "compare.md"))
    write_text(paths[0], "\n\n".join(lines) + "\n")
    return paths
