"""What anchors make of a dataset: foreground by level, and objects without a matching anchor.

An object is matched if an anchor has the IoU with it from which anchors are positive; in the RPN,
whose 0.7 few objects have, the IoU from which a proposal is foreground for the RoI heads. An object
that is unmatched still gets the anchors of its highest IoU where the model allows low-quality
matches, but these few fit badly: the class trains little and loses at high IoU. It looks like an
effect of rarity, and is none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from d2_balance.data.priors.foreground import PartCount, training_size
from d2_balance.data.priors.sample_counts import (
    ROI_HEADS,
    RPN,
    AnchorCounter,
    PointCounter,
    sample_counters,
)
from d2_balance.utils.config_tree import changed
from d2_balance.utils.progress import progress

from .images import sample_images
from .table import DataTable

SCALES = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0, 2.828)
WORTH = 0.1  # the worst class must gain so many of its objects before other sizes are suggested
LOSS = 0.02  # and no class may lose more than that
FEW = 20  # classes with fewer objects count together: a single object says nothing of the sizes

# height and width in training, boxes (M, 4) x0 y0 x1 y1 there, labels (M,)
ResizedImage = tuple[tuple[int, int], Tensor, np.ndarray]


@dataclass(frozen=True)
class Level:
    """Anchors of one feature map, summed over the counted images.

    Attributes:
        name: of the feature map.
        positives: anchors with an object.
        samples: anchors that are not ignored.
    """

    name: str
    positives: int
    samples: int


@dataclass(frozen=True, eq=False)
class AnchorReport:
    """Anchors (or anchor points) of one part of a model.

    Attributes:
        part: "RetinaNet", "FCOS" or "RPN".
        levels: one per feature map.
        prior: counts and pi* of the part; None where no anchor is positive.
        images: number of counted images.
        edge: shorter sides of these images in training, the smallest and the largest, in pixels.
        objects: (K,) counted objects.
        threshold: IoU from which an object is reached; None without anchors (FCOS).
        low_quality: whether an unmatched object gets its best anchors all the same.
        sizes: MODEL.ANCHOR_GENERATOR.SIZES, by level.
        reached: (K,) of the objects, those that an anchor reaches; None without anchors.
        suggested: sizes that reach more, or None.
        suggested_reached: (K,) objects that these reach.
    """

    part: str
    levels: list[Level]
    prior: PartCount | None
    images: int
    edge: tuple[int, int]
    objects: np.ndarray
    threshold: float | None = None
    low_quality: bool = False
    sizes: list[list[float]] | None = None
    reached: np.ndarray | None = None
    suggested: list[list[float]] | None = None
    suggested_reached: np.ndarray | None = None

    def missed(self, suggested: bool = False) -> np.ndarray:
        """Return the (K,) fraction of unmatched objects of each class; NaN without objects.

        Args:
            suggested: True: with the suggested sizes.
        """
        reached = self.suggested_reached if suggested else self.reached
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - reached / self.objects


def anchor_report(
    cfg: CfgNode, table: DataTable, max_images: int = 300, seed: int = 0
) -> AnchorReport:
    """Look at the anchors of a configuration on the images of a dataset.

    Args:
        cfg: full config.
        table: the dataset, with an object to train on.
        max_images: of more images a sample is taken, one that shows every class.
        seed: of the sample.

    Raises:
        ValueError: the model has neither anchors nor anchor points.
    """
    counters = sample_counters(cfg)
    part = next((name for name in counters if name != ROI_HEADS), None)
    if part is None:
        raise ValueError(
            f"MODEL.PROPOSAL_GENERATOR.NAME {cfg.MODEL.PROPOSAL_GENERATOR.NAME} has no anchors; "
            "must be RPN or BalancedRPN"
        )
    counter = cast(AnchorCounter | PointCounter, counters[part])  # all parts but ROI_HEADS
    images = images_in_training(cfg, table, sample_images(table, max_images, seed))
    levels = [[0, 0] for _ in counter.levels]
    for size, boxes, _ in progress(images, "labelling anchors"):
        for total, counts in zip(levels, counter.by_level(size, boxes), strict=True):
            total[0] += counts[0]
            total[1] += counts[1]
    positives, samples = map(sum, zip(*levels, strict=True))
    outputs = 1 if part == RPN else table.num_classes
    edges = [min(size) for size, _, _ in images]
    labels = np.concatenate([own for _, _, own in images])
    report = AnchorReport(
        part=part,
        levels=[Level(n, *t) for n, t in zip(counter.levels, levels, strict=True)],
        prior=PartCount(positives, samples, outputs) if 0 < positives < samples else None,
        images=len(images),
        edge=(min(edges), max(edges)),
        objects=np.bincount(labels, minlength=table.num_classes),
    )
    if not isinstance(counter, AnchorCounter):
        return report
    threshold = counter.threshold
    if part == RPN:
        threshold = min(threshold, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1])
    reached = _reached_by_change(cfg, counter, threshold, images, table.num_classes)
    change = _best_change(reached, report.objects)
    return replace(
        report,
        threshold=threshold,
        low_quality=counter.low_quality,
        sizes=_sizes(cfg),
        reached=reached[1.0, 1.0],
        suggested=None if change is None else _sizes(_changed(cfg, change)),
        suggested_reached=None if change is None else reached[change],
    )


def images_in_training(cfg: CfgNode, table: DataTable, images: np.ndarray) -> list[ResizedImage]:
    """Sizes, boxes and labels of some images as training resizes them; crowds left out."""
    order = np.argsort(table.image, kind="stable")
    order = order[~table.crowd[order]]
    starts = np.searchsorted(table.image[order], images, "left")
    ends = np.searchsorted(table.image[order], images, "right")
    resized = []
    for image, start, end in zip(images, starts, ends, strict=True):
        own = order[start:end]
        boxes = torch.from_numpy(table.boxes[own]).float()
        boxes[:, 2:] += boxes[:, :2]
        size, boxes = training_size(cfg, tuple(table.sizes[image].tolist()), boxes)
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(dim=1)  # as Detectron2's mapper
        resized.append((size, boxes[kept], table.label[own][kept.numpy()]))
    return resized


def _reached_by_change(
    cfg: CfgNode, counter: AnchorCounter, threshold: float, images: list[ResizedImage], classes: int
) -> dict[tuple[float, float], np.ndarray]:
    """(K,) objects that are reached, by the factors of the first and the last level's sizes."""
    by_size: dict[tuple[int, int], list[ResizedImage]] = {}
    for image in images:
        by_size.setdefault(image[0], []).append(image)
    joined = [
        (size, torch.cat([boxes for _, boxes, _ in same]), np.concatenate([n for *_, n in same]))
        for size, same in by_size.items()
    ]
    changes = dict.fromkeys([(1.0, 1.0), *((s, e) for s in SCALES for e in (s, 1.0))])
    found = {}
    for change in progress(changes, "trying anchor sizes", unit="sizes"):
        changed = counter.with_anchors(_changed(cfg, change))
        found[change] = np.zeros(classes, dtype=np.int64)
        for size, boxes, labels in joined:
            hit = (changed.best_iou(size, boxes) >= threshold).numpy()
            found[change] += np.bincount(labels[hit], minlength=classes)
    return found


