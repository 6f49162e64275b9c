"""Data sets from any annotation file, their checks, class statistics and image-level labels."""

from .annotation_checks import BadAnnotations, bad_annotations
from .image_labels import ImageLabels, require_image_labels
from .json_loader import annotation_style, load_json, read_json
from .metadata import category_names, id_map, loaded_metadata
from .mini_lvis import register_mini_lvis
from .register import register_from_config, register_json
from .samplers import ClassAwareTrainingSampler
from .statistics import ClassStatistics
from .validation import check_categories_match, check_masks, check_num_classes, check_structure

__all__ = [
    "BadAnnotations",
    "ClassAwareTrainingSampler",
    "ClassStatistics",
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
