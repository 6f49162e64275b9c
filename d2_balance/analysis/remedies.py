"""Which remedies the data call for: one table of rules, asked in order and ranked.

A rule looks at one figure of the data. What it suggests carries that figure, what it would do here,
and the settings. `decision_table` prints the rules for the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from d2_balance.utils.config_tree import nested, value_of
from d2_balance.utils.names import BALANCED
from d2_balance.utils.text import plural, table

from .table import EMPTY_VERIFIED
from .tail import Tail

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from .report import Analysis

MOST = 5
# Losses that a loss against the tail may take the place of: they treat all classes alike.
PLAIN_LOSSES = ("", "SigmoidCE", "BalancedCE", "SoftmaxCE", "Focal")
LVIS_SCORE = 0.0001  # score threshold and detections of an image in LVIS evaluations
LVIS_DETECTIONS = 300


@dataclass(frozen=True)
class Setting:
    """One line of YAML.

    Attributes:
        key: with dots.
        value: what to set it to.
        reason: why, as a sentence.
    """

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """A remedy for these data.

    Attributes:
        name: short, for tables and directories.
        reason: the figure of the data that calls for it, as a sentence.
        effect: what it would do here, as a sentence.
        settings: its keys.
        reach: fraction of the classes, objects or images that it concerns, in [0, 1].
    """

    name: str
    reason: str
    effect: str
    settings: tuple[Setting, ...]
    reach: float

    @property
    def fragment(self) -> dict[str, Any]:
        """The settings as nested keys, to be merged into a config."""
        return nested({setting.key: setting.value for setting in self.settings})


@dataclass(frozen=True)
class Rule:
    """A row of the decision table.

    Attributes:
        data: what the data look like.
        remedy: what to set, in Markdown.
        why: the reason.
        suggest: makes the suggestion, None if the data do not call for it.
    """

    data: str
    remedy: str
    why: str
    suggest: Callable[[Analysis], Suggestion | None]


def suggestions(analysis: Analysis) -> list[Suggestion]:
    """Return at most `MOST` remedies that are not set yet, largest reach first."""
    made = []
    for rule in RULES:
        suggestion = rule.suggest(analysis)
        if suggestion is not None:
            new = [s for s in suggestion.settings if not _is_set(analysis.cfg, s)]
            if new:
                made.append(replace(suggestion, settings=tuple(new)))
    return sorted(made, key=lambda s: -s.reach)[:MOST]


def decision_table() -> str:
    """Return the rules as a Markdown table."""
    rows = [[rule.data, rule.remedy, rule.why] for rule in RULES]
    return table(rows, ["your data look like this", "set this", "because"])


def inert(analysis: Analysis) -> list[str]:
    """Return a sentence for each remedy of the configuration that does nothing on these data."""
    if analysis.cfg is None:
        return []
    from d2_balance.modeling.inert import inert_on  # needs Detectron2

    return inert_on(analysis.cfg, analysis.statistics.as_class_counts())


def _anchors(analysis: Analysis) -> Suggestion | None:
    report = analysis.anchors
    if report is None or report.suggested is None:
        return None
    before, after = report.missed(), report.missed(suggested=True)
    gain = np.where(report.objects > 0, before - after, -1.0)
    worst = int(np.argmax(gain * np.sqrt(report.objects)))  # a large gain, of more than a few
    name = analysis.statistics.class_names[worst]
    reason = (
        f"No anchor reaches {100 * before[worst]:.0f} % of the objects of {name!r} "
        f"(IoU {report.threshold:g})"
    )
    effect = f"with these sizes it is {100 * after[worst]:.0f} %."
    sizes = Setting("MODEL.ANCHOR_GENERATOR.SIZES", report.suggested, f"{reason}; {effect}")
    # what no anchor reaches cannot be learned: the worst class counts, whatever its size
    return Suggestion(
        "anchor sizes", f"{reason}.", f"W{effect[1:]}", (sizes,), float(before[worst])
    )


def _tail_text(tail: Tail) -> str:
    return f"Tail: {plural(tail.classes, 'class')}, {100 * tail.ratio:.1f} % of the images"


def _tail_reason(analysis: Analysis, tail: Tail) -> str:
    counts = analysis.statistics.image_count.tolist()
    seen = [n for n in counts if n]
    return (
        f"{plural(tail.classes, 'class')} of {len(counts):,} hold "
        f"{100 * tail.ratio:.1f} % of the images; the most frequent class is in "
        f"{max(seen) / min(seen):,.0f} times the images of the rarest."
    )


def _eql(analysis: Analysis) -> Suggestion | None:
    if analysis.tail is None or tail_loss(analysis) != "EQL":
        return None
    tail, classes = analysis.tail, plural(analysis.tail.classes, "class")
    settings = [
        *_balanced_parts(analysis.cfg),
        Setting(
            "MODEL.BALANCE.CLS_LOSS",
            "EQL",
            f"{_tail_text(analysis.tail)} (TR); the loss keeps frequent classes from pushing down "
            "their scores.",
        ),
        Setting(
            "MODEL.BALANCE.EQL.LAMBDA",
            tail.lambda_,
            f"Below it lies the tail, {classes}; a TR of 2 to 10 % is useful.",
        ),
    ]
    effect = (
        f"{classes} below lambda {tail.lambda_:g} get no negative gradient from objects of others."
    )
    reach = tail.classes / analysis.statistics.num_classes
    return Suggestion("EQL", _tail_reason(analysis, analysis.tail), effect, tuple(settings), reach)


def _efl(analysis: Analysis) -> Suggestion | None:
    if analysis.tail is None or tail_loss(analysis) != "EFL":
        return None
    loss = Setting(
        "MODEL.BALANCE.CLS_LOSS",
        "EFL",
        f"{_tail_text(analysis.tail)}; the loss weighs the examples of classes that learn little.",
    )
    effect = f"The focus rises for {plural(analysis.tail.classes, 'class')} as they fall behind."
    reach = analysis.tail.classes / analysis.statistics.num_classes
    settings = (*_balanced_parts(analysis.cfg), loss)
    return Suggestion("EFL", _tail_reason(analysis, analysis.tail), effect, settings, reach)


def _repeat(analysis: Analysis) -> Suggestion | None:
    repeat = analysis.repeat
    if repeat is None or analysis.tail is None:
        return None
    images = analysis.statistics.image_count
    rarest = int(np.argmax(repeat.factor))
    classes = plural(repeat.repeated, "class")
    shown = plural(int(images[rarest]), "image")
    settings = (
        Setting(
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            "Shows images with rare classes more often.",
        ),
        Setting(
            "DATALOADER.REPEAT_THRESHOLD",
            repeat.threshold,
            f"Repeats images of {classes}; an epoch has {repeat.epoch:.2f} times the images.",
        ),
    )
    return Suggestion(
        "repeat factors",
        f"{classes} are in fewer than {100 * repeat.threshold:.3g} % of the images; "
        f"{analysis.statistics.class_names[rarest]!r} is in {shown}.",
        f"Repeat factors up to {repeat.factor[rarest]:.1f}; an epoch has {repeat.epoch:.2f} times "
        "the images.",
        settings,
        repeat.repeated / analysis.statistics.num_classes,
    )


def _empty(analysis: Analysis) -> Suggestion | None:
    if EMPTY_VERIFIED not in analysis.problems or analysis.table is None:
        return None
    count = len(analysis.problems[EMPTY_VERIFIED])
    text = f"{plural(count, 'image')} without objects show which classes are absent."
    return Suggestion(
        "images without objects",
        text,
        f"Training keeps {plural(count, 'image')} that it would leave out.",
        (Setting("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, text),),
        count / len(analysis.table.sizes),
    )


def _limits(analysis: Analysis) -> Suggestion | None:
    """LVIS evaluations count 300 detections of any score."""
    cfg = analysis.cfg
    if not has_image_labels(analysis):
        return None
    node = "ROI_HEADS" if cfg is None else _class_node(cfg)
    settings = []
    if cfg is None or cfg.TEST.DETECTIONS_PER_IMAGE < LVIS_DETECTIONS:
        reason = "LVIS evaluations count 300 detections an image."
        settings.append(Setting("TEST.DETECTIONS_PER_IMAGE", LVIS_DETECTIONS, reason))
    if cfg is None or cfg.MODEL[node].SCORE_THRESH_TEST > LVIS_SCORE:
        reason = "Scores of rare classes are low; a higher threshold cuts their detections off."
        settings.append(Setting(f"MODEL.{node}.SCORE_THRESH_TEST", LVIS_SCORE, reason))
    if not settings:
        return None
    rare = sum(group == "r" for group in analysis.groups)
    return Suggestion(
        "limits of LVIS",
        f"The data have image-level labels, and {plural(rare, 'class')} of "
        f"{len(analysis.groups):,} are rare.",
        "More detections of low score, where rare classes are, reach the evaluation.",
        tuple(settings),
        rare / len(analysis.groups),
    )


def _prior(analysis: Analysis) -> Suggestion | None:
    """The initial bias, for the losses whose start it is best for."""
    cfg, report = analysis.cfg, analysis.anchors
    if cfg is None or report is None or report.prior is None:
        return None
    if report.suggested is not None or cfg.MODEL.BALANCE.PRIOR_FILE:
        return None  # other anchors have another prior
    keys = {"RetinaNet": "MODEL.RETINANET.PRIOR_PROB", "FCOS": "MODEL.FCOS.PRIOR_PROB"}
    key = keys.get(report.part)
    if not key or cfg.MODEL.BALANCE.CLS_LOSS != "SigmoidCE":
        return None
    value = float(f"{report.prior.prior:.3g}")
    positives, rows = report.prior.positives, report.prior.samples
    return Suggestion(
        "initial bias",
        f"Background is {100 * (1 - positives / rows):.3f} % of the anchors, "
        f"{(rows - positives) / positives:,.0f} for each with an object.",
        f"Training starts at a probability of {value:g} (pi*), from which cross-entropy is lowest.",
        (
            Setting(
                key,
                value,
                "Fraction of positives among all scores, from which cross-entropy starts lowest "
                "(pi*).",
            ),
        ),
        1 - positives / rows,
    )


RULES = (
    Rule(
        "a class is missed although it is not rare: no anchor fits its objects",
        "`MODEL.ANCHOR_GENERATOR.SIZES` that reach them",
        "what no anchor reaches cannot be learned; no loss helps",
        _anchors,
    ),
    Rule(
        "some classes hold less than 10 % of the images, detector with RoI heads",
        "`CLS_LOSS: EQL` with the lambda of this tail",
        "objects of frequent classes push the scores of rare ones down",
        _eql,
    ),
    Rule(
        "some classes hold less than 10 % of the images, dense detector",
        "`CLS_LOSS: EFL`",
        "the focal weight of a class follows how well it learns",
        _efl,
    ),
    Rule(
        "the same, and images of the rare classes are few",
        "`SAMPLER_TRAIN: RepeatFactorTrainingSampler`",
        "an epoch shows rare classes too seldom",
        _repeat,
    ),
    Rule(
        "images without objects say which classes are absent (LVIS)",
        "`FILTER_EMPTY_ANNOTATIONS: False`",
        "verified absences are the negatives of rare classes",
        _empty,
    ),
    Rule(
        "image-level labels, evaluation by LVIS rules",
        "`DETECTIONS_PER_IMAGE: 300`, `SCORE_THRESH_TEST: 0.0001`",
        "the evaluation counts 300 detections, and rare classes have low scores",
        _limits,
    ),
    Rule(
        "cross-entropy over all anchors (`CLS_LOSS: SigmoidCE`)",
        "`PRIOR_PROB` at the fraction of foreground",
        "otherwise background rules the first iterations",
        _prior,
    ),
)


def tail_loss(analysis: Analysis) -> str:
    """Return EQL for RoI heads, EFL for dense heads; "" if another loss was chosen."""
    cfg = analysis.cfg
    if cfg is None:
        return "EQL"
    chosen = cfg.MODEL.BALANCE.CLS_LOSS
    if chosen in ("EQL", "EFL"):
        return chosen
    if chosen not in PLAIN_LOSSES or not _is_balanced(cfg, "MODEL.META_ARCHITECTURE"):
        return ""
    if _is_dense(cfg):
        return "EFL"
    return "EQL" if _is_balanced(cfg, "MODEL.ROI_HEADS.NAME") else ""


def _is_balanced(cfg: CfgNode, key: str) -> bool:
    """Whether a part is one that reads MODEL.BALANCE, or has a form that does."""
    names = BALANCED[key]
    return value_of(cfg, key) in {*names, *names.values()}


def has_image_labels(analysis: Analysis) -> bool:
    """Return whether the data have image-level labels."""
    data = analysis.table
    labels = () if data is None else (data.absent, data.not_exhaustive)
    return any(part is not None and len(part) > 0 for part in labels)


def config_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key with dots, tuples as lists, as YAML has them."""
    value = value_of(cfg, key)
    return list(value) if isinstance(value, tuple) else value


def _is_set(cfg: CfgNode | None, setting: Setting) -> bool:
    return cfg is not None and config_value(cfg, setting.key) == setting.value


def _is_dense(cfg: CfgNode) -> bool:
    from detectron2.modeling import META_ARCH_REGISTRY
    from detectron2.modeling.meta_arch.dense_detector import DenseDetector

    return issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), DenseDetector)


def _class_node(cfg: CfgNode) -> str:
    from d2_balance.data.checks.classes import num_classes_key

    return num_classes_key(cfg).split(".")[1]


def _balanced_parts(cfg: CfgNode | None) -> Iterator[Setting]:
    stock = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    }
    if cfg is not None:
        stock = {key: value_of(cfg, key) for key in stock}
        if _is_dense(cfg):
            del stock["MODEL.ROI_HEADS.NAME"]
    for key, name in stock.items():
        if name in BALANCED[key]:
            reason = "Reads MODEL.BALANCE; all else stays as it is."
            yield Setting(key, BALANCED[key][name], reason)
