"""All figures of an analysis, computed once; console and page show the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from d2_balance.data.groups import LVIS_CUTS

from .images import check_images, sample_images
from .source import Source
from .table import EMPTY_VERIFIED, DataTable, Statistics
from .tail import (
    RepeatFactors,
    Tail,
    common_border,
    lambda_for_tail_ratio,
    repeat_factors,
    suggested_tail,
    suggested_threshold,
    tail_at,
)

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from .anchors import AnchorReport

USUAL_RATIOS = (0.02, 0.05, 0.10)
LVIS_THRESHOLD = 0.001  # DATALOADER.REPEAT_THRESHOLD of Detectron2's LVIS configs


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found.

    Attributes:
        source: the dataset.
        cfg: the configuration it is analysed with, or None.
        statistics: class counts as a training with the suggested settings sees them.
        groups: K letters r, c, f.
        cuts: cut points that the user chose, or None.
        filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS that is suggested.
        tails: thresholds of the equalization loss to show, in rising order.
        tail: the suggested one, or None where there is no tail.
        repeats: what thresholds of repeat-factor sampling do, in rising order.
        repeat: the suggested one, or None.
        anchors: what the anchors reach, or None.
        problems: what is wrong in the data, to the ids it was found in.
        notes: what could not be analysed, and why.
    """

    source: Source
    cfg: CfgNode | None
    statistics: Statistics
    groups: list[str]
    cuts: tuple[int, int] | None
    filter_empty: bool
    tails: list[Tail]
    tail: Tail | None
    repeats: list[RepeatFactors]
    repeat: RepeatFactors | None
    anchors: AnchorReport | None
    problems: dict[str, list]
    notes: list[str] = field(default_factory=list)

    @property
    def table(self) -> DataTable | None:
        """Images and objects, or None where only counts are known."""
        return self.source.table

    @property
    def order(self) -> np.ndarray:
        """(K,) classes from the most frequent to the rarest, by images and then by objects."""
        counts = self.statistics
        return np.lexsort((-counts.instance_count, -counts.image_count))


def analyze(
    source: Source,
    cfg: CfgNode | None = None,
    *,
    lambda_: float | None = None,
    ratio: float | None = None,
    cuts: tuple[int, int] | None = None,
    max_images: int = 200,
) -> Analysis:
    """Count everything.

    Args:
        source: the dataset.
        cfg: configuration whose anchors and settings are checked, or None.
        lambda_: threshold of the equalization loss whose TR is wanted, or None.
        ratio: TR whose lambda is wanted, or None.
        cuts: cut points of the frequency groups; None takes the file's groups or LVIS's.
        max_images: images whose anchors are counted.

    Raises:
        ValueError: no image has an object, or the model has no anchors or anchor points.
    """
    table, notes = source.table, [source.note] if source.note else []
    filter_empty = cfg is None or cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    problems: dict[str, list] = {}
    if table is None:
        if source.counts is None:
            raise ValueError(f"{source.name} has neither images nor counts of its classes")
        statistics = source.counts
    else:
        table.statistics()  # refuses a set without an object
        problems = dict(table.problems)
        filter_empty = filter_empty and EMPTY_VERIFIED not in problems
        statistics = table.statistics(filter_empty)
    groups = statistics.group(cuts)
    tail = suggested_tail(statistics)
    repeats, repeat, anchors = [], None, None
    if table is not None:
        border = common_border(statistics, groups, cuts)
        repeat = suggested_threshold(table, statistics, border, filter_empty)
        repeats = _repeats(table, cfg, repeat, filter_empty)
        problems |= check_images(source, sample_images(table, max_images, 0))
        if cfg is not None:
            from .anchors import anchor_report  # needs Detectron2

            anchors = anchor_report(cfg, table, max_images)
        else:
            notes.append("Give --config-file to see what its anchors make of the objects.")
    return Analysis(
        source=source,
        cfg=cfg,
        statistics=statistics,
        groups=groups,
        cuts=cuts if cuts or statistics.file_groups else LVIS_CUTS,
        filter_empty=filter_empty,
        tails=_tails(statistics, lambda_, ratio, tail),
        tail=tail,
        repeats=repeats,
        repeat=repeat,
        anchors=anchors,
        problems=problems,
        notes=notes,
    )


def _tails(
    statistics: Statistics, lambda_: float | None, ratio: float | None, tail: Tail | None
) -> list[Tail]:
    values = [] if lambda_ is None else [lambda_]
    wanted = USUAL_RATIOS if lambda_ is None and ratio is None else [] if ratio is None else [ratio]
    counts = statistics.frequency, statistics.image_count
    values += [lambda_for_tail_ratio(*counts, r) for r in wanted]
    if tail is not None and lambda_ is None and ratio is None:
        values.append(tail.lambda_)
    found: dict[int, Tail] = {}  # thresholds between the same two classes are the same
    for value in values if lambda_ is None else values[::-1]:
        shown = tail_at(statistics, value)
        found[shown.classes] = shown
    return sorted(found.values(), key=lambda shown: shown.lambda_)


def _repeats(
    table: DataTable, cfg: CfgNode | None, repeat: RepeatFactors | None, filter_empty: bool
) -> list[RepeatFactors]:
    values = {LVIS_THRESHOLD}
    if cfg is not None and cfg.DATALOADER.REPEAT_THRESHOLD > 0:
        values.add(cfg.DATALOADER.REPEAT_THRESHOLD)
    if repeat is not None:
        values.add(repeat.threshold)
    return [repeat_factors(table, value, filter_empty) for value in sorted(values)]