def _best_change(
    reached: dict[tuple[float, float], np.ndarray], objects: np.ndarray
) -> tuple[float, float] | None:
    """The change under which the worst class is reached best; None: the sizes stay.

    Of changes that leave the worst class within `LOSS` of the best, the one is taken that reaches
    most objects, and of equal ones the smallest. Sizes of all levels change alike where that does.
    """
    large = objects >= FEW
    groups = [np.array([k]) for k in np.flatnonzero(large)]
    if objects[~large].sum() >= FEW:
        groups.append(np.flatnonzero(~large))
    if not groups:
        return None
    matched = {
        c: np.array([r[g].sum() / objects[g].sum() for g in groups]) for c, r in reached.items()
    }
    stock = matched[1.0, 1.0]
    allowed = {c: s for c, s in matched.items() if (s >= stock - LOSS).all()}
    best = max(s.min() for s in allowed.values())
    if best - stock.min() < WORTH:
        return None
    near = [c for c, s in allowed.items() if s.min() >= best - LOSS]
    return max(
        near,
        key=lambda c: (
            round(reached[c].sum() / objects.sum() / LOSS),
            c[0] == c[1],
            -abs(np.log(c[0])),
        ),
    )


def _changed(cfg: CfgNode, change: tuple[float, float]) -> CfgNode:
    """The config with the first level's sizes times the first factor, the last's times the last.

    The factors of the levels between go from the one to the other in equal ratios.
    """
    sizes = [list(map(float, level)) for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    factors = np.geomspace(*change, len(sizes)) if len(sizes) > 1 else np.array(change[:1])
    if change != (1.0, 1.0):
        sizes = [
            [round(size * factor, 1) for size in level]
            for level, factor in zip(sizes, factors.tolist(), strict=True)
        ]
    return changed(cfg, {"MODEL.ANCHOR_GENERATOR.SIZES": sizes})


def _sizes(cfg: CfgNode) -> list[list[float]]:
    return [list(map(float, level)) for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
