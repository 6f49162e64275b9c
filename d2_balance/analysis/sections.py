"""What an analysis says, part by part; `output.py` prints it and makes a page of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from d2_balance.data.groups import GROUPS
from d2_balance.utils.arrays import unique
from d2_balance.utils.names import listed

from . import plots
from .report import Analysis
from .tail import RepeatFactors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .anchors import AnchorReport

MANY = 40  # classes, above which a table of all of them is folded and left to the page
SHOWN_IDS = 20


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        headers: one for each column.
        rows: cells as text or numbers.
        folded: heading under which a page hides it at first, "" shows it.
        page_only: True keeps it off the console.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence]
    folded: str = ""
    page_only: bool = False


@dataclass(frozen=True)
class Plot:
    """An image, drawn when a page asks for it."""

    draw: Callable[[], Figure]
    caption: str


@dataclass(frozen=True)
class Code:
    """Text whose line breaks matter."""

    text: str


Part = Text | Table | Plot | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: list[Part]


def sections(found: Analysis) -> list[Section]:
    """All parts but the last one, "what to set"."""
    boxes = "Box sizes, and objects that no anchor reaches" if found.anchors else "Box sizes"
    makers = (
        ("Classes", _classes),
        ("Foreground and background", _foreground),
        (boxes, _boxes),
        ("Tail ratio: which classes the equalization loss protects", _tail),
        ("Repeat factors", _repeats),
        ("Image-level labels", _labels),
        ("What is wrong in the data", _problems),
    )
    made = [Section(title, list(maker(found))) for title, maker in makers]
    return [section for section in made if section.parts]


def _classes(found: Analysis) -> Iterator[Part]:
    counts = found.statistics
    yield Text(
        f"{counts.num_images:,} images, {int(counts.instance_count.sum()):,} objects, "
        f"{counts.num_classes:,} classes"
    )
    for note in found.notes:
        yield Text(note)
    rows = []
    objects = max(counts.instance_count.sum(), 1)
    for letter, name in GROUPS.items():
        own = [k for k, group in enumerate(found.groups) if group == letter]
        images = [int(counts.image_count[k]) for k in own]
        span = f"{min(images):,} to {max(images):,}" if own else "-"
        fraction = f"{100 * float(counts.instance_count[own].sum() / objects):.1f} %"
        rows.append([name, len(own), span, fraction])
    yield Table(["group", "classes", "images per class", "objects"], rows)
    yield Text(
        "Groups are those of the annotation file."
        if found.cuts is None
        else f"Rare: up to {found.cuts[0]:,} images, common: up to {found.cuts[1]:,}."
    )
    yield Plot(
        lambda: plots.plot_classes(found),
        "Classes from the most to the least frequent, by images that show them, with the objects "
        "of each as a dot.",
    )
    yield _class_table(found)


def _class_table(found: Analysis) -> Table:
    counts, anchors, table = found.statistics, found.anchors, found.table
    headers = ["class", "group", "images", "objects"]
    columns = [
        counts.class_names,
        [GROUPS[g] for g in found.groups],
        [f"{n:,}" for n in counts.image_count.tolist()],
        [f"{n:,}" for n in counts.instance_count.tolist()],
    ]
    if table is not None and table.crowd.any():
        headers.append("crowds")
        crowds = np.bincount(table.label[table.crowd], minlength=table.num_classes)
        columns.append([f"{n:,}" for n in crowds])
    if table is not None:
        headers.append("median size (pixels)")
        columns.append([_pixels(n) for n in plots.median_sizes(found)])
    if anchors is not None and anchors.reached is not None:
        headers.append("unmatched")
        columns.append([_percent(n) for n in anchors.missed()])
    if found.repeat is not None:
        headers.append("r(c)")
        columns.append([f"{n:.2f}" for n in found.repeat.factor])
    if table is not None and table.absent is not None and len(table.absent):
        headers.append("verified absent in")
        absent = np.bincount(table.absent[:, 1], minlength=table.num_classes)
        columns.append([f"{n:,}" for n in absent])
    rows = [[column[k] for column in columns] for k in found.order]
    many = len(rows) > MANY
    return Table(headers, rows, f"All {len(rows):,} classes" if many else "", page_only=many)


def _foreground(found: Analysis) -> Iterator[Part]:
    report = found.anchors
    if report is None:
        return
    what = "Anchor points" if report.part == "FCOS" else "Anchors"
    low, high = report.edge
    edge = f"{low}" if low == high else f"{low} to {high}"
    yield Text(
        f"{what} of {report.part} on {report.images:,} images with a shorter side of {edge} "
        "pixels in training."
    )
    rows = [_level_row(n.name, n.positives, n.samples) for n in report.levels]
    total = [sum(n.positives for n in report.levels), sum(n.samples for n in report.levels)]
    rows.append(_level_row("all", *total))
    yield Table(["level", "foreground", "background", "background per foreground"], rows)
    empty = [n.name for n in report.levels if not n.positives]
    if empty and report.prior is not None:
        yield Text(f"No object is on {', '.join(empty)}: these levels learn background only.")
    yield Plot(lambda: plots.plot_levels(report), f"{what} with an object and without, by level.")
    if report.prior is None:
        yield Text("No anchor has an object: nothing can be learned. Change the sizes.", True)
        return
    prior = report.prior
    yield Text(
        f"Optimal prior pi* = N_f / (N C) = {prior.positives:,} / ({prior.samples:,} x "
        f"{prior.outputs:,}) = {prior.prior:.3g}, bias {prior.bias:.2f}. Cross-entropy over all "
        "anchors starts lowest there; focal loss is made for 0.01, and sampled anchors have "
        "another fraction of foreground. "
        "`d2-balance prior` writes it to a file for MODEL.BALANCE.PRIOR_FILE."
    )


def _level_row(name: str, positives: int, rows: int) -> list[str]:
    ratio = f"{(rows - positives) / positives:,.0f}" if positives else "-"
    return [name, f"{positives:,}", f"{rows - positives:,}", ratio]


def _boxes(found: Analysis) -> Iterator[Part]:
    if found.table is None:
        return
    sizes, place = plots.box_sizes(found)
    edges = (0, 8, 16, 32, 96, np.inf)
    bins = np.histogram(sizes, edges)[0]
    names = ["up to 8", "8 to 16", "16 to 32", "32 to 96", "above 96"]
    total = max(int(bins.sum()), 1)
    rows = [[n, f"{c:,}", _percent(c / total)] for n, c in zip(names, bins.tolist(), strict=True)]
    yield Text(f"Size of a box is the root of its area, in pixels of {place}.")
    yield Table(["size", "objects", "fraction"], rows)
    report = found.anchors
    yield Plot(
        lambda: plots.plot_sizes(found),
        "Box sizes by frequency group"
        + (", and the sizes of anchors as lines." if report and report.sizes else "."),
    )
    if report is not None and report.reached is not None:
        yield from _reach(found, report, report.reached)


def _reach(found: Analysis, report: AnchorReport, reached: np.ndarray) -> Iterator[Part]:
    missed, objects = report.missed(), report.objects
    total = 1 - reached.sum() / max(objects.sum(), 1)
    text = (
        f"{_percent(total)} of the counted objects have no anchor with an IoU of "
        f"{report.threshold:g} or more."
    )
    if report.low_quality:
        text += " They still get their best anchors, which are few and fit badly."
    yield Text(text)
    order = [k for k in np.argsort(-np.nan_to_num(missed), kind="stable") if missed[k] > 0][:15]
    if not order:
        return
    headers = ["class", "objects", "unmatched"]
    if report.suggested is not None:
        headers.append("with the sizes below")
    rows = []
    for k in order:
        row = [found.statistics.class_names[k], f"{objects[k]:,}", _percent(missed[k])]
        if report.suggested is not None:
            row.append(_percent(report.missed(suggested=True)[k]))
        rows.append(row)
    yield Table(headers, rows)
    if report.suggested is None and total > 0.1:
        yield Text(
            "No change of the sizes alone reaches many more. Larger images "
            "(INPUT.MIN_SIZE_TRAIN) help objects that are small against the stride, other "
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS those that are long."
        )
    if report.suggested is not None:
        lines = ", ".join(str(level) for level in report.suggested)
        yield Text(
            "What looks like a rare or hard class is out of reach of the anchors. Sizes that reach "
            f"it: {lines}",
            True,
        )
        yield Plot(
            lambda: plots.plot_missed(found, report, order),
            "Fraction of objects that no anchor reaches, with the sizes of the configuration and "
            "with the suggested ones.",
        )


def _tail(found: Analysis) -> Iterator[Part]:
    rows = [[f"{t.lambda_:.6g}", str(t.classes), _percent(t.ratio)] for t in found.tails]
    yield Table(["MODEL.BALANCE.EQL.LAMBDA", "tail classes", "TR"], rows)
    if found.tail is None:
        yield Text(
            "There is no tail: even the rarest class that has objects holds more than 10 % of the "
            "images."
        )
    else:
        yield Text(
            f"TR is the fraction of images of tail classes; 2 to 10 % is useful. Suggested: "
            f"{found.tail.lambda_:.6g}."
        )
    yield Plot(lambda: plots.plot_tail(found), "Tail ratio TR over lambda.")


def _repeats(found: Analysis) -> Iterator[Part]:
    if not found.repeats:
        return
    rows = []
    for shown in found.repeats:
        what = "suggested" if _same(found, shown) else ""
        cells = [f"{shown.threshold:g}", str(shown.repeated), f"{shown.factor.max():.2f}"]
        rows.append([*cells, f"{shown.epoch:.2f}", what])
    headers = ["DATALOADER.REPEAT_THRESHOLD", "classes repeated", "largest r(c)", "epoch", ""]
    yield Table(headers, rows)
    for shown in found.repeats:
        if not shown.repeated:
            yield Text(
                f"A threshold of {shown.threshold:g} does nothing here: no class is in fewer "
                f"than {100 * shown.threshold:g} % of the images.",
                True,
            )
    repeat = found.repeat
    if repeat is None:
        yield Text("No threshold is suggested: repeating would change little or cost too much.")
        return
    yield Text(
        "An epoch is given in multiples of the images. Effective counts are how often an epoch "
        "shows a class."
    )
    yield Plot(
        lambda: plots.plot_repeats(found, repeat),
        f"Images of each class, and effective counts with a threshold of {repeat.threshold:g}.",
    )


def _same(found: Analysis, repeat: RepeatFactors) -> bool:
    return found.repeat is not None and found.repeat.threshold == repeat.threshold


def _labels(found: Analysis) -> Iterator[Part]:
    table = found.table
    if table is None or table.absent is None:
        return
    images, classes = len(table.sizes), table.num_classes
    present = table.image_classes(crowds=True)
    keys = [pairs[:, 0] * classes + pairs[:, 1] for pairs in (present, table.absent)]
    known = len(unique(*keys))
    labelled = len(unique(table.absent[:, 0]))
    open_pairs = 0 if table.not_exhaustive is None else len(table.not_exhaustive)
    rows = [
        ["images with verified absences", f"{labelled:,}", _percent(labelled / images)],
        ["classes verified present", f"{len(present) / images:.2f} an image", ""],
        ["classes verified absent", f"{len(table.absent) / images:.2f} an image", ""],
        ["present, but not marked completely", f"{open_pairs / images:.2f} an image", ""],
        ["image and class known", f"{known:,}", _percent(known / (images * classes))],
    ]
    yield Table(["label", "number", "fraction"], rows)
    both = sum(map(len, keys)) - known  # neither has a pair twice
    if both:
        yield Text(f"{both:,} classes are marked as absent in images that show them.", True)
    yield Text(
        "All other pairs of image and class are unknown: a detector that is trained to find "
        "nothing there may learn something wrong. EQL and Federated use the labels."
    )


def _problems(found: Analysis) -> Iterator[Part]:
    hints = found.table.hints if found.table is not None else []
    yield from (Text(hint, True) for hint in hints)
    if not found.problems and not hints:
        yield Text("No duplicates, no empty images, no broken annotations.")
    if not found.problems:
        return
    rows = []
    for text, ids in found.problems.items():
        rows.append([text, f"{len(ids):,}", listed(ids, SHOWN_IDS)])
    yield Table(["what", "number", "ids"], rows)


def _percent(fraction: float) -> str:
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f} %"


def _pixels(size: float) -> str:
    return "-" if np.isnan(size) else f"{size:.0f}"
