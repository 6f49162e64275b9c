"""What Detectron2's MetadataCatalog knows about a dataset, loaded where that is needed."""

from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import lvis_v0_5_categories, lvis_v1_categories


def loaded_metadata(name: str) -> Metadata:
    """Metadata of a registered dataset with ``thing_classes`` filled in.

    Most sets write their class names into the metadata only when they are loaded. This loads the
    set if, and only if, the names are missing.

    Raises:
        ValueError: if ``name`` is not registered.
    """
    if MetadataCatalog.get(name).get("thing_classes") is None:
        if name not in DatasetCatalog:
            raise ValueError(
                f"the dataset {name!r} is not registered: add it to DATASETS.REGISTER or correct "
                "the name in DATASETS.TRAIN or DATASETS.TEST"
            )
        DatasetCatalog.get(name)
    return MetadataCatalog.get(name)


def target_categories(name: str) -> list[dict[str, Any]]:
    """Categories of a dataset as class maps take them: id of the file, name, and synset if known.

    Raises:
        ValueError: if the set is not registered, or has no class names.
    """
    names = category_names(name)
    synsets = MetadataCatalog.get(name).get("class_synset")
    if synsets is None:
        known = _lvis_synsets(name)
        synsets = [known.get(raw) for raw in names]
    return [
        {"id": raw, "name": class_name} | ({"synset": synset} if synset else {})
        for (raw, class_name), synset in zip(names.items(), synsets, strict=True)
    ]


def _lvis_synsets(name: str) -> dict[int, str]:
    """Synsets of Detectron2's own LVIS sets, whose metadata have names only."""
    if MetadataCatalog.get(name).get("evaluator_type") != "lvis" or not name.startswith("lvis_v"):
        return {}
    module = lvis_v1_categories if name.startswith("lvis_v1") else lvis_v0_5_categories
    return {category["id"]: category["synset"] for category in module.LVIS_CATEGORIES}


def id_map(name: str) -> dict[int, int] | None:
    """From category ids of the file to class indices 0..K-1.

    Reads the metadata as they are and loads nothing.

    Returns:
        The map, or None where class index = id - 1. Detectron2 writes no map for LVIS, whose ids
        start at 1 without gaps; a map that says the same gives None too.
    """
    mapping = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    if mapping is None or all(index == raw - 1 for raw, index in mapping.items()):
        return None
    return dict(mapping)


def category_names(name: str) -> dict[int, str]:
    """Class names by category id of the file, in the order of the class indices.

    Raises:
        ValueError: if the set is not registered, or has no class names.
    """
    classes = loaded_metadata(name).get("thing_classes")
    if classes is None:
        raise ValueError(f"the dataset {name!r} has no thing_classes in its metadata")
    mapping = id_map(name) or {index + 1: index for index in range(len(classes))}
    by_index = {index: raw for raw, index in mapping.items()}
    return {by_index[index]: class_name for index, class_name in enumerate(classes)}
