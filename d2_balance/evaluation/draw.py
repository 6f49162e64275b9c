"""Ground truth and detections on their images, drawn by Detectron2's Visualizer.

Objects have the colour of their class's frequency group. Images come by their rarest class.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from d2_balance.data.checks.structure import IMAGE_LABEL_KEYS
from d2_balance.data.groups import GROUPS

from .plots import GROUP_COLOURS

_WIDTH = 800  # pixels that a panel has at least, so that labels stay readable on small images
_DPI = 100
_NAMES = 12  # image-level labels written out below an image
_LABELS = dict(
    zip(IMAGE_LABEL_KEYS, ("verified absent", "present, not marked completely"), strict=True)
)


@dataclass(frozen=True)
class Classes:
    """What is known of the classes, by class index.

    Attributes:
        names: K names.
        image_count: K numbers of images that show the class.
        groups: K letters "r", "c", "f".
        index: category id of the file to class index.
    """

    names: Sequence[str]
    image_count: Sequence[int]
    groups: Sequence[str]
    index: Mapping[int, int]


def image_counts(dataset_dicts: Sequence[Mapping[str, Any]], num_classes: int) -> list[int]:
    """Images that show each class; crowds do not count."""
    counts = Counter(k for record in dataset_dicts for k in _shown(record))
    return [counts[k] for k in range(num_classes)]


def rarest_first(
    dataset_dicts: Sequence[Mapping[str, Any]], image_count: Sequence[int], limit: int
) -> list[Mapping[str, Any]]:
    """Images, one for each class in turn, the rarest class first, then a second one, and so on.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        image_count: K counts that say how rare a class is.
        limit: how many; images without object come last.
    """
    by_class: dict[int, list[int]] = {}
    for position, record in enumerate(dataset_dicts):
        for k in _shown(record):
            by_class.setdefault(k, []).append(position)
    order = sorted(by_class, key=lambda k: (image_count[k], k))
    queues = [iter(by_class[k]) for k in order]
    chosen: dict[int, None] = {}  # keeps the order
    while queues and len(chosen) < limit:
        still = []
        for queue in queues:
            position = next((p for p in queue if p not in chosen), None)
            if position is not None and len(chosen) < limit:
                chosen[position] = None
                still.append(queue)
        queues = still
    rest = (p for p in range(len(dataset_dicts)) if p not in chosen)
    places = [*chosen, *(p for p, _ in zip(rest, range(limit - len(chosen)), strict=False))]
    return [dataset_dicts[p] for p in places]


def _shown(record: Mapping[str, Any]) -> set[int]:
    return {a["category_id"] for a in record.get("annotations", ()) if not a.get("iscrowd", 0)}


def draw(
    record: Mapping[str, Any],
    classes: Classes,
    detections: Sequence[Mapping[str, Any]] | None = None,
    min_score: float = 0.3,
) -> Figure:
    """One image: its objects, and beside it the detections where there are any to draw.

    Args:
        record: Detectron2's standard dict.
        classes: of the dataset.
        detections: COCO results of this image (`category_id` of the file, `bbox` in XYWH,
            `segmentation` as RLE), or None for the ground truth alone.
        min_score: detections below it are not drawn.
    """
    image = read_image(record["file_name"], format="RGB")
    objects = [_object(a, classes) for a in record.get("annotations", ())]
    panels = [(f"ground truth: {_number(objects, 'object')}", objects)]
    if detections is not None:
        strong = [d for d in detections if d["score"] >= min_score]
        found = [_detection(d, classes) for d in sorted(strong, key=lambda d: d["score"])]
        text = f"{_number(found, 'detection')} of score {min_score:g} and more"
        panels.append((f"{text} ({len(detections) - len(strong)} below)", found))
    drawn = [(title, _overlay(image, items)) for title, items in panels]
    return _compose(record, drawn, classes)


def _number(items: Sequence, word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _object(annotation: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    k = annotation["category_id"]
    crowd = " (crowd)" if annotation.get("iscrowd", 0) else ""
    return {
        "box": BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS),
        "mask": annotation.get("segmentation"),
        "label": f"{classes.names[k]}{crowd}",
        "colour": GROUP_COLOURS[classes.groups[k]],
    }


def _detection(detection: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    k = classes.index[detection["category_id"]]
    box = detection.get("bbox")
    return {
        "box": box and BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
        "mask": detection.get("segmentation"),
        "label": f"{classes.names[k]} {detection['score']:.0%}",
        "colour": GROUP_COLOURS[classes.groups[k]],
    }


def _overlay(image: np.ndarray, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(H, W, 3) the image with its items, enlarged where it is small."""
    scale = max(1.0, _WIDTH / image.shape[1])
    visualizer = Visualizer(image, scale=scale)
    if items:
        # masks and boxes are for all objects or for none
        masks = [item["mask"] for item in items]
        boxes = [item["box"] for item in items]
        visualizer.overlay_instances(
            boxes=np.array(boxes, dtype=np.float64) if all(b is not None for b in boxes) else None,
            masks=masks if all(m is not None for m in masks) else None,
            labels=[item["label"] for item in items],
            assigned_colors=[item["colour"] for item in items],
            alpha=0.35,
        )
    return visualizer.get_output().get_image()


def _compose(
    record: Mapping[str, Any], drawn: Sequence[tuple[str, np.ndarray]], classes: Classes
) -> Figure:
    """Panels side by side, with the image's name above and image-level labels below."""
    height, width = drawn[0][1].shape[:2]
    notes = _notes(record, classes)
    extra = 0.75 + 0.22 * len(notes)  # inches for the text
    size = (len(drawn) * width / _DPI + 0.2, height / _DPI + extra)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, image) in zip(panels, drawn, strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=11, loc="left")
        axes.axis("off")
    name = os.path.basename(record["file_name"])
    figure.suptitle(f"{name} (image {record.get('image_id')})", fontsize=12, x=0.01, ha="left")
    present = [letter for letter in GROUPS if letter in classes.groups]
    patches = [Patch(color=GROUP_COLOURS[g], label=GROUPS[g]) for g in present]
    figure.legend(
        handles=patches, loc="upper right", ncols=len(patches), fontsize=10, frameon=False
    )
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=10, x=0.01, ha="left", color="#333333")
    return figure


def _notes(record: Mapping[str, Any], classes: Classes) -> list[str]:
    """Image-level labels in words."""
    notes = []
    for key, words in _LABELS.items():
        names = [classes.names[classes.index[c]] for c in record.get(key) or ()]
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        if names:
            notes.append(f"{words}: {', '.join(names[:_NAMES])}{more}")
    return notes
