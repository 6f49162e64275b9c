"""How rare foreground is: the counts behind the optimal prior and the thresholds per class.

With N_f positive of N samples and C outputs per sample, a classifier that says pi everywhere loses

    L(pi) = -log pi - (N C / N_f - 1) log(1 - pi)        per positive sample,

least at pi* = N_f / (N C), which is the sigmoid of b = -log(N C / N_f - 1). Test-time thresholds:
theta_j = (N_f / N) N_j / sum_k N_k with N_j objects of class j.

Source: Chen et al., Is Heuristic Sampling Necessary in Training Deep Object Detectors?,
arXiv:1909.04868, equations 1 to 3 and 7.

Samples are labelled as the model labels them in training, from sizes and boxes alone: no image is
read, and no network runs. Every image is resized to the middle one of the training sizes and
padded by itself; crops and flips are left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import msgspec
import torch
from detectron2.config import CfgNode
from torch import Tensor

from d2_balance.utils.files import Count, check_new, convert, read_json, write_json
from d2_balance.utils.progress import progress

from ..class_counts import ClassCounts
from ..training_set import training_records
from .sample_counts import PARTS, RPN, sample_counters


@dataclass(frozen=True)
class PartCount:
    """Samples of one part of a model, summed over the counted images.

    Attributes:
        positives: N_f, samples with an object; above 0 and below `samples`.
        samples: N, samples that are not ignored.
        outputs: C, sigmoid outputs per sample, at least 1.
    """

    positives: int
    samples: int
    outputs: int

    def __post_init__(self) -> None:
        if not 0 < self.positives < self.samples or self.outputs < 1:
            raise ValueError(
                f"{self.positives} positives in {self.samples} samples of {self.outputs} outputs "
                "have no prior; must be a positive, more samples than positives, and an output"
            )

    @property
    def foreground(self) -> float:
        """N_f / N, in (0, 1)."""
        return self.positives / self.samples

    @property
    def prior(self) -> float:
        """pi*, in (0, 1)."""
        return self.foreground / self.outputs

    @property
    def bias(self) -> float:
        """b, whose sigmoid is pi*."""
        return -math.log(1 / self.prior - 1)

    @property
    def background_bias(self) -> float:
        """Bias of background in a softmax whose C classes have bias 0: log(C (N - N_f) / N_f)."""
        return math.log(self.outputs * (self.samples - self.positives) / self.positives)

    def loss(self, prior: float) -> float:
        """L(pi): sigmoid cross-entropy per positive where every score is `prior`, in (0, 1)."""
        return -math.log(prior) - (1 / self.prior - 1) * math.log1p(-prior)


@dataclass(frozen=True)
class ForegroundPrior:
    """Counts over a training set for one configuration.

    Attributes:
        parts: counts by name of the model's part, names out of `PARTS`.
        instance_count: K objects of each class in the whole training set.
        class_names: K names.
        num_images: images whose samples were counted, at least 1.
        total_images: images of the training set.
        source: file that the counts come from, for messages.
    """

    parts: dict[str, PartCount]
    instance_count: tuple[int, ...]
    class_names: tuple[str, ...]
    num_images: int
    total_images: int
    source: str = field(default="", compare=False)

    def class_thresholds(self, part: str) -> Tensor:
        """(K,) float64: theta_j, fraction of samples that belong to class j."""
        count = torch.tensor(self.instance_count, dtype=torch.float64)
        return self.parts[part].foreground * count / count.sum().clamp(min=1)

    @classmethod
    def from_config(cls, cfg: CfgNode, max_images: int = 5000, seed: int = 0) -> ForegroundPrior:
        """Counts on DATASETS.TRAIN as the training loader sees it.

        Args:
            cfg: full config; its datasets are registered.
            max_images: of more images than this a random sample is counted; 0 takes all.
            seed: of the sample.

        Raises:
            ValueError: the data cannot be read, the model has no part that is counted, or no
                anchor is positive.
        """
        statistics = ClassCounts.from_config(cfg)
        counters = sample_counters(cfg)
        records = training_records(cfg) or ()
        if max_images and len(records) > max_images:
            records = random.Random(seed).sample(records, max_images)
        totals = {name: [0, 0] for name in counters}
        for record in progress(records, "counting foreground"):
            size, boxes = _sized(cfg, record)
            for name, counter in counters.items():
                for i, count in enumerate(counter(size, boxes)):
                    totals[name][i] += count
        parts = {}
        for name, (positives, samples) in totals.items():
            outputs = 1 if name == RPN else statistics.num_classes
            try:
                parts[name] = PartCount(positives, samples, outputs)
            except ValueError as error:
                raise ValueError(f"{name}: {error}: do the anchors fit the objects?") from error
        return cls(
            parts,
            tuple(statistics.instance_count.tolist()),
            statistics.class_names,
            len(records),
            statistics.num_images,
        )

    def save(self, path: str, overwrite: bool = False) -> None:
        """Writes the counts as JSON; a partly written file never stands under `path`.

        Raises:
            FileExistsError: `path` exists and `overwrite` is False.
        """
        check_new([path], overwrite)
        classes = zip(self.class_names, self.instance_count, strict=True)
        data = {
            "num_images": self.num_images,
            "total_images": self.total_images,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "classes": [{"name": name, "instance_count": count} for name, count in classes],
        }
        write_json(path, data, indent=1)

    @classmethod
    def load(cls, path: str) -> ForegroundPrior:
        """Reads a file written by `save`.

        Raises:
            ValueError: naming the file and the field.
        """
        saved = convert(read_json(path), _Saved, path)
        if not set(saved.parts) <= set(PARTS):
            raise ValueError(f"{path}: parts must be counts by name, out of {', '.join(PARTS)}")
        return cls(
            {
                name: convert(part, PartCount, f"{path}: parts.{name}")
                for name, part in saved.parts.items()
            },
            tuple(c.instance_count for c in saved.classes),
            tuple(str(k if c.name is None else c.name) for k, c in enumerate(saved.classes)),
            saved.num_images,
            saved.total_images,
            path,
        )


class _Class(msgspec.Struct):
    instance_count: Count
    name: str | int | float | None = None


class _Saved(msgspec.Struct):
    num_images: Count
    total_images: Count
    parts: dict[str, Any]
    classes: Annotated[list[_Class], msgspec.Meta(min_length=1)]


def _sized(cfg: CfgNode, record: dict[str, Any]) -> tuple[tuple[int, int], Tensor]:
    """Height and width of an image in training, and its objects (M, 4), x0 y0 x1 y1 inside it."""
    from detectron2.structures import BoxMode

    if "height" not in record or "width" not in record:
        raise ValueError(
            f"{record.get('file_name', 'an image')} has no height and width in its dataset"
        )
    corners = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in record["annotations"]
        if not a.get("iscrowd", 0)
    ]
    boxes = torch.as_tensor(corners, dtype=torch.float32).view(-1, 4)
    size, boxes = training_size(cfg, (record["height"], record["width"]), boxes)
    return size, boxes[((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(dim=1)]


def training_size(
    cfg: CfgNode, size: tuple[int, int], boxes: Tensor
) -> tuple[tuple[int, int], Tensor]:
    """An image as training resizes it.

    Args:
        cfg: full config.
        size: height and width in pixels.
        boxes: (M, 4) float32, x0 y0 x1 y1.

    Returns:
        Height and width in training, and the boxes (M, 4) there, cut at the border.
    """
    from detectron2.data.transforms import ResizeShortestEdge

    height, width = size
    edge = middle_edge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    if edge:  # Detectron2 does not resize at 0
        size = ResizeShortestEdge.get_output_shape(height, width, edge, cfg.INPUT.MAX_SIZE_TRAIN)
    boxes = boxes * torch.tensor([size[1] / width, size[0] / height] * 2)
    limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    return size, torch.minimum(boxes.clamp(min=0), limit)


def middle_edge(sizes: Sequence[int], sampling: str) -> int:
    """The middle one of the sizes of INPUT.MIN_SIZE_TRAIN."""
    sizes = [sizes] if isinstance(sizes, int) else sorted(sizes)
    return round(sum(sizes) / len(sizes)) if sampling == "range" else sizes[len(sizes) // 2]
