"""Datasets from any annotation file, their checks, class statistics and image-level labels."""

from importlib import import_module
from typing import Any

_MODULES = {
    "Annotations": "annotations",
    "BadAnnotations": "checks.annotations",
    "ClassAwareTrainingSampler": "samplers",
    "ClassCounts": "class_counts",
    "ImageLabels": "image_labels",
    "annotation_style": "annotations",
    "bad_annotations": "checks.annotations",
    "category_names": "catalog.metadata",
    "check_categories_match": "checks.classes",
    "check_masks": "checks.classes",
    "check_num_classes": "checks.classes",
    "check_structure": "columns",
    "id_map": "catalog.metadata",
    "load_annotations": "resolve",
    "load_json": "records",
    "loaded_metadata": "catalog.metadata",
    "read_annotations": "annotations",
    "register_from_config": "catalog.from_config",
    "register_json": "catalog.register",
    "register_mini_lvis": "mini_lvis.dataset",
    "require_image_labels": "image_labels",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: commands that read annotations load no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
