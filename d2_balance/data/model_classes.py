"""What a trained model knows of its classes, kept with its weights.

A checkpoint holds it under "classes", and the run's directory as `classes.json`: names, category
ids, images and objects per class, score thresholds, and how logits become scores. Whoever has one
of the two needs no file of the training set.

Shapes: K classes.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor, nn

from d2_balance.utils.files import convert, read_json, write_json

from .checks.classes import configured_num_classes
from .class_counts import FROM_CHECKPOINT, ClassCounts

CHECKPOINT_KEY = "classes"
FILE = "classes.json"
ACTIVATIONS = ("softmax", "sigmoid", "gumbel")  # by the numbers that RoI heads save

_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError)


@dataclass(frozen=True, eq=False)
class ModelClasses:
    """The classes of one trained model, by class index.

    Attributes:
        names: K names.
        category_ids: K ids that the training file gives the classes.
        image_count: K training images that hold an object of the class, or None.
        instance_count: K training objects of the class, or None.
        num_images: number of training images, or None.
        groups: K letters "r", "c", "f" of the training file, or None.
        score_thresholds: K scores in [0, 1] that detections must exceed, or None (the config's).
        activation: one of `ACTIVATIONS`, or None if unknown.
        calibration: what the calibration of the model was made from, lists by the fields of
            `CalibrationStatistics`, or None.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_count: tuple[int, ...] | None = None
    instance_count: tuple[int, ...] | None = None
    num_images: int | None = None
    groups: tuple[str, ...] | None = None
    score_thresholds: tuple[float, ...] | None = None
    activation: str | None = None
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for field in _COLUMNS:
            values = getattr(self, field)
            if values is not None and len(values) != len(self.names):
                raise ValueError(
                    f"{field} has {len(values)} entries; it must have one for each of the "
                    f"{len(self.names)} classes"
                )
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as the checkpoint and the file hold them."""
        columns = {
            key: getattr(self, field)
            for field, key in _COLUMNS.items()
            if getattr(self, field) is not None
        }
        rows = zip(*columns.values(), strict=True)
        measured = {} if self.calibration is None else {"calibration": dict(self.calibration)}
        return {
            "activation": self.activation,
            "num_images": self.num_images,
            "classes": [dict(zip(columns, row, strict=True)) for row in rows],
            **measured,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str) -> ModelClasses:
        """Read what `as_dict` returned.

        Args:
            data: the dictionary.
            source: file that it comes from, for messages.

        Raises:
            ValueError: a field is missing or of another type; names the source and the field.
        """
        saved = convert(data, _Saved, source)
        columns: dict[str, Any] = {}
        for field, key in _COLUMNS.items():
            values = tuple(v for c in saved.classes if (v := getattr(c, key)) is not None)
            columns[field] = values or None
        columns |= {"names": columns["names"] or (), "category_ids": columns["category_ids"] or ()}
        try:
            return cls(
                **columns,
                num_images=saved.num_images,
                activation=saved.activation,
                calibration=saved.calibration,
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def save(self, path: str) -> None:
        """Write the file; it is whole or not there."""
        write_json(path, self.as_dict(), indent=1)

    @property
    def counts(self) -> ClassCounts | None:
        """The counts of the training set, if they were saved."""
        if self.image_count is None or self.instance_count is None or self.num_images is None:
            return None
        return ClassCounts(
            torch.tensor(self.image_count, dtype=torch.int64),
            torch.tensor(self.instance_count, dtype=torch.int64),
            self.num_images,
            self.names,
            self.groups,
        )

    @classmethod
    def from_run(cls, cfg: CfgNode, model: nn.Module) -> ModelClasses | None:
        """Gather what is known while the training sets are registered.

        Args:
            cfg: config of the run.
            model: as it was built, wrapped in DDP or not.

        Returns:
            The classes; classes without a name are called by their index. None where nothing says
            how many there are.
        """
        metadata = MetadataCatalog.get(next(iter(cfg.DATASETS.TRAIN), "__none__"))
        names = metadata.get("thing_classes")
        counts = None
        try:
            num_classes = len(names) if names else configured_num_classes(cfg)
            counts = ClassCounts.from_config(cfg)
        except (ValueError, AttributeError, KeyError):  # sets and models of others
            if not names:
                return None
            num_classes = len(names)
        if counts is not None and counts.num_classes != num_classes:
            counts = None
        known = counts.class_names if counts is not None else map(str, range(num_classes))
        mapping = metadata.get("thing_dataset_id_to_contiguous_id")
        by_index = {index: raw for raw, index in (mapping or {}).items()}
        model = getattr(model, "module", model)
        return cls(
            names=tuple(names or known),
            # without a map, as Detectron2's LVIS sets, class index = id - 1
            category_ids=tuple(by_index.get(k, k + 1) for k in range(num_classes)),
            image_count=None if counts is None else tuple(counts.image_count.tolist()),
            instance_count=None if counts is None else tuple(counts.instance_count.tolist()),
            num_images=None if counts is None else counts.num_images,
            groups=None if counts is None else counts.file_groups,
            score_thresholds=class_thresholds(model),
            activation=class_activation(model),
            calibration=calibration_measured(model),
        )

    @classmethod
    def of_weights(cls, weights: str) -> ModelClasses | None:
        """Return the classes saved in a checkpoint, else those of the file beside it, else None.

        Args:
            weights: path of a checkpoint, as MODEL.WEIGHTS; one that is no local file has none.

        Raises:
            ValueError: what is saved cannot be used.
        """
        if not os.path.isfile(weights):
            return None
        status = os.stat(weights)
        return _of_weights(os.path.abspath(weights), status.st_mtime_ns, status.st_size)


_COLUMNS = {
    "names": "name",
    "category_ids": "category_id",
    "image_count": "image_count",
    "instance_count": "instance_count",
    "groups": "frequency",
    "score_thresholds": "score_threshold",
}


class _Class(msgspec.Struct):
    name: str
    category_id: int
    image_count: int | None = None
    instance_count: int | None = None
    frequency: str | None = None
    score_threshold: float | None = None


class _Saved(msgspec.Struct):
    classes: list[_Class]
    num_images: int | None = None
    activation: str | None = None
    calibration: dict[str, Any] | None = None


@functools.lru_cache(maxsize=8)
def _of_weights(path: str, modified: int, size: int) -> ModelClasses | None:
    del modified, size  # parts of the key: another file under the same path is read anew
    saved = read_checkpoint(path).get(CHECKPOINT_KEY) if path.endswith(".pth") else None
    if saved is not None:
        return ModelClasses.from_dict(saved, path)
    beside = os.path.join(os.path.dirname(path), FILE)
    return ModelClasses.from_dict(read_json(beside), beside) if os.path.isfile(beside) else None


def class_activation(model: nn.Module) -> str | None:
    """Return how a detector turns class logits into scores: one of `ACTIVATIONS`; None if unknown.

    Looks at the losses of this package and at the settings of Detectron2's own heads; the RPN,
    whose one class is object, does not count.
    """
    for name, module in model.named_modules():
        if "proposal_generator" in name:
            continue
        activation = getattr(module, "activation", None)
        if activation in ACTIVATIONS and hasattr(module, "num_outputs"):
            return activation
    for module in model.modules():
        if isinstance(module, FastRCNNOutputLayers):
            return "sigmoid" if module.use_sigmoid_ce else "softmax"
    return "sigmoid" if isinstance(model, DenseDetector) else None


def class_thresholds(model: nn.Module) -> tuple[float, ...] | None:
    """Return the score thresholds of a model that has one for each class, else None."""
    for module in model.modules():
        thresholds = getattr(module, "test_score_thresh", None)
        if isinstance(thresholds, Tensor) and thresholds.dim() == 1:
            return tuple(thresholds.tolist())
    return None


def calibration_measured(model: nn.Module) -> Mapping[str, Any] | None:
    """Return what the calibration of a model was made from, if it was measured."""
    found = (getattr(module, "measured", None) for module in model.modules())
    return next((each for each in found if each), None)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint without copying its tensors to memory; {} if it cannot be read.

    Who loads the weights afterwards reports why a file is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE:
        return {}
    return content if isinstance(content, dict) else {}


def class_counts(cfg: CfgNode) -> ClassCounts:
    """Return the counts of the training set, or those saved with MODEL.WEIGHTS if it is not here.

    Names that Detectron2 registers, such as lvis_v1_train, are known where their files are not.
    MODEL.BALANCE.CLASS_COUNTS_FILE "checkpoint" prefers the saved ones.

    Raises:
        OSError, ValueError: as `ClassCounts.from_config`, if nothing is saved.
    """
    here = all(name in DatasetCatalog for name in cfg.DATASETS.TRAIN)
    if cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == FROM_CHECKPOINT or not here:
        saved = _saved_counts(cfg.MODEL.WEIGHTS)
        return ClassCounts.from_config(cfg) if saved is None else saved
    try:
        return ClassCounts.from_config(cfg)
    except (OSError, ValueError):
        files = [MetadataCatalog.get(name).get("json_file") for name in cfg.DATASETS.TRAIN]
        saved = _saved_counts(cfg.MODEL.WEIGHTS)
        if saved is None or all(file is None or os.path.isfile(file) for file in files):
            raise
        return saved


def _saved_counts(weights: str) -> ClassCounts | None:
    saved = ModelClasses.of_weights(weights)
    return None if saved is None else saved.counts


def saved_loss_state(weights: str) -> dict[str, Tensor]:
    """Return the buffers of classification losses in a checkpoint, by their full names."""
    if not (weights.endswith(".pth") and os.path.isfile(weights)):
        return {}
    model = read_checkpoint(weights).get("model", {})
    return {name: value for name, value in model.items() if "cls_loss." in name}


def fill_metadata(cfg: CfgNode) -> None:
    """Give the datasets of a config that are not registered here the names saved with the weights.

    Detectron2's DefaultPredictor takes the names that it shows from MetadataCatalog, under the
    first name of DATASETS.TEST. Registered sets, and names that are known already, stay as they
    are.
    """
    unknown = [
        name
        for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        if name not in DatasetCatalog and MetadataCatalog.get(name).get("thing_classes") is None
    ]
    classes = ModelClasses.of_weights(cfg.MODEL.WEIGHTS) if unknown else None
    if classes is None:
        return
    for name in unknown:
        MetadataCatalog.get(name).set(
            thing_classes=list(classes.names),
            thing_dataset_id_to_contiguous_id={
                raw: index for index, raw in enumerate(classes.category_ids)
            },
        )
