"""One evaluation as text, plots and a page."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from d2_balance.data.groups import GROUPS
from d2_balance.utils.files import atomic_path
from d2_balance.utils.plotting import GROUP_COLOURS, new_figure, save_figure, style_axes
from d2_balance.utils.text import cell, count, percent, table

from .record import METRICS, Evaluation, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from d2_balance.utils.page import Page

    from .diagnosis import Diagnosis

COLOURS = {"all": "#1a1a1a"} | {name: GROUP_COLOURS[letter] for letter, name in GROUPS.items()}
MARKERS = "osD^v"
MOST_CLASSES = 30


def text_report(evaluation: Evaluation, max_classes: int = 40) -> str:
    """Return the tables as text: metrics, frequency groups, and classes by training images.

    Args:
        evaluation: the figures.
        max_classes: classes to list, the rarest first; 0: none.
    """
    limit = "an image" if evaluation.rules == "lvis" else "an image and class"
    head = (
        f"{evaluation.detections:,} detections on {evaluation.images:,} images of "
        f"{evaluation.dataset}, {evaluation.rules.upper()} rules, {evaluation.max_dets} detections "
        f"{limit}"
    )
    results = evaluation.results
    rows = [[title(t), *(percent(m.get(k)) for k in METRICS)] for t, m in results.items()]
    sections = [head, table(rows, ["", *METRICS])]
    rows = []
    for letter, name in GROUPS.items():
        members = [r for r in evaluation.classes.values() if r["group"] == letter]
        if not members:
            continue
        counts = [r["train_image_count"] for r in members if r["train_image_count"] is not None]
        span = f"{min(counts):,} to {max(counts):,}" if counts else "-"
        values = [percent(m[f"AP{letter}"]) for m in results.values() if "AP" in m]
        rows.append([name, str(len(members)), span, *values])
    columns = [f"{title(task)} AP" for task, m in results.items() if "AP" in m]
    if rows:
        sections.append(table(rows, ["group", "classes", "training images", *columns]))
    if max_classes:
        sections.append(_class_table(evaluation, max_classes))
    return "\n\n".join(sections + [f"- {note}" for note in evaluation.notes])


def _class_table(evaluation: Evaluation, limit: int) -> str:
    columns = [
        key
        for key in next(iter(evaluation.classes.values()), {})
        if key.startswith("AP") and not key.endswith(("_fixed", "_openimages"))
    ]
    order = _rarest_first(evaluation)
    rows = [
        [name, r["group"] or "-", count(r["train_image_count"]), str(r["instances"])]
        + [percent(r[c]) for c in columns]
        for name, r in order[:limit]
    ]
    text = table(rows, ["class", "group", "training images", "ground truths", *columns])
    if len(order) > limit:
        text += f"\n\n{limit} of {len(order)} classes, rarest first of those with ground truth"
        text += "; --json and --csv give all"
    return text


def _rarest_first(evaluation: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """Classes by training images; those without ground truth, which have no AP, come last."""
    return sorted(
        evaluation.classes.items(),
        key=lambda item: (
            item[1]["instances"] == 0,
            item[1]["train_image_count"] or 0,
            -item[1]["instances"],
        ),
    )


def plot_curves(found: Diagnosis) -> Figure:
    """Precision over recall of each group, with score thresholds on the curves."""
    figure = new_figure(8.6, 4.4)
    axes = figure.add_subplot()
    for name, curve in found.curves.items():
        area = 100 * float(np.mean(curve.precision))
        axes.plot(
            curve.recall,
            curve.precision,
            color=COLOURS[name],
            lw=2 if name != "all" else 1.2,
            label=f"{name}: AP50 {area:.1f}",
        )
        for marker, (recall, precision) in zip(MARKERS, curve.marks.values(), strict=False):
            axes.plot(recall, precision, marker, color=COLOURS[name], ms=6)
    shown = sorted({t for curve in found.curves.values() for t in curve.marks})
    for marker, threshold in zip(MARKERS, shown, strict=False):
        axes.plot([], [], marker, color="#888888", ms=6, label=f"score {threshold:g}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    # outside: any place within may be that of a curve
    figure.legend(fontsize=9, frameon=False, loc="outside right upper")
    return _plain(figure)


def plot_calibration(found: Diagnosis) -> Figure:
    """Fraction of right detections over confidence, one panel a group."""
    groups = found.calibration
    figure = new_figure(2.9 * max(len(groups), 1), 3.1)
    panels = figure.subplots(1, max(len(groups), 1), sharey=True, squeeze=False)[0]
    for axes, (name, part) in zip(panels, groups.items(), strict=False):
        bins = [b for b in part.bins if b["count"]]
        left = [b["lower"] for b in bins]
        heights = [b["accuracy"] for b in bins]
        axes.bar(left, heights, width=0.1, align="edge", color=COLOURS[name], alpha=0.75)
        axes.plot([0, 1], [0, 1], "--", color="#888888", lw=1)
        head = f"{name}: ECE {part.ece:.3f}, MCE {part.mce:.3f}"
        axes.set_title(f"{head}\n{part.detections:,} detections", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    panels[0].set_ylabel("fraction that is right")
    return _plain(figure)


def plot_errors(found: Diagnosis) -> Figure:
    """AP50 that each type of error costs, and how often it occurs."""
    figure = new_figure(7.5, 2.8)
    axes = figure.add_subplot()
    names = list(found.errors)[::-1]
    lost = [found.errors[name]["AP50 lost"] for name in names]
    axes.barh(names, lost, color="#56B4E9")
    for row, name in enumerate(names):
        text = f" {lost[row]:.1f} ({found.errors[name]['count']:,})"
        axes.text(max(lost[row], 0), row, text, va="center", fontsize=8)
    axes.set_xlim(min(0, *lost), max(*lost, 1) * 1.25)
    axes.set_xlabel("AP50 that would be gained without these errors (their number)")
    _plain(figure)
    axes.grid(visible=False, axis="y")  # lines would run through the numbers
    return figure


def plot_confusion(found: Diagnosis) -> Figure:
    """Fractions of each class's objects; of many classes those that are confused most."""
    matrix = found.confusion.astype(float)
    shown = list(range(len(found.classes)))
    if len(shown) > MOST_CLASSES:
        pairs = found.most_confused(10 * MOST_CLASSES)
        names = list(dict.fromkeys(name for a, b, *_ in pairs for name in (a, b)))[:MOST_CLASSES]
        shown = [found.classes.index(name) for name in names]
    rows = matrix[shown] / matrix[shown].sum(axis=1, keepdims=True).clip(min=1)  # objects
    share = np.concatenate([rows[:, shown], rows[:, -1:]], axis=1)
    size = max(4.5, 0.26 * len(shown) + 2)
    figure = new_figure(size + 1, size)
    axes = figure.add_subplot()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    labels = [found.classes[k] for k in shown]
    axes.set_xticks(range(len(labels) + 1), [*labels, "(missed)"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    if len(shown) <= 10:
        for (i, j), value in np.ndenumerate(share):
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="detected as", ylabel="object")
    figure.colorbar(image, shrink=0.7, label="fraction of the class's objects")
    return figure


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        style_axes(axes)
    return figure


def diagnosis_page(found: Evaluation, parts: list[Diagnosis], predictions: str) -> Page:
    """Everything on one page.

    Args:
        found: the evaluation.
        parts: one diagnosis per task.
        predictions: name of the file, for the heading.
    """
    from d2_balance.utils.page import Page

    page = Page(f"{predictions} on {found.dataset}")
    page.text(
        f"{found.detections:,} detections on {found.images:,} images, {found.rules.upper()} rules, "
        f"{found.max_dets} detections that count."
        + (f" Groups by the images of {found.train}." if found.train else "")
    )
    metrics = list(next(iter(found.results.values())))
    rows = [[title(t), *(percent(m.get(k)) for k in metrics)] for t, m in found.results.items()]
    page.table(rows, ["", *metrics])
    page.items(found.notes) if found.notes else None
    for part in parts:
        task = title(part.task)
        if part.notes:
            page.items(part.notes)
        page.heading(f"Precision and recall ({task})")
        text = "Means over the classes of a group, at IoU 0.5. Marks show where a score threshold "
        page.figure(plot_curves(part), text + "cuts the curve.")
        page.heading(f"Calibration ({task})")
        text = "A bar below the dashed line is overconfidence. ECE is the mean distance to the line"
        text += ", weighted by the number of detections; MCE is the largest."
        page.figure(plot_calibration(part), text)
        page.heading(f"Types of errors ({task})")
        page.figure(plot_errors(part), "TIDE error types at IoU 0.5; background means IoU < 0.1.")
        counts = ", ".join(f"{count} {name}" for name, count in part.objects.items())
        page.text(f"Of {sum(part.objects.values()):,} objects: {counts}.")
        page.heading(f"Confusion of classes ({task})")
        text = f"Detections with a score of {part.min_score:g} and more, matched at IoU 0.5."
        page.figure(plot_confusion(part), text)
        rows = [[a, b, str(n), f"{100 * share:.0f} %"] for a, b, n, share in part.most_confused(15)]
        if rows:
            page.table(rows, ["object", "detected as", "times", "of the objects"])
        rows = [
            [name, *(f"{best[key]:.2f}" for key in ("score", "precision", "recall", "F1"))]
            for name, best in part.best_thresholds.items()
        ]
        if rows:
            page.heading(f"Best score threshold of each class ({task})")
            page.text(
                "The score of the largest F1 at IoU 0.5. It is chosen on these images, so that "
                "other images will do a little worse at it."
            )
            page.table(rows, ["class", "score", "precision", "recall", "F1"], folded="Thresholds")
    page.heading("Classes, rarest first")
    columns = list(next(iter(found.classes.values()), {}))
    rows = [[n, *(cell(r[c]) for c in columns)] for n, r in _rarest_first(found)]
    page.table(rows, ["class", *columns])
    return page


def write_report(
    directory: str, found: Evaluation, parts: list[Diagnosis], predictions: str
) -> list[str]:
    """Write report.html, diagnosis.json and the plots as PNG; returns their paths."""
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, "report.html"), os.path.join(directory, "diagnosis.json")]
    diagnosis_page(found, parts, predictions).write(paths[0])
    content = {"evaluation": found.as_json(), "diagnosis": [part.as_json() for part in parts]}
    with atomic_path(paths[1]) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    drawings = {
        "precision_recall": plot_curves,
        "calibration": plot_calibration,
        "errors": plot_errors,
        "confusion": plot_confusion,
    }
    for part in parts:
        for name, draw in drawings.items():
            paths.append(os.path.join(directory, f"{name}_{title(part.task)}.png"))
            save_figure(draw(part), paths[-1])
    return paths
