"""AP by frequency group and by class, with LVIS and COCO rules."""

from d2_balance.data.groups import groups_from_counts

from .average_precision import APTable, GroundTruth, average_precision
from .build import build_evaluator
from .evaluators import COCOGroupEvaluator, LVISGroupEvaluator
from .per_class import read_per_class

__all__ = [
    "APTable",
    "COCOGroupEvaluator",
    "GroundTruth",
    "LVISGroupEvaluator",
    "average_precision",
    "build_evaluator",
    "groups_from_counts",
    "read_per_class",
]
