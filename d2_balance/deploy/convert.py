"""Weights of other projects as a run's directory: config, checkpoint and class names.

| source | architecture | equal |
|---|---|---|
| Detectron2 | any | loads as it is, nothing to convert |
| eql.detectron2 (the authors' EQL) | Faster, Mask R-CNN | yes |
| mmdet 2 and 3 | Faster, Mask R-CNN, ResNet or ResNeXt with FPN | yes |
| mmdet 2 and 3 | RetinaNet, the same backbones | all but P7: mmdet has no ReLU before it |
| mmdet 1, BAGS (the authors') | Faster, Mask R-CNN | all but anchors, which mmdet 1 rounds |

Orders: both projects keep channels of a feature map, anchors before classes, and dx, dy, dw, dh
alike. mmdet 1 has background first, mmdet 2 and 3 and Detectron2 last. The anchors of a RetinaNet
location go by ratio, then size in mmdet, and by size, then ratio in Detectron2.

A box of mmdet 1 includes its last pixel. With x2 + 1 for x2 its code of deltas, pooling, clipping
and non-maximum suppression is Detectron2's with ROIAlign and 2 x 2 samples in a bin; its anchors,
centred at (stride - 1) / 2, are then those of ANCHOR_GENERATOR.OFFSET 0.5, rounded to whole pixels.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.model_zoo import get_config_file
from torch import Tensor

from d2_balance.data.class_counts import ClassCounts
from d2_balance.data.model_classes import CHECKPOINT_KEY, FILE, ModelClasses
from d2_balance.engine.setup.config_file import read_config
from d2_balance.utils.files import atomic_path

MMDET, EQL, BAGS = SOURCES = ("mmdet", "eql", "bags")
STYLES = ("pytorch", "caffe")

_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_SIZES, _RATIOS = 3, 3  # of RetinaNet's anchors
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError)

State = dict[str, Tensor]


@dataclass
class Converted:
    """Weights under Detectron2's names, and the config that they are for.

    Attributes:
        model: tensors by name.
        config: name in Detectron2's model zoo of the config that the rest differs from.
        overrides: keys and values in turn.
        notes: what the user should know.
    """

    model: State
    config: str
    overrides: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    path: str,
    source: str,
    output: str,
    *,
    names: Sequence[str] | None = None,
    counts: str = "",
    bins: str = "",
    style: str = "pytorch",
) -> list[str]:
    """Convert a checkpoint and write a directory that `load` and `d2-balance predict` take.

    Args:
        path: the checkpoint.
        source: one of `SOURCES`.
        output: directory, new or empty.
        names: K class names in the order of training; if not given, those of the checkpoint.
        counts: file of `ClassCounts.save` for the training set, or "".
        bins: BAGS: the release's `label2binlabel.pt`.
        style: mmdet: "pytorch" (RGB, torchvision's weights) or "caffe" (BGR).

    Returns:
        What the user should know.

    Raises:
        FileExistsError: the output holds files.
        ValueError: the checkpoint cannot be read, or is of an architecture that is not converted.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; it must be one of {', '.join(SOURCES)}")
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if os.path.isdir(output) and os.listdir(output):
        raise FileExistsError(f"{output} holds files; give a new directory")
    state, meta = read_state(path)
    statistics = ClassCounts.load(counts) if counts else None
    if source == EQL:
        converted = from_eql(state, statistics)
    elif source == BAGS:
        if not bins:
            raise ValueError(
                "BAGS needs the release's label2binlabel.pt, which says which column is which "
                "class (--bins FILE)"
            )
        converted = from_bags(state, _plain(bins), style)
    else:
        converted = from_mmdet(state, style, str(meta.get("mmdet_version", "")))
    cfg = read_config(get_config_file(converted.config), converted.overrides)
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    if "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE:
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    classes = _classes(names, meta, statistics, num_classes, path)
    _write(cfg, converted.model, classes, output)
    return converted.notes


def read_state(path: str) -> tuple[State, dict[str, Any]]:
    """Return the tensors of a checkpoint and what it says of itself.

    Raises:
        ValueError: it cannot be read without running code that it may hold, or has no tensors.
    """
    content = _plain(path)
    state = content
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no tensors under 'state_dict' or 'model'")
    meta = content.get("meta", {})
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors, meta if isinstance(meta, dict) else {}


def _plain(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be loaded as tensors and plain values "
            f"({' '.join(str(error).split())[:120]}); if you trust it, save its tensors alone: "
            "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW)"
        ) from error


def from_mmdet(state: State, style: str = "pytorch", version: str = "") -> Converted:
    """Convert Faster R-CNN, Mask R-CNN or RetinaNet with a ResNet or ResNeXt FPN backbone.

    Args:
        state: tensors of mmdet 1, 2 or 3.
        style: "pytorch" or "caffe".
        version: of mmdet, which the tensors of a RetinaNet do not show; "" is 2 or later.

    Raises:
        ValueError: a tensor belongs to another architecture; names it.
    """
    dense = any(name.startswith("bbox_head.retina_cls") for name in state)
    first = version.startswith(("0.", "1."))
    if not dense:
        first = not any(name.startswith("roi_head.") for name in state)
    state = {
        name.removeprefix("roi_head."): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    names = _mmdet_names(dense)
    model = {}
    for name, value in state.items():
        renamed = _renamed(name, names)
        if renamed is None:
            raise ValueError(
                f"{name} {tuple(value.shape)} belongs to no Faster R-CNN, Mask R-CNN or RetinaNet "
                "with a ResNet FPN backbone; other architectures of mmdet are not converted"
            )
        model[renamed] = value
    overrides = _backbone_settings(state, style)
    notes = []
    if dense:
        num_classes = _reorder_anchors(model)
        overrides += ["MODEL.RETINANET.NUM_CLASSES", num_classes]
        config = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
        notes.append(
            "mmdet's RetinaNet has no ReLU before P7 and Detectron2's has one: boxes of the "
            "largest anchors differ until the model is fine-tuned."
        )
    else:
        masks = "roi_heads.mask_head.predictor.weight" in model
        base = "COCO-InstanceSegmentation/mask" if masks else "COCO-Detection/faster"
        config = f"{base}_rcnn_R_50_FPN_1x.yaml"
        if first:
            _background_last(model)
            for head in ("BOX", "MASK"):
                overrides += [f"MODEL.ROI_{head}_HEAD.POOLER_TYPE", "ROIAlign"]
                overrides += [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO", 2]
        overrides += ["MODEL.ROI_HEADS.NUM_CLASSES", _softmax_classes(model)]
    if first:
        overrides += ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
        notes.append(
            "mmdet 1 rounds its anchors to whole pixels and Detectron2 does not: boxes differ by a "
            "fraction of a pixel until the model is fine-tuned."
        )
    return Converted(model, config, overrides, notes)


def from_bags(state: State, bins: Any, style: str = "pytorch") -> Converted:
    """Convert Faster or Mask R-CNN of the authors' BAGS, which is one of mmdet 1.

    Args:
        state: its tensors; `fc_cls` has 2 columns for background and foreground, then for each bin
            one for others and those of its classes.
        bins: (G + 1, K + 1) int64, row 0 for background and foreground: the place of a class in a
            bin, 0 if it is not there. Column 0 is background.
        style: as `from_mmdet`.

    Raises:
        ValueError: the two do not fit together.
    """
    key = "bbox_head.fc_cls.weight"
    if not isinstance(bins, Tensor) or bins.dim() != 2 or key not in state:
        raise ValueError("BAGS needs bbox_head.fc_cls, and label2binlabel as a table of integers")
    places = bins[1:, 1:].long()  # (G, K)
    group = places.argmax(dim=0)  # (K,)
    lengths = [2, *(places.max(dim=1).values + 1).tolist()]
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)  # (G + 1,)
    if sum(lengths) != len(state[key]) or int((places > 0).sum(dim=0).min()) != 1:
        raise ValueError(
            f"label2binlabel describes {sum(lengths)} columns, and {key} has {len(state[key])}; "
            "each class must be in one bin"
        )
    own = starts[1:][group] + places.max(dim=0).values  # (K,)
    # classes, others of each bin, object, background
    order = torch.cat([own, starts[1:], torch.tensor([1, 0])])
    num_classes = len(own)
    renamed = dict(state)
    for part in ("weight", "bias"):
        # what `from_mmdet` turns from background first to last, is turned back here
        renamed[f"bbox_head.fc_cls.{part}"] = state[f"bbox_head.fc_cls.{part}"][: num_classes + 1]
    converted = from_mmdet(renamed, style)
    for part in ("weight", "bias"):
        converted.model[f"roi_heads.box_predictor.cls_score.{part}"] = state[
            f"bbox_head.fc_cls.{part}"
        ][order]
    groups = len(places)
    owner = torch.cat([group, torch.arange(groups), torch.full((2,), groups)])
    prefix = "roi_heads.box_predictor.cls_loss"
    # the cuts (10, 100, 1000) put a class of 1, 10, 100 or 1000 objects in group 0, 1, 2 or 3
    converted.model |= {
        f"{prefix}.instance_count": 10.0 ** group.double(),
        f"{prefix}.group": group,
        f"{prefix}.member": owner == torch.arange(groups + 1).unsqueeze(1),
    }
    converted.overrides += [*_BALANCED, "MODEL.BALANCE.CLS_LOSS", "BAGS", *_lvis_test(0.001)]
    if groups != 4:
        cuts = [10**k for k in range(1, groups)]
        converted.overrides += ["MODEL.BALANCE.BAGS.CUTS", cuts]
    return converted


_BALANCED = [
    "MODEL.META_ARCHITECTURE", "BalancedRCNN", "MODEL.ROI_HEADS.NAME", "BalancedStandardROIHeads",
]  # fmt: skip


def _lvis_test(score_threshold: float) -> list[Any]:
    """Keys of what a release does at test time on LVIS."""
    keys = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", score_threshold]
    return [*keys, "TEST.DETECTIONS_PER_IMAGE", 300]


def from_eql(state: State, counts: ClassCounts | None = None) -> Converted:
    """Take over Faster or Mask R-CNN of the authors' EQL, whose names are Detectron2's.

    Args:
        state: its tensors; the classifier has one sigmoid output for each class.
        counts: of the training set; None makes the loss plain sigmoid cross-entropy, whose scores
            are the same.

    Raises:
        ValueError: there is no classifier.
    """
    key = "roi_heads.box_predictor.cls_score.weight"
    if key not in state:
        raise ValueError(f"{key} is missing; this is no checkpoint of eql.detectron2")
    num_classes = len(state[key])
    boxes = len(state["roi_heads.box_predictor.bbox_pred.bias"]) // 4
    if boxes not in (1, num_classes):
        raise ValueError(
            f"{key} has {num_classes} outputs for {boxes} classes; EQL has no output for "
            "background, and the softmax models of eql.detectron2 are Detectron2's own: they load "
            "without conversion"
        )
    masks = any(name.startswith("roi_heads.mask_head.") for name in state)
    base = "COCO-InstanceSegmentation/mask" if masks else "COCO-Detection/faster"
    overrides: list[Any] = [*_BALANCED, "MODEL.ROI_HEADS.NUM_CLASSES", num_classes]
    overrides += ["MODEL.RESNETS.DEPTH", _depth(state, "backbone.bottom_up.res{}.", range(2, 6))]
    overrides += ["MODEL.BALANCE.BACKGROUND_COLUMN", False]
    if boxes != num_classes:
        overrides += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    mask_bias = state.get("roi_heads.mask_head.predictor.bias")
    if mask_bias is not None and len(mask_bias) != num_classes:
        overrides += ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]
    overrides += _lvis_test(0.0001)
    model, notes = dict(state), []
    if counts is None:
        overrides += ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE"]
        notes.append(
            "Without --counts the loss is plain sigmoid cross-entropy: the same scores, but "
            "training on would not be EQL."
        )
    else:
        overrides += ["MODEL.BALANCE.CLS_LOSS", "EQL"]
        model["roi_heads.box_predictor.cls_loss.class_frequency"] = counts.frequency
    return Converted(model, f"{base}_rcnn_R_50_FPN_1x.yaml", overrides, notes)


_Name = str | Callable[[re.Match], str]
_Rule = tuple[re.Pattern, _Name]


def _mmdet_names(dense: bool) -> list[_Rule]:
    """Patterns of mmdet's names (without `roi_head.`), and Detectron2's names."""
    level = 3 if dense else 2  # of the first lateral convolution
    shared: list[tuple[str, _Name]] = [
        (r"backbone\.conv1\.(.+)", r"backbone.bottom_up.stem.conv1.\1"),
        (r"backbone\.bn1\.(.+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
        (
            r"backbone\.layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)",
            lambda m: _block(m[1], m[2], f"conv{m[4]}", m[3] == "bn", m[5]),
        ),
        (
            r"backbone\.layer(\d)\.(\d+)\.downsample\.([01])\.(.+)",
            lambda m: _block(m[1], m[2], "shortcut", m[3] == "1", m[4]),
        ),
        (
            r"neck\.lateral_convs\.(\d)\.conv\.(.+)",
            lambda m: f"backbone.fpn_lateral{int(m[1]) + level}.{m[2]}",
        ),
        (
            r"neck\.fpn_convs\.(\d)\.conv\.(.+)",
            lambda m: (
                f"backbone.fpn_output{int(m[1]) + level}.{m[2]}"
                if int(m[1]) + level < 6
                else f"backbone.top_block.p{int(m[1]) + level}.{m[2]}"
            ),
        ),
    ]
    two_stage: list[tuple[str, _Name]] = [
        (r"rpn_head\.rpn_conv\.(.+)", r"proposal_generator.rpn_head.conv.\1"),
        (r"rpn_head\.rpn_cls\.(.+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
        (r"rpn_head\.rpn_reg\.(.+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        (
            r"bbox_head\.shared_fcs\.(\d)\.(.+)",
            lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}",
        ),
        (r"bbox_head\.fc_cls\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
        (r"bbox_head\.fc_reg\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
        (
            r"mask_head\.convs\.(\d)\.conv\.(.+)",
            lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}",
        ),
        (r"mask_head\.upsample\.(.+)", r"roi_heads.mask_head.deconv.\1"),
        (r"mask_head\.conv_logits\.(.+)", r"roi_heads.mask_head.predictor.\1"),
    ]
    one_stage: list[tuple[str, _Name]] = [
        # a ReLU follows each convolution in Detectron2's list
        (
            r"bbox_head\.cls_convs\.(\d)\.conv\.(.+)",
            lambda m: f"head.cls_subnet.{2 * int(m[1])}.{m[2]}",
        ),
        (
            r"bbox_head\.reg_convs\.(\d)\.conv\.(.+)",
            lambda m: f"head.bbox_subnet.{2 * int(m[1])}.{m[2]}",
        ),
        (r"bbox_head\.retina_cls\.(.+)", r"head.cls_score.\1"),
        (r"bbox_head\.retina_reg\.(.+)", r"head.bbox_pred.\1"),
    ]
    rules = shared + (one_stage if dense else two_stage)
    return [(re.compile(pattern), name) for pattern, name in rules]


def _block(stage: str, number: str, layer: str, norm: bool, rest: str) -> str:
    place = f"{layer}.norm" if norm else layer
    return f"backbone.bottom_up.res{int(stage) + 1}.{number}.{place}.{rest}"


def _renamed(name: str, rules: Sequence[_Rule]) -> str | None:
    for pattern, new in rules:
        if match := pattern.fullmatch(name):
            return match.expand(new) if isinstance(new, str) else new(match)
    return None


def _depth(state: State, prefix: str, stages: Sequence[int]) -> int:
    """Depth of a ResNet by its blocks.

    Raises:
        ValueError: there is no ResNet of these blocks.
    """
    counts = []
    for stage in stages:
        pattern = re.compile(rf"{re.escape(prefix.format(stage))}(\d+)\.conv3\.weight")
        counts.append(sum(bool(pattern.fullmatch(name)) for name in state))
    if tuple(counts) not in _DEPTHS:
        known = ", ".join(f"ResNet-{depth}" for depth in _DEPTHS.values())
        raise ValueError(f"the backbone has {counts} blocks; it must be one of {known}")
    return _DEPTHS[tuple(counts)]


def _backbone_settings(state: State, style: str) -> list[Any]:
    """Keys of the backbone and of what it takes for an image."""
    convolution = state.get("backbone.layer1.0.conv2.weight")
    if convolution is None:
        raise ValueError("backbone.layer1.0.conv2.weight is missing; the backbone must be a ResNet")
    per_group = convolution.shape[1]
    keys: dict[str, Any] = {
        "MODEL.RESNETS.DEPTH": _depth(state, "backbone.layer{}.", range(1, 5)),
        "MODEL.RESNETS.NUM_GROUPS": convolution.shape[0] // per_group,
        "MODEL.RESNETS.WIDTH_PER_GROUP": per_group,
    }
    if style == "pytorch":
        keys |= {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }
    return [part for pair in keys.items() for part in pair]


def _reorder_anchors(model: State) -> int:
    """Put the anchors of a RetinaNet head in Detectron2's order; return the number of classes."""
    anchors = _SIZES * _RATIOS
    for name in ("cls_score", "bbox_pred"):
        for part in ("weight", "bias"):
            value = model[f"head.{name}.{part}"]
            if len(value) % anchors:
                raise ValueError(f"retina head: {len(value)} outputs are not those of 9 anchors")
            split = value.reshape(_RATIOS, _SIZES, -1, *value.shape[1:])
            model[f"head.{name}.{part}"] = split.transpose(0, 1).reshape(value.shape)
    return len(model["head.cls_score.bias"]) // anchors


def _background_last(model: State) -> None:
    """Move background from the first to the last output, and drop its boxes and masks."""
    for part in ("weight", "bias"):
        key = f"roi_heads.box_predictor.cls_score.{part}"
        model[key] = model[key].roll(-1, dims=0)
        key = f"roi_heads.box_predictor.bbox_pred.{part}"
        if len(model[key]) > 4:
            model[key] = model[key][4:]
        key = f"roi_heads.mask_head.predictor.{part}"
        if key in model and len(model[key]) > 1:
            model[key] = model[key][1:]


def _softmax_classes(model: State) -> int:
    """Number of classes of a softmax head.

    Raises:
        ValueError: the classifier has other outputs than one for each class and background.
    """
    outputs = len(model["roi_heads.box_predictor.cls_score.bias"])
    boxes = len(model["roi_heads.box_predictor.bbox_pred.bias"]) // 4
    if outputs != boxes + 1:
        raise ValueError(
            f"fc_cls has {outputs} outputs and fc_reg boxes for {boxes} classes; the classifier "
            "must be a softmax over classes and background (sigmoid, Seesaw and class-agnostic "
            "heads of mmdet are not converted)"
        )
    return boxes


def _classes(
    names: Sequence[str] | None,
    meta: dict[str, Any],
    counts: ClassCounts | None,
    num_classes: int,
    path: str,
) -> ModelClasses:
    """Names that were given, else those of the counts or the checkpoint."""
    if names is None and counts is not None:
        names = counts.class_names
    if names is None:
        dataset = meta.get("dataset_meta") or {}
        names = meta.get("CLASSES") or dataset.get("CLASSES") or dataset.get("classes")
    if names is None or len(names) != num_classes:
        known = f"{len(names)} class names are known" if names else "it holds no class names"
        raise ValueError(
            f"{path} has {num_classes} classes and {known}; give them in the order of training "
            "(--names FILE)"
        )
    if counts is not None and counts.num_classes != num_classes:
        raise ValueError(f"--counts is for {counts.num_classes} classes; {path} has {num_classes}")
    return ModelClasses(
        tuple(map(str, names)),
        tuple(range(1, num_classes + 1)),
        None if counts is None else tuple(counts.image_count.tolist()),
        None if counts is None else tuple(counts.instance_count.tolist()),
        None if counts is None else counts.num_images,
    )


def _write(cfg: CfgNode, model: State, classes: ModelClasses, output: str) -> None:
    """Write the three files of a run's directory."""
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    config = cfg.dump()
    content = {"model": model, "config": config, CHECKPOINT_KEY: classes.as_dict()}
    path = os.path.join(output, "config.yaml")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(config)
    classes.save(os.path.join(output, FILE))
    with atomic_path(os.path.join(output, "model_final.pth")) as temporary:
        torch.save(content, temporary)
