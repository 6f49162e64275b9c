"""What to set: keys and values that fit the data, each with its reason, as YAML."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from d2_balance.data.checks.classes import configured_num_classes, num_classes_key

from .report import Analysis
from .table import EMPTY_VERIFIED

# Losses that a loss against the tail may take the place of: they treat all classes alike.
PLAIN_LOSSES = ("", "SigmoidCE", "BalancedCE", "SoftmaxCE", "Focal")
LVIS_SCORE = 0.0001  # score threshold and detections of an image in LVIS evaluations
LVIS_DETECTIONS = 300
# stock parts of Detectron2 and the ones that read MODEL.BALANCE
BALANCED_ARCH = {"RetinaNet": "BalancedRetinaNet", "GeneralizedRCNN": "BalancedRCNN"}
BALANCED_HEADS = {
    "StandardROIHeads": "BalancedStandardROIHeads",
    "CascadeROIHeads": "BalancedCascadeROIHeads",
}


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


def settings(found: Analysis, given: Sequence[str] = ()) -> list[Setting]:
    """What fits the data, in the order of a config; keys that already fit are left out.

    Args:
        found: the analysis.
        given: keys and values in turn that changed the configuration file before the analysis.
    """
    cfg = found.cfg
    lines = [*_classes(found), *_anchors(found), *_prior(found), *_tail(found), *_data(found)]
    if cfg is None:
        return lines
    lines = [line for line in lines if _value(cfg, line.key) != line.value]
    new = {line.key for line in lines}
    kept = [key for key in given[::2] if key not in new]
    return [*(Setting(key, _value(cfg, key), "As given with --set.") for key in kept), *lines]


def advice(found: Analysis) -> list[str]:
    """What the settings do not say: why some are not among them."""
    lines = []
    counts = found.statistics
    if found.tail is None:
        lines.append(
            "No loss or sampler against rare classes is suggested: even the rarest class, with "
            f"{int(counts.image_count.min()):,} of {counts.num_images:,} images, has more than "
            "10 % of the images of all classes together. There is no tail to protect."
        )
    elif found.cfg is not None and found.cfg.MODEL.BALANCE.CLS_LOSS not in (
        *PLAIN_LOSSES,
        "EQL",
        "EFL",
    ):
        lines.append(
            f"MODEL.BALANCE.CLS_LOSS stays {found.cfg.MODEL.BALANCE.CLS_LOSS}, which you chose."
        )
    if found.cfg is None:
        lines.append(
            "Without --config-file these lines are for Faster and Mask R-CNN; with it, they are "
            "for your model and include its anchors."
        )
    else:
        lines += _other_data(found)
    return lines


def to_yaml(lines: list[Setting], base: str = "") -> str:
    """The settings as text of a YAML file, with a comment above each.

    Args:
        lines: the settings.
        base: config file that they build on, for `_BASE_`; "" leaves it out.
    """
    tree: dict[str, Any] = {}
    for line in lines:
        *parents, last = line.key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = line
    text = [f"_BASE_: {_scalar(base)}"] if base else []
    return "\n".join([*text, *_render(tree, 0)]) + "\n"


def _render(tree: dict[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, node in tree.items():
        if isinstance(node, dict):
            yield f"{indent}{key}:"
            yield from _render(node, depth + 1)
            continue
        yield from (f"{indent}# {part}" for part in _wrapped(node.reason, 94 - len(indent)))
        if isinstance(node.value, list) and node.value and isinstance(node.value[0], list):
            yield f"{indent}{key}:"
            yield from (f"{indent}  - {_scalar(level)}" for level in node.value)
        else:
            yield f"{indent}{key}: {_scalar(node.value)}"


def _wrapped(text: str, width: int) -> list[str]:
    # a percent sign stays with its number
    lines = textwrap.wrap(text.replace(" %", "\xa0%"), width, break_long_words=False)
    return [line.replace("\xa0", " ") for line in lines]


def _scalar(value: Any) -> str:
    # yaml ends a bare scalar with a line of three dots
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg  # YAML has no tuples


def _arch(cfg: CfgNode) -> type:
    name = cfg.MODEL.META_ARCHITECTURE
    return META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else object


def _classes(found: Analysis) -> Iterator[Setting]:
    count = found.statistics.num_classes
    key = "MODEL.ROI_HEADS.NUM_CLASSES" if found.cfg is None else num_classes_key(found.cfg)
    yield Setting(key, count, f"The data have {count:,} classes.")
    masks_wanted = found.cfg is not None and found.cfg.MODEL.MASK_ON
    if masks_wanted and found.table is not None and not found.table.masks:
        yield Setting("MODEL.MASK_ON", False, "No object has a mask.")


def _anchors(found: Analysis) -> Iterator[Setting]:
    report = found.anchors
    if report is None or report.suggested is None:
        return
    before, after = report.missed(), report.missed(suggested=True)
    gain = np.where(report.objects > 0, before - after, -1.0)
    worst = int(np.argmax(gain * np.sqrt(report.objects)))  # a large gain, of more than a few
    yield Setting(
        "MODEL.ANCHOR_GENERATOR.SIZES",
        report.suggested,
        f"No anchor reaches {100 * before[worst]:.0f} % of the objects of "
        f"{found.statistics.class_names[worst]!r} (IoU {report.threshold:g}); with these sizes it "
        f"is {100 * after[worst]:.0f} %.",
    )


def _prior(found: Analysis) -> Iterator[Setting]:
    """The initial bias, for the losses whose start it is best for."""
    if found.cfg is None or found.anchors is None or found.anchors.prior is None:
        return
    if found.anchors.suggested is not None or found.cfg.MODEL.BALANCE.PRIOR_FILE:
        return  # other anchors have another prior
    keys = {"RetinaNet": "MODEL.RETINANET.PRIOR_PROB", "FCOS": "MODEL.FCOS.PRIOR_PROB"}
    key = keys.get(found.anchors.part)
    if key and found.cfg.MODEL.BALANCE.CLS_LOSS == "SigmoidCE":
        yield Setting(
            key,
            float(f"{found.anchors.prior.prior:.3g}"),
            "Share of positives among all scores, from which cross-entropy starts lowest (pi*).",
        )


def _tail(found: Analysis) -> Iterator[Setting]:
    """Loss and sampler against the tail."""
    if found.tail is None:
        return
    loss = _tail_loss(found)
    if loss:
        share = f"Tail: {_count(found.tail.classes)}, {100 * found.tail.ratio:.1f} % of the images"
        yield from _balanced_parts(found.cfg)
        yield Setting(
            "MODEL.BALANCE.CLS_LOSS",
            loss,
            f"{share} (TR); the loss keeps frequent classes from pushing down their scores."
            if loss == "EQL"
            else f"{share}; the loss weighs the examples of classes that learn little.",
        )
    if loss == "EQL":
        yield Setting(
            "MODEL.BALANCE.EQL.LAMBDA",
            found.tail.lambda_,
            f"Below it lies the tail, {_count(found.tail.classes)}; a TR of 2 to 10 % is useful.",
        )
    if found.repeat is not None:
        yield Setting(
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            "Shows images with rare classes more often.",
        )
        yield Setting(
            "DATALOADER.REPEAT_THRESHOLD",
            found.repeat.threshold,
            f"Repeats images of {_count(found.repeat.repeated)}; an epoch has "
            f"{found.repeat.epoch:.2f} times the images.",
        )


def _count(classes: int) -> str:
    return f"{classes:,} class{'es' * (classes != 1)}"


def _tail_loss(found: Analysis) -> str:
    """EQL for RoI heads, EFL for dense heads; "" where another loss was chosen."""
    if found.cfg is None:
        return "EQL"
    chosen, arch = found.cfg.MODEL.BALANCE.CLS_LOSS, _arch(found.cfg)
    if chosen in ("EQL", "EFL"):
        return chosen
    known = {*BALANCED_ARCH, *BALANCED_ARCH.values(), "BalancedFCOS"}
    if chosen not in PLAIN_LOSSES or found.cfg.MODEL.META_ARCHITECTURE not in known:
        return ""
    if issubclass(arch, RetinaNet | FCOS):
        return "EFL"
    heads = found.cfg.MODEL.ROI_HEADS.NAME
    return "EQL" if heads in (*BALANCED_HEADS, *BALANCED_HEADS.values()) else ""


def _balanced_parts(cfg: CfgNode | None) -> Iterator[Setting]:
    arch = "GeneralizedRCNN" if cfg is None else cfg.MODEL.META_ARCHITECTURE
    heads = "StandardROIHeads" if cfg is None else cfg.MODEL.ROI_HEADS.NAME
    reason = "Reads MODEL.BALANCE; all else stays as it is."
    if arch in BALANCED_ARCH:
        yield Setting("MODEL.META_ARCHITECTURE", BALANCED_ARCH[arch], reason)
    if arch in ("GeneralizedRCNN", "BalancedRCNN") and heads in BALANCED_HEADS:
        yield Setting("MODEL.ROI_HEADS.NAME", BALANCED_HEADS[heads], reason)


def _data(found: Analysis) -> Iterator[Setting]:
    """Settings that image-level labels and LVIS rules ask for."""
    if EMPTY_VERIFIED in found.problems:
        count = len(found.problems[EMPTY_VERIFIED])
        yield Setting(
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
            False,
            f"{count:,} image{'s' * (count > 1)} without objects show which classes are absent.",
        )
    if not _has_image_labels(found):
        return
    if found.cfg is None or found.cfg.TEST.DETECTIONS_PER_IMAGE < LVIS_DETECTIONS:
        reason = "LVIS evaluations count 300 detections an image."
        yield Setting("TEST.DETECTIONS_PER_IMAGE", LVIS_DETECTIONS, reason)
    node = "ROI_HEADS" if found.cfg is None else num_classes_key(found.cfg).split(".")[1]
    if found.cfg is None or found.cfg.MODEL[node].SCORE_THRESH_TEST > LVIS_SCORE:
        yield Setting(
            f"MODEL.{node}.SCORE_THRESH_TEST",
            LVIS_SCORE,
            "Scores of rare classes are low; a higher threshold cuts their detections off.",
        )


def _has_image_labels(found: Analysis) -> bool:
    table = found.table
    labels = () if table is None else (table.absent, table.not_exhaustive)
    return any(part is not None and len(part) > 0 for part in labels)


def _other_data(found: Analysis) -> Iterator[str]:
    names = tuple(found.cfg.DATASETS.TRAIN)
    count = found.statistics.num_classes
    if count != configured_num_classes(found.cfg):
        yield (
            f"The model has {configured_num_classes(found.cfg)} classes and the data {count}: "
            "DATASETS.TRAIN and DATASETS.TEST must name sets with these classes too; they are "
            f"{', '.join(names) or 'empty'} now."
        )
