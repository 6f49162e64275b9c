"""Ground truth and detections on their images, drawn by Detectron2's Visualizer.

Objects have the colour of their class's frequency group, or of their class if there is one group.
Images come by their rarest class.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from d2_balance.data import category_names, register_json
from d2_balance.data.annotations import Annotations
from d2_balance.data.catalog.register import load_dataset
from d2_balance.data.checks.images import check_image_sizes
from d2_balance.data.columns import IMAGE_LABEL_KEYS
from d2_balance.data.groups import GROUPS, groups_from_counts
from d2_balance.data.records import objects_of
from d2_balance.data.resolve import load_annotations, locate
from d2_balance.data.unreadable import UNREADABLE
from d2_balance.utils.names import closest
from d2_balance.utils.plotting import COLOURS, GROUP_COLOURS, new_figure, save_figure
from d2_balance.utils.progress import progress

from .predictions import DetectionTexts, Predictions, read_predictions

# Pixels that the longer side of a panel has at least, so that labels stay readable on small
# images, and at most, so that a satellite image does not fill the memory.
_WIDTH, _LONGEST = 800, 4000
_NARROWEST = 4.0  # inches of a panel
_DPI = 100
logger = logging.getLogger(__name__)
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

    def colour(self, k: int) -> str:
        """Return the colour of a class: that of its group, or its own if there is one group."""
        if len(set(self.groups)) > 1:
            return GROUP_COLOURS[self.groups[k]]
        return COLOURS[k % len(COLOURS)]


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
            following = next((p for p in queue if p not in chosen), None)
            if following is not None and len(chosen) < limit:
                chosen[following] = None
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
    drawn = [(title, overlay(image, items)) for title, items in panels]
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
        "colour": classes.colour(k),
    }


def _detection(detection: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    k = classes.index[detection["category_id"]]
    box = detection.get("bbox")
    return {
        "box": box and BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
        "mask": detection.get("segmentation"),
        "label": f"{classes.names[k]} {detection['score']:.0%}",
        "colour": classes.colour(k),
    }


def overlay(image: np.ndarray, items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(H, W, 3) the image with its items, enlarged where it is small, reduced where it is huge."""
    longest = max(image.shape[:2])
    scale = max(1.0, _WIDTH / longest) if longest < _LONGEST else _LONGEST / longest
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
    size = (len(drawn) * max(width / _DPI, _NARROWEST) + 0.2, height / _DPI + extra)
    figure = new_figure(*size, dpi=_DPI)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, image) in zip(panels, drawn, strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=11, loc="left")
        axes.axis("off")
    name = os.path.basename(record["file_name"])
    figure.suptitle(f"{name} (image {record.get('image_id')})", fontsize=12, x=0.01, ha="left")
    present = [letter for letter in GROUPS if letter in classes.groups]
    if len(present) > 1:  # otherwise colours are those of classes, and names stand at the boxes
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


def draw_dataset(
    dataset: str,
    output: str,
    *,
    images: str | None = None,
    predictions: str | None = None,
    count: int = 20,
    class_names: Sequence[str] | None = None,
    min_score: float = 0.3,
    train: str | None = None,
) -> list[str]:
    """Draw images of a dataset as PNG files, those of the rarest classes first.

    Args:
        dataset: name of a registered dataset, or an annotation file.
        output: directory of the files.
        images: directory of the images; needed with an annotation file, and only there.
        predictions: prediction file to draw beside the objects.
        count: images to draw.
        class_names: draw only images that show one of these classes.
        min_score: detections below it are not drawn; in [0, 1].
        train: dataset whose images per class say what is rare; None: what `dataset` says, or
            its own counts.

    Returns:
        Paths of the PNG files.

    Raises:
        ValueError: a dataset, a class, a number or a file that cannot be used.
        FileExistsError: a file of that name is there already.
    """
    if count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    if not 0 <= min_score <= 1:
        raise ValueError(f"--min-score is {min_score}; it must be in [0, 1]")
    name, dataset_dicts = _load(dataset, images)
    classes = _classes(name, dataset_dicts, train)
    wanted = _of_classes(dataset_dicts, classes, class_names)
    chosen = rarest_first(wanted, classes.image_count, count)
    paths = [_path(output, n, record) for n, record in enumerate(chosen, start=1)]
    for path in paths:
        if os.path.exists(path):
            raise FileExistsError(
                f"{path} exists, and show replaces no file; give another --output"
            )
    check_image_sizes(chosen, dataset)
    found = None
    if predictions:
        truth = load_annotations(dataset, "dataset")
        found = _by_image(read_predictions(predictions, truth), truth)
    drawn, unreadable = [], []
    for path, record in zip(progress(paths, "drawing"), chosen, strict=True):
        detections = None if found is None else found.get(record["image_id"], [])
        try:
            figure = draw(record, classes, detections, min_score)
        except UNREADABLE as error:
            unreadable.append(f"{record['file_name']} ({type(error).__name__}: {error})")
            continue
        save_figure(figure, path)
        drawn.append(path)
    if unreadable:
        text = f"{len(unreadable)} of {len(chosen)} images cannot be read and are not drawn: "
        text += ", ".join(unreadable)
        if not drawn:
            raise ValueError(
                f"{dataset}: {text}; download them again, or cut large ones into tiles"
            )
        logger.warning(f"{dataset}: {text}")
    return drawn


