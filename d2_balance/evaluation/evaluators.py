"""Detectron2 evaluators that report AP by frequency group and by class.

Both keep Detectron2's interface (`reset`, `process`, `evaluate`) and the layout of its results,
{"bbox": {"AP": ..}, "segm": {..}} in percent. They differ in the engine (see `matching`), in what
they say without ground truth (NaN and the reason, never -1), in empty predictions (AP 0) and in
memory (every rank writes its own file; nothing is gathered).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table, log_first_n

from d2_balance.data import ClassCounts
from d2_balance.data.annotations import Annotations, read_annotations
from d2_balance.data.columns import category_name
from d2_balance.data.unreadable import SKIPPED, listed_images
from d2_balance.utils.files import read_json

from .best_scores import BestScores
from .evaluate import (
    PER_CLASS,
    check_measures,
    checked_max_dets,
    figures,
    ground_notes,
    usable_tasks,
)
from .files import RankPredictions, file_name_of
from .groups import TrainCounts, check_groups, classes_without_truth
from .matching import GroundTruth
from .predictions import Predictions, read_predictions
from .record import write_per_class

TASKS = ("bbox", "segm")

logger = logging.getLogger(__name__)


class COCOGroupEvaluator(DatasetEvaluator):
    """COCO metrics, plus APr, APc, APf by the classes' images in the training set.

    After `evaluate()` on rank 0, `per_class` holds one record per class (see `class_records`). With
    an `output_dir` these files are written there: `predictions_<dataset>.json` (COCO results with
    the dataset's own category ids), `per_class_ap_<dataset>.json` and `.csv`, and
    `evaluation_<dataset>.json` with every figure (see `Evaluation`).

    Args:
        dataset_name: a registered dataset with COCO-style JSON, or any of Detectron2's standard
            format, which is converted.
        tasks: of "bbox", "segm"; None: bbox, and segm where the model gives masks.
        distributed: False: evaluate this process's predictions only.
        output_dir: directory for the files; with several processes one that all of them share.
        max_dets: detections that count, per image and class (COCO's rule).
        groups: class name to "r", "c" or "f"; replaces the file's groups and the counts.
        train_image_count: class name to the number of training images that hold the class, or a
            function that returns it (called on rank 0, and only where the file does not say).
        cuts: highest image count of a rare and of a common class.
        ap: of "fixed", "pool" and "boundary", what to measure beside, see `measure`; "boundary"
            where there are masks.
        per_class: detections of a class that count in "fixed" and "pool".
        keep_per_class: True keeps no more than these (and a tenth), so that a model may give any
            number of an image: files and memory do not grow with the dataset.

    Raises:
        ValueError: unknown task, group or measure, a limit below 1, or a file that is no JSON.
    """

    federated = False

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets: int | None = None,
        groups: Mapping[str, str] | None = None,
        train_image_count: TrainCounts = None,
        cuts: tuple[int, int] = (10, 100),
        ap: Sequence[str] = (),
        per_class: int = PER_CLASS,
        keep_per_class: bool = False,
    ):
        if tasks is not None and not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks {tuple(tasks)}: must be of {TASKS}")
        max_dets = checked_max_dets(max_dets, self.federated)
        check_measures(ap, per_class)
        check_groups(groups)
        if self.federated and not hasattr(MetadataCatalog.get(dataset_name), "json_file"):
            raise ValueError(
                f"dataset {dataset_name}: LVIS evaluation reads the image-level labels from its "
                "file; the metadata must name it as json_file"
            )
        self._metadata = MetadataCatalog.get(dataset_name)
        self._tasks, self._distributed, self._output_dir = tasks, distributed, output_dir
        self._cpu_device = torch.device("cpu")
        if not hasattr(self._metadata, "json_file"):
            if output_dir is None:
                raise ValueError(
                    f"dataset {dataset_name} has no json_file in its metadata, and is converted to "
                    "one; the evaluator needs an output_dir for it"
                )
            cache = os.path.join(output_dir, f"{file_name_of(dataset_name)}_coco_format.json")
            self._metadata.json_file = cache
            convert_to_coco_json(dataset_name, cache, allow_cached=True)
        path = PathManager.get_local_path(self._metadata.json_file)
        self._truth, self._do_evaluation = _read(path, dataset_name, self.federated)
        self.per_class: dict[str, dict] = {}
        self._dataset_name = dataset_name
        self._max_dets = max_dets
        self._groups = groups
        self._train_image_count = train_image_count
        self._cuts = cuts
        self._ap, self._per_class = tuple(ap), per_class
        self._keep_per_class = keep_per_class
        self._best_scores: BestScores | None = None
        self._floors: np.ndarray | None = None
        self.when_floors_rise: Callable[[np.ndarray], None] | None = None
        self._files: RankPredictions | None = None

    def reset(self) -> None:
        """Forget all predictions."""
        self._files = RankPredictions(self._directory(), comm.get_rank())
        self._category_ids = self._category_ids_by_class_index()
        self._best_scores = None
        if self._keep_per_class:
            # a tenth more: what a second forward pass rounds otherwise must not be lacking
            limit = math.ceil(1.1 * self._per_class)
            self._best_scores = BestScores(max(self._category_ids) + 1, limit, self._floors)
            self._tell_floors()
        self._skipped = 0
        self._unreadable: dict[int | str, tuple[str, str]] = {}  # image id to name and reason

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Write the detections of a batch to this rank's file.

        Args:
            inputs: dicts with `image_id`.
            outputs: dicts with `instances`: `pred_boxes`, `scores`, `pred_classes`, and
                `pred_masks` (R, H, W) where the model has masks.

        Raises:
            ValueError: no instances, or a class index that the dataset does not have.
        """
        if self._files is None:
            self.reset()
        for image, output in zip(inputs, outputs, strict=True):
            if SKIPPED in image:
                (self._unreadable[image["image_id"]],) = image[SKIPPED].items()
                continue
            if "instances" not in output:
                raise ValueError(
                    f"{type(self).__name__} evaluates instances; the model gave {sorted(output)}"
                )
            assert self._files is not None
            instances = self._best(output["instances"]).to(self._cpu_device)
            detections = instances_to_coco_json(instances, image["image_id"])
            detections = [self._as_result(d) for d in detections if self._is_finite(d)]
            self._files.append(image["image_id"], detections, instances.has("pred_masks"))

    def _best(self, instances: Instances) -> Instances:
        """Detections that may be among the best of their classes."""
        if self._best_scores is None:
            return instances
        classes = instances.pred_classes.cpu().numpy()
        scores = instances.scores.detach().float().cpu().numpy()
        known = np.isfinite(scores) & (classes < len(self._best_scores.floors))
        kept = ~known  # refused or counted later, with a message
        floors = self._best_scores.floors
        kept[known] = self._best_scores.add(classes[known], scores[known])
        if self._best_scores.floors is not floors:
            self._tell_floors()
        return instances[torch.from_numpy(kept).to(instances.scores.device)]

    def _tell_floors(self) -> None:
        if self.when_floors_rise is not None and self._best_scores is not None:
            self.when_floors_rise(self._best_scores.floors)

    def look(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in the scores of a batch, as `process`, but keep no detection."""
        for image, output in zip(inputs, outputs, strict=True):
            if SKIPPED not in image:
                self._best(output["instances"])

    def keep_floors(self) -> None:
        """Begin the next evaluation with the least scores that all ranks have seen to count."""
        self._join_floors()
        assert self._best_scores is not None
        self._floors = self._best_scores.floors

    def _join_floors(self) -> None:
        def total(counts: np.ndarray) -> np.ndarray:
            return np.sum(comm.all_gather(counts), axis=0) if self._distributed else counts

        if self._best_scores is not None:
            self._best_scores.join(total)

    def evaluate(self, img_ids: list | None = None) -> dict[str, dict[str, float]]:
        """Evaluate what was processed.

        Args:
            img_ids: images to evaluate; None: all images of the file.

        Returns:
            On rank 0 {task: {metric: percent}}; elsewhere, and for a file without annotations, {}.
        """
        if self._files is None:
            self.reset()
        if self._skipped:
            logger.warning(f"{self._skipped} detections skipped: score or box is not finite")
        unreadable = self._unreadable
        self._drop_what_others_surpass()
        if self._distributed:
            comm.synchronize()
            unreadable = {k: v for own in comm.all_gather(unreadable) for k, v in own.items()}
        try:
            if self._distributed and not comm.is_main_process():
                return {}
            notes = self._left_out(unreadable)
            if self._best_scores is not None and self._best_scores.floors.any():
                notes.append(
                    "AP of the rules may be lower than in a plain evaluation: of each class only "
                    f"the best {self._per_class:,} detections are kept (TEST.DETECTIONS_PER_CLASS)"
                )
            if unreadable:
                every = self._truth.image_id.tolist() if img_ids is None else img_ids
                img_ids = [i for i in every if i not in unreadable]
            predictions, has_masks = self._merge()
        finally:
            self._files = self._floors = None
            # No rank may start its next evaluation in the same directory before the merge is done.
            if self._distributed:
                comm.synchronize()
        if not self._do_evaluation:
            logger.info(f"{self._dataset_name} has no annotations: predictions saved only")
            return {}
        if unreadable and not img_ids:
            logger.error(f"{self._dataset_name}: no image can be read; nothing is evaluated")
            return {}
        return self._report(predictions, self._tasks_of(has_masks), img_ids, notes)

    def _drop_what_others_surpass(self) -> None:
        """Rewrite this rank's file without detections that are not among the best any more."""
        if self._best_scores is None or self._files is None:
            return
        self._join_floors()
        floors = self._best_scores.floors.tolist()
        self._files.keep({c: floors[index] for index, c in self._category_ids.items()})

    def _left_out(self, unreadable: Mapping[int | str, tuple[str, str]]) -> list[str]:
        """Log and return what a reader of the figures must know of images that were not read."""
        if not unreadable:
            return []
        note = (
            f"{len(unreadable)} of {len(self._truth.image_id)} images of {self._dataset_name} "
            f"cannot be read and are left out: {listed_images(dict(unreadable.values()))}"
        )
        logger.warning(note)
        return [note]

    def _merge(self) -> tuple[Predictions, bool]:
        """Save all ranks' predictions as one file and read it; also whether there are masks."""
        assert self._files is not None
        ranks = list(range(comm.get_world_size())) if self._distributed else [comm.get_rank()]
        directory = self._output_dir or self._files.directory
        path = os.path.join(directory, f"predictions_{file_name_of(self._dataset_name)}.json")
        has_masks = False
        known = set(self._truth.image_id.tolist())
        for image_id, masks in self._files.heads(ranks):
            has_masks |= masks
            if image_id not in known:
                name = self._dataset_name
                raise ValueError(f"predictions for image {image_id!r}, which is not in {name}")
        self._files.write_results(ranks, path)
        predictions = read_predictions(path, self._truth)
        if not self._output_dir:
            if predictions.has_mask.any():
                predictions.load_masks()
            os.remove(path)
        self._files.remove(ranks)
        return predictions, has_masks

    def _report(
        self,
        predictions: Predictions,
        tasks: list[str],
        img_ids: list | None,
        notes: list[str],
    ) -> dict:
        lacking: list[str] = []
        grounds = {task: GroundTruth(self._truth, task, img_ids) for task in tasks}
        tasks = usable_tasks(grounds, tasks, lacking)
        if "boundary" in self._ap:
            if "segm" in tasks:
                grounds["boundary"] = grounds["segm"].for_task("boundary")
                tasks.append("boundary")
            else:
                lacking.append("boundary AP is not evaluated: it needs masks")
        own = ground_notes(self._truth, grounds, tasks) + lacking
        for note in own:
            logger.warning(note)
        notes = notes + own
        evaluation = figures(
            {task: grounds[task] for task in tasks},
            predictions,
            max_dets=self._max_dets,
            ap=self._ap,
            per_class=self._per_class,
            train="",
            counts=self._train_image_count,
            groups_of_file=self.federated,
            cuts=self._cuts,
            notes=notes,
            groups=self._groups,
            names=self._class_names(grounds[tasks[0]].class_ids),
            source=predictions.path if self._output_dir else "",
        ).evaluation
        for task, metrics in evaluation.results.items():
            logger.info(f"Evaluation results for {task}:\n{create_small_table(metrics)}")
        for reason in evaluation.notes[len(notes) :]:
            log_first_n(logging.WARNING, reason, key="message")
        instances = [r["instances"] for r in evaluation.classes.values()]
        if message := classes_without_truth(
            list(evaluation.classes), instances, self._dataset_name
        ):
            log_first_n(logging.WARNING, message, key="message")
        self.per_class = evaluation.classes
        if self._output_dir:
            name = file_name_of(self._dataset_name)
            write_per_class(self.per_class, os.path.join(self._output_dir, f"per_class_ap_{name}"))
            evaluation.write(os.path.join(self._output_dir, f"evaluation_{name}.json"))
        return copy.deepcopy(evaluation.results)

    def _tasks_of(self, has_masks: bool) -> list[str]:
        tasks = self._tasks or (TASKS if has_masks else TASKS[:1])
        if "segm" in tasks and not has_masks:
            logger.warning("segm is not evaluated: the model gives no masks")
            return [t for t in tasks if t != "segm"]
        return list(tasks)

    def _directory(self) -> str:
        if self._output_dir:
            return os.path.join(self._output_dir, f".{file_name_of(self._dataset_name)}")
        if not self._distributed:
            return tempfile.mkdtemp(prefix="d2_balance_")
        directory = tempfile.mkdtemp(prefix="d2_balance_") if comm.is_main_process() else None
        return comm.all_gather(directory)[0]

    def _category_ids_by_class_index(self) -> dict[int, int]:
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is not None:
            return {index: category for category, index in mapping.items()}
        ids = self._truth.category_id.tolist()
        # Without a mapping Detectron2's loaders subtract 1 from LVIS ids and count COCO ids.
        return {c - 1: c for c in ids} if self.federated else dict(enumerate(ids))

    def _as_result(self, detection: dict) -> dict:
        index = detection["category_id"]
        if index not in self._category_ids:
            raise ValueError(
                f"the model predicts class index {index}, but {self._dataset_name} has "
                f"{len(self._category_ids)} classes: check the model's number of classes"
            )
        return {**detection, "category_id": self._category_ids[index]}

    def _is_finite(self, detection: dict) -> bool:
        finite = all(map(math.isfinite, (detection["score"], *detection["bbox"])))
        finite = finite and min(detection["bbox"][2:]) >= 0
        self._skipped += not finite
        return finite

    def _class_names(self, class_ids: list[int]) -> list[str]:
        """Names as in training (`thing_classes`), else as in the file."""
        index = {c: i for i, c in self._category_ids.items()}
        known = dict(enumerate(self._metadata.get("thing_classes") or ()))
        in_file = self._truth.class_names
        return [known.get(index.get(c, -1)) or in_file[c] for c in class_ids]


class LVISGroupEvaluator(COCOGroupEvaluator):
    """LVIS metrics (federated, 300 detections per image) in a fraction of lvis-api's time.

    Federated rules (LVIS paper, 1908.03195): a detection of a class that is neither annotated nor
    listed in `neg_category_ids` of its image does not count; an unmatched detection of a class in
    `not_exhaustive_category_ids` does not count. The limit of detections per image is over all
    classes and comes first, so detections of unlisted classes use it up. Classes are grouped by
    the file's `frequency`; where it is missing by training counts. Equal to lvis 0.5.3.

    Args: as in `COCOGroupEvaluator`, but `max_dets` is per image over all classes, and the dataset
        must be a file (`json_file` in its metadata). `image_count` of the file's categories is
        taken for the training set's, as LVIS has it.
    """

    federated = True


def _read(path: str, name: str, federated: bool) -> tuple[Annotations, bool]:
    """The annotations, and whether there are any.

    A training must not end at what its loader let pass: two classes of one name get their ids in
    it, and a file without annotations is one of images to predict on.
    """
    try:
        truth, annotated = read_annotations(path), True
    except ValueError as error:
        try:
            data = read_json(path)
        except ValueError as broken:
            raise ValueError(f"dataset {name}: json_file is no JSON: {broken}") from broken
        annotated = "annotations" in data
        names = Counter(category_name(c) for c in data.get("categories", ()))
        if annotated and max(names.values(), default=1) == 1:
            raise ValueError(f"dataset {name}: {error}") from error
        categories = [
            {
                **c,
                "name": f"{category_name(c)} (id {c['id']})"
                if names[category_name(c)] > 1
                else category_name(c),
            }
            for c in data["categories"]
        ]
        data = {**data, "categories": categories, "annotations": data.get("annotations", [])}
        with tempfile.TemporaryDirectory(prefix="d2_balance_") as directory:
            copy_path = os.path.join(directory, os.path.basename(path))
            with open(copy_path, "w", encoding="utf-8") as file:
                json.dump(data, file)
            truth = read_annotations(copy_path)
    return dataclasses.replace(truth, name=name, path=path, federated=federated), annotated


_BY_GROUP = {"coco": COCOGroupEvaluator, "lvis": LVISGroupEvaluator}
_DETECTRON2: dict[str, Callable[[str, str], DatasetEvaluator]] = {
    "cityscapes_instance": lambda name, _: CityscapesInstanceEvaluator(name),
    "cityscapes_sem_seg": lambda name, _: CityscapesSemSegEvaluator(name),
    "coco_panoptic_seg": lambda name, directory: DatasetEvaluators(
        [
            SemSegEvaluator(name, output_dir=directory),
            COCOEvaluator(name, output_dir=directory),
            COCOPanopticEvaluator(name, directory),
        ]
    ),
    "pascal_voc": lambda name, _: PascalVOCDetectionEvaluator(name),
    "sem_seg": lambda name, directory: SemSegEvaluator(name, output_dir=directory),
}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Evaluator for a registered dataset, by the `evaluator_type` of its metadata.

    "lvis" and "coco" give the evaluators with AP by frequency group; the groups, where the file
    does not have them, are counted on cfg.DATASETS.TRAIN. Models with keypoints and other types of
    datasets get Detectron2's own evaluators.

    Args:
        cfg: config with DATASETS.TRAIN, MODEL.KEYPOINT_ON and OUTPUT_DIR.
        dataset_name: name in the MetadataCatalog.
        output_dir: directory for predictions and tables; None: OUTPUT_DIR/inference.

    Raises:
        ValueError: a type without evaluator, or TEST.EVAL_MAX_DETS or TEST.DETECTIONS_PER_CLASS
            below 0.
    """
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "coco" and cfg.MODEL.KEYPOINT_ON:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return COCOEvaluator(dataset_name, output_dir=output_dir, kpt_oks_sigmas=sigmas)
    if evaluator_type in _BY_GROUP:
        return _BY_GROUP[evaluator_type](
            dataset_name,
            output_dir=output_dir,
            max_dets=_max_dets(cfg),
            train_image_count=lambda: _train_counts(cfg),
            **_measures(cfg),
        )
    if evaluator_type in _DETECTRON2:
        return _DETECTRON2[evaluator_type](dataset_name, output_dir)
    raise ValueError(
        f"dataset {dataset_name!r} has evaluator_type {evaluator_type!r}; it must be one of "
        + ", ".join(sorted([*_BY_GROUP, *_DETECTRON2]))
    )


def _max_dets(cfg: CfgNode) -> int | None:
    limit = cfg.TEST.get("EVAL_MAX_DETS", 0)
    if limit < 0:
        raise ValueError(
            f"TEST.EVAL_MAX_DETS is {limit}; it must be 0 for the rules' own limit, or the number "
            "of detections that count"
        )
    return limit or None


def _measures(cfg: CfgNode) -> dict[str, Any]:
    """What TEST.BOUNDARY_AP and TEST.DETECTIONS_PER_CLASS ask of an evaluator."""
    ap = ("boundary",) if cfg.TEST.get("BOUNDARY_AP", False) else ()
    limit = cfg.TEST.get("DETECTIONS_PER_CLASS", 0)
    if limit < 0:
        raise ValueError(
            f"TEST.DETECTIONS_PER_CLASS is {limit}; it must be 0, or the number of detections of a "
            "class that count in AP-fixed"
        )
    if not limit:
        return {"ap": ap}
    return {"ap": (*ap, "fixed", "pool"), "per_class": limit, "keep_per_class": True}


def _train_counts(cfg: CfgNode) -> dict[str, int] | None:
    """Image count by class name on the training sets, or None where they cannot be read."""
    if "BALANCE" not in cfg.MODEL:
        logger.warning("no class counts: the config lacks MODEL.BALANCE (add_balance_config)")
        return None
    try:
        statistics = ClassCounts.from_config(cfg)
    except (OSError, KeyError, ValueError) as error:
        # Evaluating a checkpoint must be possible where the training set is not.
        logger.warning(f"no class counts of {tuple(cfg.DATASETS.TRAIN)}: {error}")
        return None
    counts = [int(n) for n in statistics.image_count]
    return dict(zip(statistics.class_names, counts, strict=True))
