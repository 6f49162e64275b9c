"""Checks of COCO- and LVIS-style annotation files, and of data against the configuration.

Structure that cannot be trained on raises ValueError. A single bad annotation does not: it is left
out, counted by reason and kept for the run's summary (see ``annotation_checks.py``).
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..catalog.metadata import category_names, id_map, loaded_metadata

TOP_LEVEL_KEYS = ("images", "annotations", "categories")
IMAGE_LABEL_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")
_SHOWN = 5


def check_structure(data: Any, json_file: str) -> None:
    """Check what a COCO- or LVIS-style file must have before its annotations are looked at.

    Args:
        data: the parsed file.
        json_file: its path, for the messages.

    Raises:
        ValueError: naming the file, the id and the field, for missing keys, duplicate ids or class
            names, sizes that are not positive, and references to unknown images or categories.
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"{json_file}: the top level must be an object with the keys "
            f"{_listed(TOP_LEVEL_KEYS)}, not a {type(data).__name__}"
        )
    missing = [key for key in TOP_LEVEL_KEYS if not isinstance(data.get(key), list)]
    if missing:
        raise ValueError(
            f"{json_file}: the top-level key(s) {_listed(missing)} are missing or no lists; a "
            f"COCO- or LVIS-style file has the lists {_listed(TOP_LEVEL_KEYS)}"
        )
    category_ids = check_categories(data["categories"], json_file)
    image_ids = _check_images(data["images"], category_ids, json_file)
    _check_references(data["annotations"], image_ids, category_ids, json_file)


def category_name(category: dict[str, Any]) -> str | None:
    """The name of a category; LVIS files of old call it only by its first synonym."""
    return category.get("name") or next(iter(category.get("synonyms") or ()), None)


def check_categories(categories: list[dict], json_file: str) -> set[int]:
    """Checks ids and names of the categories of a file, and returns the ids.

    Raises:
        ValueError: naming the file and the id.
    """
    if not categories:
        raise ValueError(f"{json_file}: 'categories' is empty; at least one class is needed")
    ids = _unique_ids(categories, "categories", json_file, integer=True)
    names = [category_name(category) for category in categories]
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"{json_file}: category {ids[number]} has no 'name'; it must be a text"
            )
    first_id: dict[str, int] = {}
    for category_id, name in zip(ids, names, strict=True):
        if name in first_id:
            raise ValueError(
                f"{json_file}: the categories {first_id[name]} and {category_id} have the same "
                f"name {name!r}; class names must be unique"
            )
        first_id[name] = category_id
    return set(ids)


def _check_images(images: list[dict], category_ids: set[int], json_file: str) -> set:
    ids = _unique_ids(images, "images", json_file)
    for image in images:
        for field in ("height", "width"):
            size = image.get(field)
            if isinstance(size, bool) or not isinstance(size, int | float) or not _whole(size):
                raise ValueError(
                    f"{json_file}: image {image['id']}: {field!r} is {size!r}; it must be a whole "
                    "number of pixels above 0"
                )
        for field in IMAGE_LABEL_KEYS:
            listed = image.get(field, ())
            try:
                unknown = set(listed) - category_ids
            except TypeError:
                unknown = {str(listed)}
            if unknown:
                raise ValueError(
                    f"{json_file}: image {image['id']}: {field!r} holds {_some(unknown)}; only ids "
                    "of the file's 'categories' are allowed"
                )
    return set(ids)


def _check_references(
    annotations: list[dict], image_ids: set, category_ids: set[int], json_file: str
) -> None:
    _unique_ids(annotations, "annotations", json_file)
    for field, known, table in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        unknown = set(_column(annotations, field, "annotations", json_file)) - known
        if unknown:
            where = [record["id"] for record in annotations if record[field] in unknown]
            raise ValueError(
                f"{json_file}: {field!r} {_some(unknown)} of {len(where)} annotation(s) (ids "
                f"{_some(where)}) is not in {table!r}; only ids listed there are allowed"
            )


def _unique_ids(
    records: list[dict], table: str, json_file: str, integer: bool = False
) -> list[Hashable]:
    ids = _column(records, "id", table, json_file)
    allowed = int if integer else int | str
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, allowed)]
    if wrong:
        raise ValueError(
            f"{json_file}: {table!r}: 'id' is {_some(wrong)}; it must be an integer"
            f"{'' if integer else ' or a text'}"
        )
    if len(set(ids)) < len(ids):
        seen: set = set()
        twice = [i for i in ids if i in seen or seen.add(i)]
        raise ValueError(
            f"{json_file}: {table!r}: the id(s) {_some(dict.fromkeys(twice))} occur more than "
            "once; ids must be unique"
        )
    return ids


def _column(records: list[dict], field: str, table: str, json_file: str) -> list[Hashable]:
    """One field of every record; the slow search for the culprit runs only after a failure."""
    try:
        column = [record[field] for record in records]
        set(column)  # an id that is a list would fail later, and without a name
        return column
    except (KeyError, TypeError):
        for number, record in enumerate(records):
            label = f"{json_file}: {table}[{number}]"
            if not isinstance(record, dict):
                raise ValueError(f"{label} is {record!r}; it must be an object") from None
            if field not in record:
                known = f" (id {record['id']})" if "id" in record else ""
                raise ValueError(f"{label}{known} lacks the field {field!r}") from None
            if isinstance(record[field], list | dict):
                raise ValueError(
                    f"{label}: {field!r} is {record[field]!r}; it must be a number or a text"
                ) from None
        raise


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
        raise ValueError(
            f"the dataset {name!r} has {count} classes, but {key} is "
            f"{configured_num_classes(cfg)}: set {key} to {count}"
        )


def check_categories_match(train_names: Sequence[str], test_names: Sequence[str]) -> None:
    """Check that every category of the validation sets means the same class as in training.

    The model's class k is turned back into a category id by the validation set's own list, so a
    validation file that lists fewer categories would shift every class behind the gap. Therefore
    the lists must agree in ids, names and order.

    Raises:
        ValueError: naming the categories that the training set lacks or numbers differently.
    """
    if not train_names:
        return
    reference = train_names[0]
    trained = category_names(reference)
    for name in (*train_names[1:], *test_names):
        categories = category_names(name)
        lacking = {i: c for i, c in categories.items() if trained.get(i) != c}
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


def check_masks(
    dataset_dicts: list[dict], name: str, mask_format: str = "polygon", boxes_too: bool = False
) -> None:
    """Check that every object that is trained on has a mask, in the format that is configured.

    Detectron2 takes the first object's word for all objects of an image and fails in the middle of
    training. Call this where MODEL.MASK_ON is set; ``mask_format`` is INPUT.MASK_FORMAT;
    ``boxes_too`` allows objects without a mask, which train the box head only.

    Raises:
        ValueError: naming the dataset, an image and what to set.
    """
    bare, encoded = [], []
    for record in dataset_dicts:
        objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd", 0)]
        if not boxes_too and any("segmentation" not in o for o in objects):
            bare.append(record["file_name"])
        elif mask_format == "polygon" and any(
            not isinstance(o.get("segmentation", []), list) for o in objects
        ):
            encoded.append(record["file_name"])
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


def _whole(size: float) -> bool:
    return 0 < size < float("inf") and size == int(size)  # some tools write 480.0


def _some(values: Iterable) -> str:
    values = list(values)
    return ", ".join(map(repr, values[:_SHOWN])) + _more(len(values))


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys)
