"""Datasets from any annotation file, their checks, class statistics and image-level labels."""

from .annotations import annotation_style, load_json, read_json
from .catalog.metadata import category_names, id_map, loaded_metadata
from .catalog.register import register_from_config, register_json
from .checks.annotations import BadAnnotations, bad_annotations
from .checks.structure import (
    check_categories_match,
    check_masks,
    check_num_classes,
    check_structure,
)
from .class_counts import ClassCounts
from .image_labels import ImageLabels, require_image_labels
from .mini_lvis.dataset import register_mini_lvis
from .samplers import ClassAwareTrainingSampler

__all__ = [
    "BadAnnotations",
    "ClassAwareTrainingSampler",
    "ClassCounts",
    "ImageLabels",
    "annotation_style",
    "bad_annotations",
    "category_names",
    "check_categories_match",
    "check_masks",
    "check_num_classes",
    "check_structure",
    "id_map",
    "load_json",
    "loaded_metadata",
    "read_json",
    "register_from_config",
    "register_json",
    "register_mini_lvis",
    "require_image_labels",
]

register_mini_lvis()
