"""AP by frequency group and by class, with LVIS and COCO rules."""

from d2_balance.data.groups import groups_from_counts
from d2_balance.evaluation.average_precision import APTable, GroundTruth, average_precision
from d2_balance.evaluation.build import build_evaluator
from d2_balance.evaluation.group_evaluator import COCOGroupEvaluator, LVISGroupEvaluator
from d2_balance.evaluation.per_class import read_per_class

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
