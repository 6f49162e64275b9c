"""Runs side by side: which groups and classes gained, and whether that is more than noise.

A run may be several seeds of one configuration; its figures are their means.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from d2_balance.data.groups import GROUPS
from d2_balance.data.resolve import load_annotations
from d2_balance.utils.files import write_text
from d2_balance.utils.page import Page
from d2_balance.utils.plotting import (
    COLOURS,
    count_axis,
    name_points,
    new_figure,
    save_figure,
    style_axes,
)
from d2_balance.utils.text import count as count_text
from d2_balance.utils.text import percent, signed, table

from . import bootstrap
from .evaluate import matched
from .matching import GroundTruth
from .predictions import read_predictions
from .record import Evaluation, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf")
MOST_RUNS = 7
MOST_NAMES = 12  # classes named in the plot
MOST_INTERVALS = 60  # classes whose points have intervals


@dataclass
class Run:
    """One evaluation to compare, or the mean over several seeds.

    Attributes:
        name: how it is called in tables and plots.
        found: its figures.
        path: directory or file that it was read from.
        seeds: the evaluations that `found` is the mean of; empty if there is one.
    """

    name: str
    found: Evaluation
    path: str = ""
    seeds: list[Evaluation] = field(default_factory=list)

    def spread(self, task: str, metric: str) -> tuple[float, int]:
        """Return the standard deviation over the seeds, NaN with one, and their number."""
        values = [seed.results[task][metric] for seed in self.seeds]
        return (float(np.std(values, ddof=1)) if len(values) > 1 else math.nan), max(len(values), 1)


def join_seeds(runs: Sequence[Run], named: bool) -> list[Run]:
    """Join runs that are seeds of one configuration.

    Args:
        runs: one evaluation each.
        named: True joins runs of one name; False joins output directories whose configs differ in
            SEED and OUTPUT_DIR only.
    """
    groups: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        config = os.path.join(run.path, "config.yaml")
        key = f"{number}"
        if named:
            key = run.name
        elif os.path.isfile(config):
            with open(config, encoding="utf-8") as file:
                key = "".join(li for li in file if not li.startswith(("SEED:", "OUTPUT_DIR:")))
        groups.setdefault(key, []).append(run)
    return [_mean_run(own) if len(own) > 1 else own[0] for own in groups.values()]


def _mean_run(runs: Sequence[Run]) -> Run:
    found = [run.found for run in runs]
    _check_same(runs)
    first = found[0]
    results = {
        task: {m: _mean([f.results[task][m] for f in found]) for m in metrics}
        for task, metrics in first.results.items()
        if all(task in f.results for f in found)
    }
    classes = {
        name: {
            key: _mean([f.classes[name][key] for f in found]) if key.startswith("AP") else value
            for key, value in record.items()
        }
        for name, record in first.classes.items()
    }
    name = runs[0].name
    if any(run.name != name for run in runs):
        name = re.sub(r"[_\-. ]*(seed)?[_\-. ]*\d*$", "", name) or name
    mean = dataclasses.replace(first, results=results, classes=classes)
    return Run(name, mean, runs[0].path, list(found))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
        return Run(name, Evaluation.read(path), path)
    if not os.path.isdir(path):
        raise ValueError(
            f"{path} does not exist; a run is an output directory or an evaluation file"
        )
    pattern = os.path.join(glob.escape(path), "**", "evaluation_*.json")
    files = sorted(glob.glob(pattern, recursive=True))
    runs = [Run(name, _found_in(file), path) for file in files]
    if not runs:
        raise ValueError(
            f"{path} holds no evaluation (inference/evaluation_*.json); evaluate it with "
            "`d2-balance train --eval-only`, or its predictions with `d2-balance eval --json`"
        )
    chosen = [run for run in runs if dataset in ("", run.found.dataset)]
    if len(chosen) != 1:
        sets = ", ".join(sorted(run.found.dataset for run in runs))
        raise ValueError(f"{path} has evaluations of {sets}; choose one of them with --dataset")
    return chosen[0]


def _found_in(file: str) -> Evaluation:
    """An evaluation of a run's directory, whose predictions lie beside it wherever that is now."""
    found = Evaluation.read(file)
    beside = os.path.join(os.path.dirname(file), os.path.basename(found.predictions))
    return dataclasses.replace(found, predictions=beside) if found.predictions else found


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
    _check_same(runs)
    limits = {run.found.per_class for run in runs}
    tasks = [
        task
        for task in runs[0].found.results
        if all(task in run.found.results for run in runs)
        and not task.endswith(("_pool", "_openimages"))  # they have no AP of classes
        and (len(limits) == 1 or not task.endswith("_fixed"))
    ]
    if not tasks:
        raise ValueError("the runs have no task in common: one has boxes only, another masks only")
    return tasks


