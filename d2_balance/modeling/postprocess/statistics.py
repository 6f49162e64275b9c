"""What calibrations need besides class counts, measured once and kept in a JSON file.

Shapes: K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_balance.data.model_classes import ModelClasses
from d2_balance.losses import Samples
from d2_balance.utils.files import convert, read_json, write_json

from ..criterion import watched
from .calibration import LogitStatistics, LogN, fractal_dimension

KEY = "MODEL.BALANCE.CALIBRATION.STATISTICS"
_NOT_HERE = (
    "MODEL.BALANCE.CALIBRATION.NAME 'fracal' counts on DATASETS.TRAIN, which is not here; set "
    f"{KEY} to a file of `d2-balance calibrate`"
)


FIELDS = ("fractal_dimension", "logit_mean", "logit_variance")
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class _Saved:
    """The file of statistics; its columns are checked by `CalibrationStatistics.of_values`."""

    class_names: tuple[str, ...]
    fractal_dimension: tuple[Any, ...] | None = None
    logit_mean: tuple[Any, ...] | None = None
    logit_variance: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of a training set and of a model on it.

    Attributes:
        class_names: K names.
        fractal_dimension: K numbers of at least 1, see `calibration.fractal_dimension`, or None.
        logit_mean: K means of the class logits of RoI heads, K for each stage of a cascade, or
            None if there was no pass.
        logit_variance: variances of them, likewise.
    """

    class_names: tuple[str, ...]
    fractal_dimension: Numbers | None = None
    logit_mean: Numbers | tuple[Numbers, ...] | None = None
    logit_variance: Numbers | tuple[Numbers, ...] | None = None

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
        found = convert(data, _Saved, f"{KEY}: {path}")
        return cls.of_values(found.class_names, asdict(found), path)

    @classmethod
    def of_values(
        cls, names: Sequence[str], data: Mapping[str, Any], source: str
    ) -> CalibrationStatistics:
        """Check values of `FIELDS` and take them.

        Args:
            names: of the classes.
            data: values by field.
            source: file that they come from, for messages.

        Raises:
            ValueError: a field does not have a number for each class; names the file and the field.
        """
        columns: dict[str, Any] = {}
        for field in FIELDS:
            values = data.get(field)
            if values is None:
                continue
            stages = isinstance(values, list | tuple) and all(
                isinstance(stage, list | tuple) for stage in values
            )
            columns_of_field = values if stages and values else [values]
            if not all(_is_column(column, len(names)) for column in columns_of_field):
                raise ValueError(
                    f"{KEY}: {source}: {field} must be {len(names)} numbers, one for each class."
                )
            columns[field] = tuple(map(tuple, values)) if stages else tuple(values)
        return cls(tuple(names), **columns)

    def column(self, field: str, num_classes: int, path: str) -> Tensor:
        """Return one of the columns as (K,) float64, or (S, K) for the stages of a cascade.

        Raises:
            ValueError: it was not measured, or for another number of classes.
        """
        values = getattr(self, field)
        if values is None:
            raise ValueError(
                f"{KEY}: {path} has no {field}; run `d2-balance calibrate` with MODEL.WEIGHTS."
            )
        column = torch.tensor(values, dtype=torch.float64)
        if column.shape[-1] != num_classes:
            raise ValueError(
                f"{KEY}: {path} has {column.shape[-1]} classes and the model has {num_classes}; "
                "must be a file of this training set."
            )
        return column


def _is_column(values: Any, length: int) -> bool:
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    return numbers and len(values) == length


def logn_modules(model: nn.Module) -> list[LogN]:
    """The LogN calibrations of a model, wrapped in DDP or not, stage by stage."""
    return [module for module in model.modules() if isinstance(module, LogN)]


def fill_from_weights(model: nn.Module, weights: str) -> None:
    """Give LogN the statistics that a checkpoint holds, if it holds any."""
    saved = ModelClasses.of_weights(weights)
    measured = {} if saved is None or saved.calibration is None else saved.calibration
    if "logit_mean" in measured:
        columns = [torch.tensor(measured[f], dtype=torch.float64) for f in FIELDS[1:]]
        for module in logn_modules(model):
            module.fill(*columns)


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
) -> list[LogitStatistics]:
    """Collect the class logits of all sampled RoIs in a pass over training data.

    The model is as at test time (batch norms and dropout), proposals are sampled as in training,
    and nothing of the model changes. With several ranks each sees its own batches, as many as the
    others.

    Args:
        model: with RoI heads of this package, not wrapped in DDP.
        batches: of a training loader.
        num_classes: K.
        momentum: as `LogitStatistics`.

    Returns:
        The statistics of each cascade stage over all ranks; of one stage in other heads.

    Raises:
        ValueError: the model has no such heads.
    """
    layers = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if layers is None:
        raise ValueError(
            "LogN needs the logits of RoI heads; MODEL.ROI_HEADS.NAME must be "
            "BalancedStandardROIHeads or BalancedCascadeROIHeads."
        )
    stages = list(layers) if isinstance(layers, nn.ModuleList) else [layers]
    statistics = [LogitStatistics(num_classes, momentum) for _ in stages]
    with ExitStack() as stack:
        stack.enter_context(_sampling_only(model))
        for stage, found in zip(stages, statistics, strict=True):
            stack.enter_context(watched(stage, _Collect(found, num_classes)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(EventStorage())
        for batch in batches:
            model(batch)
    for found in statistics:
        found.merge_ranks()
    return statistics


def measured_logits(statistics: Sequence[LogitStatistics]) -> dict[str, list[Any]]:
    """Return `logit_mean` and `logit_variance` as `CalibrationStatistics` has them."""
    columns = {
        "logit_mean": [one.mean.tolist() for one in statistics],
        "logit_variance": [one.variance.tolist() for one in statistics],
    }
    return columns if len(statistics) > 1 else {key: own[0] for key, own in columns.items()}


class _Collect:
    """Adds the logits of a head's batches to statistics."""

    def __init__(self, statistics: LogitStatistics, num_classes: int) -> None:
        self._statistics, self._num_classes = statistics, num_classes

    def __call__(self, samples: Samples, boxes: Any, cls: Tensor, box: Tensor) -> None:
        self._statistics.add(samples.logits[:, : self._num_classes])


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
