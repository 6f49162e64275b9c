"""The report of a recipe: AP of each stage, by frequency group, as Markdown and as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from d2_balance.evaluation.files import file_name_of
from d2_balance.evaluation.record import TASKS
from d2_balance.utils.files import read_json, write_text
from d2_balance.utils.page import Page
from d2_balance.utils.text import percent, table

from .recipe import Recipe, Stage
from .stages import EVALUATION, FACTORS

METRICS = ("AP", "AP50", "APr", "APc", "APf")


def write_report(recipe: Recipe, output: str, done: Mapping[str, dict[str, Any]]) -> str:
    """Write report.md and report.html; returns the path of the first."""
    title = f"{os.path.basename(recipe.path)}: {len(done)} of {len(recipe.stages)} stages"
    head, rows = stage_table(recipe, output, done)
    notes = _notes(recipe, output, done)
    logs = f"Logs of the stages lie in {os.path.join(output, 'logs')}."
    page = Page(title)
    page.text(_explanation(), "note")
    page.table(rows, head)
    page.items(notes)
    page.text(logs, "note")
    page.write(os.path.join(output, "report.html"))
    text = table(rows, head)
    parts = [f"# {title}", _explanation(), text, "\n".join(f"- {note}" for note in notes), logs]
    path = os.path.join(output, "report.md")
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def stage_table(
    recipe: Recipe, output: str, done: Mapping[str, dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one for each stage, AP in percent by task."""
    found = {s.name: evaluation_of(s, output) if s.name in done else None for s in recipe.stages}
    tasks = [t for t in TASKS if any(e and t in e["results"] for e in found.values())]
    head = ["stage", "kind", "time", "evaluated on"]
    head += [f"{TASKS[task]} {metric}" for task in tasks for metric in METRICS]
    rows = []
    for stage in recipe.stages:
        state = _time(done[stage.name]["seconds"]) if stage.name in done else "not done"
        figures = found[stage.name]
        row = [stage.name, stage.kind, state, _evaluated_on(stage) if figures else ""]
        for task in tasks:
            metrics = figures["results"].get(task, {}) if figures else {}
            row += [percent(metrics.get(metric)) for metric in METRICS]
        rows.append(row)
    return head, rows


def evaluation_of(stage: Stage, output: str) -> dict[str, Any] | None:
    """The figures of a finished stage, None where it has none (no annotations).

    Those of a training are of the first of its test sets.
    """
    path = os.path.join(output, stage.name, EVALUATION)
    if stage.kind == "train":
        name = f"evaluation_{file_name_of(_evaluated_on(stage))}.json"
        path = os.path.join(output, stage.name, "run", "inference", name)
    if not os.path.isfile(path):
        return None
    return read_json(path)


def _notes(recipe: Recipe, output: str, done: Mapping[str, dict[str, Any]]) -> list[str]:
    notes = []
    for stage in recipe.stages:
        path = os.path.join(output, stage.name, FACTORS)
        if stage.name in done and os.path.isfile(path):
            found = read_json(path)
            rule = found["rescoring"]
            values = ", ".join(f"{k} {v:.3g}" for k, v in rule["factors"].items())
            values = values or f"gamma {rule['gamma']:g}"
            before, after = found["before"], found["after"]
            text = f"{stage.name}: {values}, fitted on {stage['dataset']} ({found['task']}): " + (
                ", ".join(f"{k} {percent(before[k])} to {percent(after[k])}" for k in before)
            )
            if all(percent(before[k]) == percent(after[k]) for k in before):
                text += "; no setting that was tried gains"
            notes.append(text)
    return notes


def _explanation() -> str:
    return (
        "AP in percent; r, c and f are rare, common and frequent classes by training images. A "
        "dash: the stage gives no AP, or no class of the group has ground truth there."
    )


def _evaluated_on(stage: Stage) -> str:
    return stage["dataset"] or ", ".join((stage["test"] or [])[:1])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