def _check_same(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for what, value in _identity(first).items():
            if _identity(run)[what] != value:
                raise ValueError(
                    f"{first.name} ({first.found.dataset}) and {run.name} ({run.found.dataset}) "
                    f"differ in their {what}; only evaluations of one dataset can be compared"
                )


def _identity(run: Run) -> dict[str, object]:
    found = run.found
    return {
        "rules": found.rules,
        "number of images": found.images,
        "limit of detections": found.max_dets,
        "classes or ground truths": {n: r["instances"] for n, r in found.classes.items()},
        "frequency groups": {n: r["group"] for n, r in found.classes.items()},
    }


@dataclass
class Significance:
    """Comparisons of each run with the first, by the run's name; or why there are none."""

    comparisons: dict[str, bootstrap.Comparison] = field(default_factory=dict)
    note: str = ""

    def difference(self, run: Run, metric: str) -> bootstrap.Difference | None:
        """Return how much a run gains on the first."""
        comparison = self.comparisons.get(run.name)
        return None if comparison is None else comparison.metrics.get(metric)

    def own(self, runs: Sequence[Run], number: int) -> dict[str, tuple[float, float]]:
        """Return the intervals of a run's own figures, by metric and class."""
        if not self.comparisons:
            return {}
        if number:
            return self.comparisons[runs[number].name].own[1]
        return next(iter(self.comparisons.values())).own[0]


def significance(runs: Sequence[Run], task: str, rounds: int = bootstrap.ROUNDS) -> Significance:
    """Resample the images of the runs.

    Args:
        runs: checked runs, the first is the one that others are compared with.
        task: a key of the results with AP by class, such as "bbox" or "segm_fixed".
        rounds: resamples; 0: none.
    """
    if not rounds:
        return Significance()
    for run in runs:
        for found in run.seeds or [run.found]:
            for what, path in (("ground truth", found.truth), ("predictions", found.predictions)):
                if not os.path.isfile(path):
                    where = f"{path} is not there" if path else "its evaluation names no file"
                    return Significance(note=f"no intervals: the {what} of {run.name}: {where}")
    first = runs[0].found
    truth = load_annotations(first.truth, "the ground truth", first.rules)
    base, _, variant = task.partition("_")
    ground = GroundTruth(truth, base)
    groups = [record["group"] for record in first.classes.values()]
    sampled, strata = [], None
    for run in runs:
        own = []
        for found in run.seeds or [run.found]:
            predictions = read_predictions(found.predictions, truth)
            limits = (None, found.per_class) if variant else (found.max_dets, 0)
            matcher = matched({base: ground}, predictions, *limits)[base]
            if ground.num_images != found.images or len(predictions) != found.detections:
                return Significance(
                    note=f"no intervals: {found.truth} or {found.predictions} has changed since "
                    f"{run.name} was evaluated, or images were left out"
                )
            strata = bootstrap.strata_of(matcher, groups) if strata is None else strata
            own.append(bootstrap.Resampled(matcher))
        sampled.append(own)
    assert strata is not None
    names = list(first.classes)
    return Significance(
        {
            run.name: bootstrap.compare(sampled[0], own, groups, names, strata, rounds)
            for run, own in zip(runs[1:], sampled[1:], strict=True)
        }
    )


def metric_rows(
    runs: Sequence[Run], task: str, found: Significance | None = None
) -> list[list[str]]:
    """Metrics of each run, and after the first the difference to it with its interval."""
    first = runs[0].found.results[task]
    rows = []
    for run in runs:
        own = run.found.results[task]
        cells = []
        for metric in METRICS:
            cell = percent(own[metric])
            spread, seeds = run.spread(task, metric)
            if seeds > 1 and not math.isnan(spread):
                cell += f" ± {spread:.1f}"
            if run is not runs[0]:
                difference = found.difference(run, metric) if found else None
                cell += f" ({signed(own[metric] - first[metric])}{_interval(difference)})"
            cells.append(cell)
        name = f"{run.name}, {len(run.seeds)} seeds" if run.seeds else run.name
        rows.append([name, *cells])
    return rows


def _interval(difference: bootstrap.Difference | None) -> str:
    if difference is None or math.isnan(difference.low):
        return ""
    return f", {difference.low:+.1f} to {difference.high:+.1f}"


def verdict_rows(runs: Sequence[Run], found: Significance) -> list[list[str]]:
    """Whether each run is better, worse or within noise; metrics without an interval are "-"."""
    rows = []
    for run in runs[1:]:
        differences = [found.difference(run, metric) for metric in bootstrap.METRICS]
        rows.append([run.name, *((d.verdict if d else "") or "-" for d in differences)])
    return rows if found.comparisons else []


def source_rows(runs: Sequence[Run], found: Significance) -> list[list[str]]:
    """How far the differences vary over images, and over seeds."""
    rows = []
    for run in runs[1:]:
        for source in ("images", "training"):
            differences = [found.difference(run, metric) for metric in bootstrap.METRICS]
            cells = [percent(getattr(d, source), 2) if d else "-" for d in differences]
            rows.append([run.name, source, *cells])
    return rows if found.comparisons else []


def significance_text(runs: Sequence[Run], found: Significance) -> str:
    """What the intervals say, as text."""
    if found.note:
        return f"- {found.note}"
    if not found.comparisons:
        return ""
    head = table(verdict_rows(runs, found), [f"against {runs[0].name}", *bootstrap.METRICS])
    spread = table(source_rows(runs, found), ["run", "varies over", *bootstrap.METRICS])
    lines = [head, spread]
    if any(len(run.seeds) < 2 for run in runs):
        lines.append(
            "- intervals hold for other images; how much another training differs, one seed cannot "
            "say"
        )
    return "\n\n".join(lines)


def class_gains(runs: Sequence[Run], task: str) -> dict[str, list[float]]:
    """AP of each class over the runs, by how much the last run gained on the first, falling."""
    key = "AP" if task == "bbox" else f"AP_{task}"
    values = {n: [r.found.classes[n][key] for r in runs] for n in runs[0].found.classes}
    values = {n: v for n, v in values.items() if not any(map(math.isnan, v))}
    return dict(sorted(values.items(), key=lambda item: item[1][0] - item[1][-1]))


def plot_comparison(runs: Sequence[Run], task: str, found: Significance | None = None) -> Figure:
    """AP of each class against its training images, and AP by group, one colour a run."""
    found = found or Significance()
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
        if len(points) <= MOST_INTERVALS:
            intervals = found.own(runs, number)
            for n, r in points.items():
                x = max(r["train_image_count"], 0.5)
                left.plot([x, x], intervals.get(n, (math.nan,) * 2), color=COLOURS[number], lw=0.8)
    if not points:
        note = "no class has a number of training images"
        left.text(0.5, 0.5, note, ha="center", transform=left.transAxes, color="#555555")
    left.set(xlabel="training images that show the class", ylabel=f"{title(task)} AP (%)")
    if points:
        counts = [max(r["train_image_count"], 0.5) for r in points.values()]
        count_axis(left, counts)
    _bars(right, runs, task, found)
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
    axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.5, linewidths=0)
    # a running mean over a fifth of the classes shows the trend
    width = max(3, count // 5)
    if count >= width:
        kernel = np.ones(width) / width
        smooth = [
            np.convolve(column, kernel, "valid") for column in (np.log(points[:, 0]), points[:, 1])
        ]
        axes.plot(np.exp(smooth[0]), smooth[1], color=colour, lw=2)


def _bars(axes: Axes, runs: Sequence[Run], task: str, found: Significance) -> None:
    shown = ["AP", *(f"AP{g}" for g in GROUPS)]
    shown = [m for m in shown if not all(math.isnan(r.found.results[task][m]) for r in runs)]
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        values = [run.found.results[task][m] for m in shown]
        places = np.arange(len(shown)) + (number - (len(runs) - 1) / 2) * width
        axes.bar(places, np.nan_to_num(values), width, color=COLOURS[number], label=run.name)
        intervals = found.own(runs, number)
        for x, value, metric in zip(places, values, shown, strict=True):
            text = percent(value)
            low, high = intervals.get(metric, (math.nan, math.nan))
            axes.plot([x, x], [low, high], color="#333333", lw=1)
            top = np.nan_to_num(value) if math.isnan(high) else high
            axes.text(x, top + 0.4, text, ha="center", va="bottom", fontsize=7)
    names = {"AP": "all"} | {f"AP{letter}": name for letter, name in GROUPS.items()}
    axes.set_xticks(range(len(shown)), [names[m] for m in shown])
    axes.set_ylim(0, max(axes.get_ylim()[1], 1))  # of bars that are all 0 too
    axes.set_ylabel(f"{title(task)} AP (%)")


def comparison_page(
    runs: Sequence[Run], found: Mapping[str, Significance], classes: int = 10
) -> Page:
    """Everything on one page; `found` by task, `classes` that gained and lost most are listed."""
    first = runs[0].found
    page = Page(" and ".join(run.name for run in runs) + f" on {first.dataset}")
    page.text(
        f"{first.images:,} images, {len(first.classes):,} classes, {first.rules.upper()} rules. "
        f"In brackets the difference to {runs[0].name}."
    )
    for task, tests in found.items():
        page.heading(f"{title(task).capitalize()} AP")
        page.table(metric_rows(runs, task, tests), ["run", *METRICS])
        if tests.comparisons:
            page.text(
                "95 % intervals of a bootstrap over images, the same ones for all runs; with seeds "
                "also over these."
            )
            page.table(verdict_rows(runs, tests), [f"against {runs[0].name}", *bootstrap.METRICS])
            page.table(source_rows(runs, tests), ["run", "varies over", *bootstrap.METRICS])
        elif tests.note:
            page.items([tests.note])
        caption = "AP of each class against its training images, with a running mean over a fifth "
        page.figure(
            plot_comparison(runs, task, tests), caption + "of the classes; AP by frequency group."
        )
        page.heading(f"Classes that gained and lost most, {runs[-1].name} against {runs[0].name}")
        page.table(gain_rows(runs, task, classes, tests), gain_headers(runs))
    return page


def gain_headers(runs: Sequence[Run]) -> list[str]:
    """Return the headers of the table of gains."""
    return ["class", "group", "training images", *(run.name for run in runs), "gain"]


def gain_rows(
    runs: Sequence[Run], task: str, count: int, found: Significance | None = None
) -> list[list[str]]:
    """The `count` classes that gained most and the `count` that lost most."""
    gains = list(class_gains(runs, task).items())
    ends = gains if len(gains) <= 2 * count else gains[:count] + gains[-count:]
    rows = []
    for name, values in ends:
        record = runs[0].found.classes[name]
        images = record["train_image_count"]
        middle = [record["group"] or "-", count_text(images)]
        comparison = found and found.comparisons.get(runs[-1].name)
        difference = comparison.classes.get(name) if comparison else None
        gain = f"{signed(values[-1] - values[0])}{_interval(difference)}"
        rows.append([name, *middle, *map(percent, values), gain])
    return rows


def write_comparison(
    runs: Sequence[Run], found: Mapping[str, Significance], directory: str
) -> list[str]:
    """Write compare.md, compare.html and a PNG per task into `directory`; returns their paths."""
    paths = []
    lines = [f"# {' and '.join(run.name for run in runs)} on {runs[0].found.dataset}"]
    for task, tests in found.items():
        file = f"compare_{title(task).replace(', ', '_')}.png"
        paths.append(os.path.join(directory, file))
        save_figure(plot_comparison(runs, task, tests), paths[-1])
        lines += [
            f"## {title(task).capitalize()} AP",
            table(metric_rows(runs, task, tests), ["run", *METRICS]),
            significance_text(runs, tests),
            f"![AP of each class and by group]({file})",
            table(gain_rows(runs, task, 10, tests), gain_headers(runs)),
        ]
    paths.insert(0, os.path.join(directory, "compare.html"))
    comparison_page(runs, found).write(paths[0])
    paths.insert(0, os.path.join(directory, "compare.md"))
    write_text(paths[0], "\n\n".join(filter(None, lines)) + "\n")
    return paths
