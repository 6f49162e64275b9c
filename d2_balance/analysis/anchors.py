"""What the anchors of a configuration make of a data set: foreground by level, and objects that no
anchor reaches.

An object is reached when an anchor has the IoU with it from which anchors are positive (0.5 in
RetinaNet, 0.7 in the RPN). An object that is not reached still gets the anchors of its highest IoU
where the model allows low-quality matches, but these few fit badly: the class trains little and
loses at high IoU. It looks like an effect of rarity, and is none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from tqdm import tqdm

from ..data.prior import ROI_HEADS, PartCount, training_size
from ..data.row_counts import AnchorCounter, row_counters
from .table import DataTable

SCALES = (0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0)
WORTH = 0.05  # a class must gain so many of its objects before other sizes are suggested


@dataclass(frozen=True)
class Level:
    """Anchors of one feature map, summed over the pictures that were looked at.

    Attributes:
        name: of the feature map.
        positives: anchors with an object.
        rows: anchors that are not ignored.
    """

    name: str
    positives: int
    rows: int


@dataclass(frozen=True, eq=False)
class AnchorReport:
    """Anchors of one part of a model.

    Attributes:
        part: "RetinaNet", "FCOS" or "RPN".
        levels: one per feature map; one for all where levels cannot be told apart (FCOS).
        prior: counts and pi* of the part; None where no anchor is positive.
        pictures: number of pictures that were looked at.
        threshold: IoU from which an anchor is positive; None without anchors (FCOS).
        low_quality: whether an object that is not reached gets its best anchors all the same.
        sizes: MODEL.ANCHOR_GENERATOR.SIZES.
        objects: (K,) objects that were looked at.
        reached: (K,) of them, those that an anchor reaches.
        suggested: sizes that reach more, or None.
        suggested_reached: (K,) objects that these reach.
        edge: shorter side of the pictures in training, in pixels.
    """

    part: str
    levels: list[Level]
    prior: PartCount | None
    pictures: int
    threshold: float | None
    low_quality: bool
    sizes: list[list[float]]
    objects: np.ndarray
    reached: np.ndarray | None
    suggested: list[list[float]] | None
    suggested_reached: np.ndarray | None
    edge: int

    def missed(self, reached: np.ndarray | None = None) -> np.ndarray:
        """(K,) share of the objects of each class that is not reached; NaN without objects."""
        reached = self.reached if reached is None else reached
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - reached / self.objects


def anchor_report(
    cfg: CfgNode, table: DataTable, max_images: int = 300, seed: int = 0
) -> AnchorReport:
    """Look at the anchors of a configuration on the pictures of a data set.

    Args:
        cfg: full config; its number of classes is set to that of the data.
        table: the data set.
        max_images: of more pictures a sample is taken, one that shows every class.
        seed: of the sample.

    Raises:
        ValueError: the model has neither anchors nor anchor points.
    """
    counters = row_counters(cfg)
    part, counter = next((n, c) for n, c in counters.items() if n != ROI_HEADS)
    chosen = sample_images(table, max_images, seed)
    inputs = [training_size(cfg, *_objects(table, n)) for n in chosen]
    labels = [table.label[(table.image == n) & ~table.crowd] for n in chosen]
    objects = np.bincount(
        np.concatenate([*labels, np.zeros(0, np.int64)]), minlength=table.num_classes
    )
    levels, reached = _look(counter, inputs, labels, table.num_classes)
    rows, positives = sum(level.rows for level in levels), sum(level.positives for level in levels)
    outputs = 1 if part == "RPN" else table.num_classes
    prior = PartCount(positives, rows, outputs) if 0 < positives < rows else None
    sizes = [list(map(float, level)) for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    has_anchors = isinstance(counter, AnchorCounter)
    better = _better_sizes(cfg, part, inputs, labels, objects, reached) if has_anchors else None
    return AnchorReport(
        part=part,
        levels=levels,
        prior=prior,
        pictures=len(chosen),
        threshold=counter.threshold if has_anchors else None,
        low_quality=has_anchors and counter.low_quality,
        sizes=sizes,
        objects=objects,
        reached=reached if has_anchors else None,
        suggested=None if better is None else better[0],
        suggested_reached=None if better is None else better[1],
        edge=min((min(size) for size, _ in inputs), default=0),
    )


def sample_images(table: DataTable, count: int, seed: int) -> np.ndarray:
    """Indices of up to `count` images with objects: one of each class first, then at random."""
    rng = np.random.default_rng(seed)
    image, label = table.image[~table.crowd], table.label[~table.crowd]
    known = np.unique(image)
    if len(known) <= count:
        return known
    order = rng.permutation(len(image))
    _, first = np.unique(label[order], return_index=True)
    needed = np.unique(image[order][first])[:count]
    rest = rng.permutation(np.setdiff1d(known, needed))
    return np.sort(np.concatenate([needed, rest[: count - len(needed)]]))


def _objects(table: DataTable, image: int) -> tuple[tuple[int, int], np.ndarray]:
    """Size of a picture and its boxes x0 y0 x1 y1 to train on."""
    boxes = table.boxes[(table.image == image) & ~table.crowd].copy()
    boxes[:, 2:] += boxes[:, :2]
    return tuple(table.sizes[image].tolist()), boxes


def _look(counter: Any, inputs: list, labels: list, classes: int) -> tuple[list[Level], np.ndarray]:
    """Levels, and reached objects by class."""
    totals: dict[str, list[int]] = {}
    reached = np.zeros(classes, dtype=np.int64)
    for (size, boxes), own in tqdm(
        list(zip(inputs, labels, strict=True)), "looking at anchors", delay=2, disable=None
    ):
        if isinstance(counter, AnchorCounter):
            for name, positives, rows in counter.by_level(size, boxes):
                total = totals.setdefault(name, [0, 0])
                total[0] += positives
                total[1] += rows
            found = counter.best_iou(size, boxes) >= counter.threshold
            reached += np.bincount(own[found.numpy()], minlength=classes)
        else:
            total = totals.setdefault("all", [0, 0])
            for n, value in enumerate(counter(size, boxes)):
                total[n] += value
    return [Level(name, *total) for name, total in totals.items()], reached


def _better_sizes(
    cfg: CfgNode, part: str, inputs: list, labels: list, objects: np.ndarray, reached: np.ndarray
) -> tuple[list[list[float]], np.ndarray] | None:
    """Sizes times the factor of `SCALES` under which the worst class is reached best.

    Of factors that leave the worst class within `WORTH` of the best, the one next to 1 is taken.
    """
    present = objects > 0
    if not present.any():
        return None
    found = {1.0: reached}
    for scale in SCALES:
        if scale not in found:
            scaled = _scaled(cfg, scale)
            counter = row_counters(scaled)[part]
            total = np.zeros_like(reached)
            for (size, boxes), own in zip(inputs, labels, strict=True):
                hit = (counter.best_iou(size, boxes) >= counter.threshold).numpy()
                total += np.bincount(own[hit], minlength=len(reached))
            found[scale] = total
    worst = {s: float((hits[present] / objects[present]).min()) for s, hits in found.items()}
    best = max(worst.values())
    near = [s for s in worst if worst[s] >= best - WORTH]
    scale = min(near, key=lambda s: abs(np.log(s)))
    if scale == 1.0 or worst[scale] - worst[1.0] < WORTH:
        return None
    return [list(level) for level in _scaled(cfg, scale).MODEL.ANCHOR_GENERATOR.SIZES], found[scale]


def _scaled(cfg: CfgNode, scale: float) -> CfgNode:
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [round(float(size) * scale, 1) for size in level]
        for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    return cfg
