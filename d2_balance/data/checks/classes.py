"""Checks of data against the configuration, and of datasets against each other."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from d2_balance.utils.arrays import unique

from ..catalog.metadata import category_names, id_map, loaded_metadata, target_categories
from ..records import objects_of
from .annotations import NO_MASK, RLE, bad_annotations
from .hints import LEFT_OUT

_SHOWN = 5


def num_classes_key(cfg: CfgNode) -> str:
    """The key that sets the number of classes of ``cfg.MODEL.META_ARCHITECTURE``."""
    for name in ("RetinaNet", "FCOS"):
        if name in cfg.MODEL.META_ARCHITECTURE:
            return f"MODEL.{name.upper()}.NUM_CLASSES"
    return "MODEL.ROI_HEADS.NUM_CLASSES"


def configured_num_classes(cfg: CfgNode) -> int:
    """Number of classes K that the configured model predicts."""
    node = num_classes_key(cfg).split(".")[1]
    return cfg.MODEL[node].NUM_CLASSES


def check_num_classes(cfg: CfgNode, names: Iterable[str] | None = None) -> None:
    """Compare the classes of the data with those of the model.

    Args:
        cfg: the configuration.
        names: datasets; all of DATASETS.TRAIN and DATASETS.TEST if not given.

    Raises:
        ValueError: naming the dataset and the key to set.
    """
    if names is None:
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in names:
        classes = loaded_metadata(name).get("thing_classes")
        if classes is not None:
            check_class_count(cfg, name, len(classes))


def check_class_count(cfg: CfgNode, name: str, count: int) -> None:
    """Compare the number of classes of one dataset with that of the model.

    Raises:
        ValueError: naming the dataset and the key to set.
    """
    if count != configured_num_classes(cfg):
        key = num_classes_key(cfg)
        report = bad_annotations(name)
        left_out = [hint for hint in report.hints if LEFT_OUT in hint] if report else []
        raise ValueError(
            f"the dataset {name!r} has {count} classes, but {key} is "
            f"{configured_num_classes(cfg)}: set {key} to {count}"
            + "".join(f" ({hint.rstrip('.')})" for hint in left_out)
        )


def check_categories_match(train_names: Sequence[str], test_names: Sequence[str]) -> None:
    """Check that every category of the validation sets means the same class as in training.

    The model's class k is turned back into a category id by the validation set's own list, so a
    validation file that lists fewer categories would shift every class behind the gap. Therefore
    the lists must agree in ids, order, and names; equal ids and synsets are the same class too.

    Raises:
        ValueError: naming the categories that the training set lacks or numbers differently.
    """
    if not train_names:
        return
    reference = train_names[0]
    trained = category_names(reference)
    synsets = _synsets(reference)
    for name in (*train_names[1:], *test_names):
        categories = category_names(name)
        own = _synsets(name)
        lacking = {
            i: c
            for i, c in categories.items()
            # LVIS v1 and Detectron2 name some classes otherwise: "bull" and "horned_cow"
            if trained.get(i) != c and not (i in own and own[i] == synsets.get(i))
        }
        if lacking:
            shown = ", ".join(f"{i} {c!r}" for i, c in list(lacking.items())[:_SHOWN])
            raise ValueError(
                f"{len(lacking)} categories of {name!r} are not in the training set {reference!r} "
                f"under the same id and name: {shown}{_more(len(lacking))}; give both files the "
                "same 'categories'"
            )
        if len(categories) != len(trained) or id_map(name) != id_map(reference):
            absent = [f"{i} {c!r}" for i, c in trained.items() if i not in categories]
            raise ValueError(
                f"{name!r} and the training set {reference!r} number their classes differently"
                f"{': absent from the former: ' if absent else ''}{', '.join(absent[:_SHOWN])}"
                f"{_more(len(absent))}; give both files the same 'categories'"
            )


def _synsets(name: str) -> dict[int, str]:
    """Synset by category id, of the classes whose synset is known."""
    return {c["id"]: c["synset"] for c in target_categories(name) if c.get("synset")}


def check_masks(
    dataset_dicts: Sequence[dict[str, Any]],
    name: str,
    mask_format: str = "polygon",
    boxes_too: bool = False,
) -> None:
    """Check that every object that is trained on has a mask, in the format that is configured.

    Detectron2 takes the first object's word for all objects of an image and fails in the middle of
    training. Call this where MODEL.MASK_ON is set; ``mask_format`` is INPUT.MASK_FORMAT;
    ``boxes_too`` allows objects without a mask, which train the box head only.

    Raises:
        ValueError: naming the dataset, an image and what to set.
    """
    objects = objects_of(dataset_dicts)
    trained = ~objects.crowd & ~objects.bad_mask

    def where(chosen: np.ndarray) -> list[str]:
        images = unique(objects.image[trained & chosen])
        first = [dataset_dicts[int(images[0])]["file_name"]] if len(images) else []
        return first * len(images)

    bare = [] if boxes_too else where(objects.mask == NO_MASK)
    encoded = where(objects.mask == RLE) if mask_format == "polygon" else []
    if bare:
        raise ValueError(
            f"the dataset {name!r} has objects without 'segmentation' in {len(bare)} image(s), "
            f"first {bare[0]}: set MODEL.MASK_ON False or add the masks"
        )
    if encoded:
        raise ValueError(
            f"the dataset {name!r} has RLE masks in {len(encoded)} image(s), first "
            f"{encoded[0]}: set INPUT.MASK_FORMAT bitmask"
        )


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""
