"""What calibrations need besides class counts, measured once and kept in a JSON file.

Shapes: K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_balance.losses import Samples
from d2_balance.utils.files import convert, read_json, write_json

from ..criterion import watched
from .calibration import LogitStatistics, fractal_dimension

KEY = "MODEL.BALANCE.CALIBRATION.STATISTICS"
_NOT_HERE = (
    "MODEL.BALANCE.CALIBRATION.NAME 'fracal' counts on DATASETS.TRAIN, which is not here; set "
    f"{KEY} to a file of `d2-balance calibrate`"
)


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of a training set and of a model on it.

    Attributes:
        class_names: K names.
        fractal_dimension: K numbers of at least 1, see `calibration.fractal_dimension`.
        logit_mean: K means of the class logits of RoI heads, or None if there was no pass.
        logit_variance: K variances of them, or None.
    """

    class_names: tuple[str, ...]
    fractal_dimension: tuple[float, ...]
    logit_mean: tuple[float, ...] | None = None
    logit_variance: tuple[float, ...] | None = None

    def save(self, path: str) -> None:
        """Write the file; it is whole or not there."""
        write_json(path, asdict(self), indent=1)

    @classmethod
    def load(cls, path: str) -> CalibrationStatistics:
        """Read a file of `d2-balance calibrate`.

        Raises:
            ValueError: it cannot be read, or a field is missing; names the file and the field.
        """
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{KEY}: {path} cannot be read: {error}") from error
        found = convert(data, cls, f"{KEY}: {path}")
        for field in ("fractal_dimension", "logit_mean", "logit_variance"):
            values, classes = getattr(found, field), len(found.class_names)
            if values is not None and len(values) != classes:
                raise ValueError(
                    f"{KEY}: {path}: {field} must be {classes} numbers, one for each class."
                )
        return found

    def column(self, field: str, num_classes: int, path: str) -> Tensor:
        """Return one of the columns as (K,) float64.

        Raises:
            ValueError: it was not measured, or for another number of classes.
        """
        values = getattr(self, field)
        if values is None:
            raise ValueError(
                f"{KEY}: {path} has no {field}; run `d2-balance calibrate` with MODEL.WEIGHTS."
            )
        if len(values) != num_classes:
            raise ValueError(
                f"{KEY}: {path} has {len(values)} classes and the model has {num_classes}; must be "
                "a file of this training set."
            )
        return torch.tensor(values, dtype=torch.float64)


@functools.lru_cache(maxsize=4)
def dataset_dimensions(names: tuple[str, ...], num_classes: int) -> Tensor:
    """Return the fractal dimension of the box centres of each class in training sets.

    Crowds are left out; centres are those of the annotated image, before any crop.

    Args:
        names: registered datasets.
        num_classes: K.

    Raises:
        ValueError: a dataset is not registered on this machine.
    """
    try:
        records = [record for name in names for record in DatasetCatalog.get(name)]
    except (KeyError, OSError) as error:
        raise ValueError(f"{_NOT_HERE}: {error}") from error
    if not records:
        raise ValueError(f"{_NOT_HERE}.")
    cx, cy, classes = [], [], []
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue
            x0, y0, x1, y1 = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            cx.append((x0 + x1) / 2 / record["width"])
            cy.append((y0 + y1) / 2 / record["height"])
            classes.append(annotation["category_id"])
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (cx, cy))
    return fractal_dimension(x, y, torch.tensor(classes, dtype=torch.int64), num_classes)


def logit_statistics(
    model: nn.Module,
    batches: Iterable[list[dict[str, Any]]],
    num_classes: int,
    momentum: float | None = None,
) -> LogitStatistics:
    """Collect the class logits of all sampled RoIs in a pass over training data.

    The model is as at test time (batch norms and dropout), proposals are sampled as in training,
    and nothing of the model changes.

    Args:
        model: with `roi_heads` that are not a cascade.
        batches: of a training loader.
        num_classes: K.
        momentum: as `LogitStatistics`.

    Raises:
        ValueError: the model has no such heads.
    """
    heads = getattr(model, "roi_heads", None)
    layers = getattr(heads, "box_predictor", None)
    if heads is None or layers is None or isinstance(layers, nn.ModuleList):
        raise ValueError(
            "LogN needs the logits of one classifier; MODEL.ROI_HEADS.NAME must be "
            "BalancedStandardROIHeads."
        )
    statistics = LogitStatistics(num_classes, momentum)

    def add(samples: Samples, boxes: Any, cls: Tensor, box: Tensor) -> None:
        statistics.add(samples.logits[:, :num_classes])

    with _sampling_only(model), watched(heads, add), torch.no_grad(), EventStorage():
        for batch in batches:
            model(batch)
    return statistics


@contextmanager
def _sampling_only(model: nn.Module) -> Iterator[None]:
    """Training mode in which no layer and no state of a loss changes."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
