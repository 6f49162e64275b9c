"""How often each class occurs: the one source for every method that needs class frequencies.

Shapes: K classes.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor

from d2_balance.utils.files import check_new, write_json

from .annotations import read_annotations
from .catalog.register import registered_file, resolve_path
from .checks.classes import (
    check_class_count,
    check_num_classes,
    configured_num_classes,
    num_classes_key,
)
from .counts_file import check_ranges, read_counts
from .groups import LVIS_CUTS, groups_from_counts
from .records import Records, join, objects_of, subset

FROM_CHECKPOINT = "checkpoint"
_KEY = "MODEL.BALANCE.CLASS_COUNTS_FILE"
_GIVE = "give MODEL.BALANCE.CLASS_COUNTS_FILE (a file written by ClassCounts.save) or the data"


def counts_file(cfg: CfgNode) -> str:
    """The file that MODEL.BALANCE.CLASS_COUNTS_FILE names, "" where it names none.

    Raises:
        ValueError: there is none, neither there nor below $DETECTRON2_DATASETS.
    """
    path = cfg.MODEL.BALANCE.CLASS_COUNTS_FILE
    if path in ("", FROM_CHECKPOINT):
        return ""
    return resolve_path(path, PathManager.isfile, f"{_KEY}: the file")


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Counts over a training set.

    What is counted: objects that are trained on. Crowd annotations (iscrowd 1) are left out, as
    Detectron2's DatasetMapper leaves them out. The number of images is that of the dataset which
    the sampler sees: after DATALOADER.FILTER_EMPTY_ANNOTATIONS, the denominator of
    RepeatFactorTrainingSampler. That sampler also counts a class where an image shows it only as a
    crowd; with LVIS, which has no crowds, the frequencies are equal.

    Attributes:
        image_count: (K,) int64, images with at least one object of the class.
        instance_count: (K,) int64, objects of the class.
        num_images: D, number of images, at least 1.
        class_names: K names.
        file_groups: K letters "r", "c", "f" that the annotation file itself gives, or None.
    """

    image_count: Tensor
    instance_count: Tensor
    num_images: int
    class_names: tuple[str, ...]
    file_groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        for field in ("image_count", "instance_count"):
            counts = getattr(self, field)
            if counts.dtype != torch.int64 or counts.shape != (num_classes,):
                raise ValueError(
                    f"{field} must be int64 of shape ({num_classes},), one per class name, not "
                    f"{counts.dtype} of {tuple(counts.shape)}"
                )
        check_ranges(self.image_count.tolist(), self.num_images, self.file_groups)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def frequency(self) -> Tensor:
        """(K,) float64 in [0, 1]: fraction of the images that show the class."""
        return self.image_count.double() / self.num_images

    def group(self, cuts: tuple[int, int] | None = None) -> list[str]:
        """Frequency group of each class: "r" rare, "c" common, "f" frequent.

        Args:
            cuts: (a, b): up to a images is rare, up to b common. If not given, the groups of the
                annotation file are taken, or (10, 100), the cuts of LVIS, where it has none.
        """
        if cuts is None and self.file_groups is not None:
            return list(self.file_groups)
        return groups_from_counts(self.image_count.tolist(), cuts or LVIS_CUTS)

    @classmethod
    def from_dataset_dicts(
        cls,
        dataset_dicts: Sequence[dict[str, Any]],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        file_groups: Sequence[str] | None = None,
    ) -> "ClassCounts":
        """Count over Detectron2's standard dicts; every dict counts as an image.

        Raises:
            ValueError: if there is no dict, or a category_id is outside [0, num_classes).
        """
        objects = objects_of(dataset_dicts)
        classes = objects.category[~objects.crowd]
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(
                f"category_id runs from {classes.min()} to {classes.max()}; it must be in "
                f"[0, {num_classes})"
            )
        counts = objects.counts(num_classes)
        return cls(
            torch.from_numpy(counts.image_count),
            torch.from_numpy(counts.instance_count),
            counts.images,
            tuple(class_names or map(str, range(num_classes))),
            None if file_groups is None else tuple(file_groups),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ClassCounts":
        """Statistics of the training set of a configuration.

        Reads MODEL.BALANCE.CLASS_COUNTS_FILE if that names a file; else counts over DATASETS.TRAIN
        as the training loader sees it. Files of DATASETS.REGISTER are counted once for each content
        (see `data.cache`), other sets once per process. "checkpoint" counts too: it speaks of the
        losses' values only.

        Raises:
            ValueError: if the number of classes is not the model's, or if the data cannot be read.
        """
        if path := counts_file(cfg):
            statistics = cls.load(path)
            if statistics.num_classes != configured_num_classes(cfg):
                raise ValueError(
                    f"{_KEY}: {path} has {statistics.num_classes} classes, "
                    f"but {num_classes_key(cfg)} is {configured_num_classes(cfg)}; they must agree"
                )
            return statistics
        names = tuple(cfg.DATASETS.TRAIN)
        if not names:
            raise ValueError(f"class statistics need DATASETS.TRAIN, which is empty: {_GIVE}")
        for name in names:
            if name not in DatasetCatalog:
                raise ValueError(
                    f"class statistics need DATASETS.TRAIN, but {name!r} is not registered: {_GIVE}"
                )
        filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        files = [registered_file(name) for name in names]
        if all(files):
            paths = [file for file in files if file]
            statistics = _count_files(paths, filter_empty, cfg.MODEL.MASK_ON)
            for name in names:
                check_class_count(cfg, name, statistics.num_classes)
            return statistics
        # the loaders belong to the key: a name may be taken off and registered anew
        loaders = tuple(DatasetCatalog[name] for name in names)
        statistics = _count(names, loaders, filter_empty, configured_num_classes(cfg))
        check_num_classes(cfg, names)
        return statistics

    def save(self, path: str, overwrite: bool = False) -> None:
        """Write the counts as JSON; a partly written file never stands under ``path``.

        Raises:
            FileExistsError: if ``path`` exists and ``overwrite`` is False.
        """
        check_new([path], overwrite)
        columns = {
            "name": self.class_names,
            "image_count": self.image_count.tolist(),
            "instance_count": self.instance_count.tolist(),
        }
        if self.file_groups is not None:
            columns["frequency"] = self.file_groups
        rows = zip(*columns.values(), strict=True)
        classes = [dict(zip(columns, row, strict=True)) for row in rows]
        write_json(path, {"num_images": self.num_images, "classes": classes}, indent=1)

    @classmethod
    def load(cls, path: str) -> "ClassCounts":
        """Read a file written by `save`; class k is the k-th entry of ``classes``.

        Raises:
            ValueError: naming the file and the field, if it cannot be read or lacks a count.
        """
        saved = read_counts(path)
        return cls(
            torch.tensor(saved.image_count, dtype=torch.int64),
            torch.tensor(saved.instance_count, dtype=torch.int64),
            saved.num_images,
            saved.class_names,
            saved.file_groups,
        )


def _count_files(paths: Sequence[str], filter_empty: bool, masks: bool) -> ClassCounts:
    """Counts of one or several annotation files together.

    Raises:
        ValueError: a file cannot be used, has other classes than the first one, or no image is
            left.
    """
    files = [read_annotations(path) for path in paths]
    counts = [file.class_counts(masks) for file in files]
    names = tuple(files[0].class_names.values())
    for file in files[1:]:
        if tuple(file.class_names.values()) != names:
            raise ValueError(
                f"DATASETS.TRAIN: {file.path} has other class names than {files[0].path}, or "
                "another order; training sets must have the same 'categories'"
            )
    images = sum(c.images_with_objects if filter_empty else c.images for c in counts)
    if not images:
        what = "an object to train on" if filter_empty else "an image"
        crowds = sum(int((f.usable & f.crowd).sum()) for f in files)
        why = (
            f": {crowds} of {sum(len(f.id) for f in files)} objects have iscrowd 1"
            if crowds
            else ""
        )
        raise ValueError(
            f"{', '.join(paths)}: class statistics need {what}, and there is none{why}"
        )
    groups = {file.file_groups for file in files}
    return ClassCounts(
        torch.from_numpy(np.sum([c.image_count for c in counts], axis=0)),
        torch.from_numpy(np.sum([c.instance_count for c in counts], axis=0)),
        images,
        names,
        files[0].file_groups if len(groups) == 1 else None,
    )


@functools.cache
def _count(
    names: tuple[str, ...], loaders: tuple[Callable, ...], filter_empty: bool, num_classes: int
) -> ClassCounts:
    """Count over registered sets; ``num_classes`` serves sets without class names only."""
    try:
        parts = [loader() for loader in loaders]
    except ValueError:
        raise  # names the file and what is wrong in it
    except Exception as error:  # loaders of others may raise anything
        raise ValueError(
            f"class statistics need DATASETS.TRAIN, but {', '.join(names)} cannot be loaded "
            f"({type(error).__name__}: {error}): {_GIVE}"
        ) from error
    for part in parts:
        if not isinstance(part, list | Records):  # a torch dataset, whose items may be anything
            raise ValueError(
                f"class statistics need DATASETS.TRAIN, but {', '.join(names)} is a "
                f"{type(part).__name__} and no list of dicts: {_GIVE}"
            )
    dataset_dicts = join(parts)
    if filter_empty:
        kept = objects_of(dataset_dicts).with_objects()
        dataset_dicts = subset(dataset_dicts, np.flatnonzero(kept))
    metadata = [MetadataCatalog.get(name) for name in names]
    class_names = metadata[0].get("thing_classes")
    groups = [m.get("class_group") for m in metadata]
    return ClassCounts.from_dataset_dicts(
        dataset_dicts,
        len(class_names) if class_names else num_classes,
        class_names,
        groups[0] if all(group == groups[0] for group in groups) else None,
    )