def _by_image(
    predictions: Predictions, truth: Annotations
) -> dict[int | str, list[dict[str, Any]]]:
    """Detections as the dicts of their file, by image id."""
    found: dict[int | str, list[dict[str, Any]]] = {}
    if len(predictions):
        ids = truth.image_id.tolist()
        with DetectionTexts(predictions) as texts:
            for row, image in enumerate(predictions.image.tolist()):
                found.setdefault(ids[image], []).append(json.loads(texts.text(row)))
    return found


def _load(source: str, images: str | None) -> tuple[str, Sequence[dict[str, Any]]]:
    """Name in the catalogs and records of a registered dataset, or of a file."""
    if source not in DatasetCatalog:
        locate(source, "dataset")
    if os.path.isfile(source):
        if not images:
            raise ValueError(f"{source}: --images must name the directory of its images")
        register_json(source, source, images, "--images")
    elif images:
        raise ValueError(f"--images is for annotation files; {source!r} is registered with its own")
    dataset_dicts = load_dataset(source)
    if not isinstance(dataset_dicts, Sequence) or not dataset_dicts:
        raise ValueError(f"{source!r} has no images to draw")
    return source, dataset_dicts


def _classes(name: str, dataset_dicts: Sequence[dict[str, Any]], train: str | None) -> Classes:
    """Names, counts and groups; counts of --train, else the file's, else of the set itself."""
    by_id = category_names(name)
    index = {raw: k for k, raw in enumerate(by_id)}
    metadata = MetadataCatalog.get(name)
    groups = metadata.get("class_group")
    if train:
        given = load_annotations(train, "--train").image_count()
        counts, groups = [given.get(class_name, 0) for class_name in by_id.values()], None
    elif metadata.get("class_image_count"):
        known = {c["id"]: c["image_count"] for c in metadata.class_image_count}
        counts = [known.get(raw, 0) for raw in by_id]
    else:
        counts = objects_of(dataset_dicts).counts(len(by_id)).image_count.tolist()
    return Classes(list(by_id.values()), counts, groups or groups_from_counts(counts), index)


def _of_classes(
    dataset_dicts: Sequence[dict[str, Any]], classes: Classes, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Records that show one of the classes; all where none is named."""
    if not names:
        return list(dataset_dicts)
    unknown = [n for n in names if n not in classes.names]
    if unknown:
        hint = closest(unknown[0], classes.names)
        raise ValueError(f"--classes: the dataset has no class {unknown[0]!r}; {hint}")
    wanted = {list(classes.names).index(n) for n in names}
    found = [
        record
        for record in dataset_dicts
        if any(a["category_id"] in wanted for a in record.get("annotations", ()))
    ]
    if not found:
        raise ValueError(f"--classes: no image shows {', '.join(names)}; name other classes")
    return found


def _path(directory: str, number: int, record: Mapping[str, Any]) -> str:
    stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
    return os.path.join(directory, f"{number:03d}_{stem}.png")
