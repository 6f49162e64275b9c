"""What a sweep has found: a table, plots, a page, and the YAML to use with its reason."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from d2_balance.evaluation.bootstrap import BETTER, NOISE, WORSE, Comparison, Difference
from d2_balance.utils.files import atomic_path
from d2_balance.utils.page import Page, png
from d2_balance.utils.plotting import new_figure
from d2_balance.utils.text import NOTHING, percent, signed, table

from .run import Sweep
from .spec import SweepSpec

TABLE, PAGE, PLOT, BEST = "sweep.md", "sweep.html", "sweep.png", "best.yaml"
COLOURS = {BETTER: "#009E73", WORSE: "#D55E00", NOISE: "#0072B2", "": "#999999"}


@dataclass
class Row:
    """A remedy in the table.

    Attributes:
        name: of the remedy.
        results: figures of each seed that finished, by seed.
        comparison: against the reference, None where nothing can be said.
        seconds: per iteration.
        bytes: peak memory.
        notes: of trials that failed or were stopped.
    """

    name: str
    results: dict[int, dict[str, float]] = field(default_factory=dict)
    comparison: Comparison | None = None
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """Return a figure of each seed."""
        return [r[figure] for r in self.results.values() if r.get(figure) is not None]

    def difference(self, figure: str) -> Difference | None:
        """Return the difference to the reference with its interval."""
        return None if self.comparison is None else self.comparison.metrics.get(figure)


def collect_rows(sweep: Sweep) -> list[Row]:
    """Return a row for each remedy, the best first, the reference where it ranks."""
    spec, task = sweep.spec, sweep.spec.metric.partition("/")[0]
    rows = {remedy.name: Row(remedy.name) for remedy in spec.remedies}
    directories: dict[str, list[str]] = {name: [] for name in rows}
    for trial in sweep.study.trials():
        name, seed = sweep.study.key(trial)
        if name not in rows:
            continue
        _add(rows[name], trial, seed, task)
        if trial.state == TrialState.COMPLETE:
            directories[name].append(sweep.directory(trial))
    reference = directories[spec.reference]
    for name, row in rows.items():
        if name != spec.reference and directories[name] and reference:
            row.comparison = sweep.intervals.compare(reference, directories[name])
    figure = spec.metric.partition("/")[2]

    def rank(row: Row) -> float:
        values = row.values(figure)
        return -statistics.fmean(values) if values else math.inf

    return sorted(rows.values(), key=rank)


def _add(row: Row, trial: FrozenTrial, seed: int, task: str) -> None:
    attributes = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        row.results[seed] = attributes["results"].get(task) or {}
        if attributes.get("seconds_per_iteration"):
            row.seconds.append(attributes["seconds_per_iteration"])
        if attributes.get("peak_bytes"):
            row.bytes.append(attributes["peak_bytes"])
    elif trial.state in (TrialState.PRUNED, TrialState.FAIL):
        word = "stopped" if trial.state == TrialState.PRUNED else "failed"
        row.notes.append(f"{row.name}, seed {seed}: {word}, {attributes.get('message', '')}")


def best(rows: Sequence[Row], spec: SweepSpec) -> tuple[str, str]:
    """Return the remedy to use and the reason, which speaks of the interval.

    A remedy is only proposed if its interval lies above the reference's; of several, the one with
    the highest mean.
    """
    figure = spec.metric.partition("/")[2]
    named = {r.name: r for r in rows}
    for row in rows:
        change = row.difference(figure)
        if row.name != spec.reference and change is not None and change.verdict == BETTER:
            low, high = signed(change.low), signed(change.high)
            return row.name, (
                f"{spec.metric} {signed(change.value)} against {spec.reference}, 95 % interval "
                f"{low} to {high}, {len(row.results)} seeds"
            )
    done = [r for r in rows if r.results and r.name != spec.reference]
    if spec.reference not in named or not named[spec.reference].results:
        return spec.reference, f"{spec.reference} has not finished, so nothing can be compared"
    if not done:
        return spec.reference, "no other remedy has finished"
    return spec.reference, (
        f"nothing beats your {spec.reference}: no remedy's 95 % interval of {spec.metric} lies "
        "above 0"
    )


def result_cells(rows: Sequence[Row], spec: SweepSpec) -> tuple[list[list[str]], list[str]]:
    """Return the cells of the table and its headers."""
    figure = spec.metric.partition("/")[2]
    shown = list(dict.fromkeys([figure, "AP", "AP50", "APr", "APc", "APf"]))
    headers = ["remedy", "seeds", *shown, f"{figure} against {spec.reference}", "verdict"]
    headers += ["ms per iteration", "memory (GB)"]
    lines = []
    for row in rows:
        change = row.difference(figure)
        against, verdict = NOTHING, NOTHING
        if change is not None:
            against = f"{signed(change.value)} [{signed(change.low)}, {signed(change.high)}]"
            verdict = change.verdict or NOTHING
        lines.append(
            [
                row.name,
                str(len(row.results)),
                *(mean_and_spread(row.values(name)) for name in shown),
                against,
                verdict,
                f"{1000 * statistics.median(row.seconds):.0f}" if row.seconds else NOTHING,
                f"{max(row.bytes) / 1e9:.2f}" if row.bytes else NOTHING,
            ]
        )
    return lines, headers


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean of the seeds, and their standard deviation from two on."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return NOTHING
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {percent(statistics.stdev(values))}"


def notes(rows: Sequence[Row], spec: SweepSpec) -> list[str]:
    """Return what the table alone does not say."""
    said = [note for row in rows for note in row.notes]
    if any(len(row.results) == 1 for row in rows):
        said.append(
            "A remedy with one seed has no spread over trainings: its interval speaks of the "
            "images only, and another seed may give another sign."
        )
    said.append(
        "Intervals are 95 %, over images (bootstrap, the same resamples for both sides) and, from "
        "two seeds on, over trainings; a remedy is better or worse if its interval leaves out 0."
    )
    return said


def plot(rows: Sequence[Row], spec: SweepSpec) -> Figure:
    """Draw the difference of each remedy to the reference with its interval, and its seeds."""
    figure_name = spec.metric.partition("/")[2]
    names = [n for n in dict.fromkeys([figure_name, "APr", "APc", "APf"])]
    names = [n for n in names if any(row.difference(n) for row in rows)] or [figure_name]
    shown = [row for row in rows if row.name != spec.reference][::-1]
    drawing = new_figure(3.2 * len(names) + 1.8, 0.42 * max(len(shown), 3) + 1.4)
    axes = drawing.subplots(1, len(names), sharey=True, squeeze=False)[0]
    base = next((r for r in rows if r.name == spec.reference), None)
    for axis, name in zip(axes, names, strict=True):
        mean = statistics.fmean(base.values(name)) if base and base.values(name) else math.nan
        axis.axvline(0, color="#444444", linewidth=1)
        for place, row in enumerate(shown):
            change = row.difference(name)
            if change is None or not math.isfinite(change.value):
                continue
            colour = COLOURS[change.verdict]
            low, high = change.value - change.low, change.high - change.value
            axis.errorbar(
                change.value, place, xerr=[[low], [high]], fmt="o", color=colour, capsize=3
            )
            seeds = np.array(row.values(name)) - mean
            axis.plot(seeds, np.full(len(seeds), place - 0.22), "|", color=colour, markersize=7)
        axis.set_title(f"{name} against {spec.reference}")
        axis.set_xlabel("difference of AP, 95 % interval; ticks: seeds")
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [row.name for row in shown])
    axes[0].set_ylim(-0.6, max(len(shown), 1) - 0.4)
    return drawing


def write_report(sweep: Sweep) -> tuple[list[str], str]:
    """Write table, plot, page and the YAML to use.

    Returns:
        The files, and the table with its notes as text.
    """
    spec, output = sweep.spec, sweep.output
    rows = collect_rows(sweep)
    name, reason = best(rows, spec)
    cells, said = result_cells(rows, spec), notes(rows, spec)
    text = f"Use {name}: {reason}.\n\n{table(*cells)}\n\n"
    text += "\n".join(f"- {note}" for note in said) + "\n"
    drawing = plot(rows, spec)
    page = Page(f"Sweep of {os.path.basename(spec.base)}")
    page.text(f"Use {name}: {reason}.")
    page.table(*cells)
    page.figure(drawing, f"Difference of each remedy to {spec.reference}")
    page.items(said)
    fragment = dict(spec.remedy(name).fragment)
    config: dict[str, Any] = {"_BASE_": spec.base, **fragment}
    best_yaml = f"# {reason}\n" + yaml.safe_dump(config, sort_keys=False)
    page.heading("The configuration to use")
    page.code(best_yaml)
    files = {TABLE: text.encode(), PLOT: png(drawing), BEST: best_yaml.encode()}
    written = []
    for file, content in files.items():
        path = os.path.join(output, file)
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            stream.write(content)
        written.append(path)
    page.write(os.path.join(output, PAGE))
    return [*written, os.path.join(output, PAGE)], text
