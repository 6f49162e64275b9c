"""Detectron2 evaluators that report AP by frequency group and by class.

Both keep Detectron2's interface (`reset`, `process`, `evaluate`) and the layout of its results,
{"bbox": {"AP": ..}, "segm": {..}} in percent. They differ in the engine (faster-coco-eval), in what
they say without ground truth (NaN and the reason, never -1), in empty predictions (AP 0) and in
memory (every rank writes its own file; nothing is gathered).
"""

import copy
import json
import logging
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping

import detectron2.utils.comm as comm
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.logger import create_small_table, log_first_n

from d2_balance.data import bad_annotations
from d2_balance.data.unreadable import SKIPPED, listed_images
from d2_balance.utils.progress import progress

from .average_precision import APTable, GroundTruth, average_precision
from .files import RankPredictions, file_name_of
from .groups import (
    TrainCounts,
    check_groups,
    group_metrics,
    log_classes_without_truth,
    resolve_groups,
    training_counts,
)
from .per_class import class_records, write_per_class
from .record import Evaluation

TASKS = ("bbox", "segm")

logger = logging.getLogger(__name__)


class COCOGroupEvaluator(COCOEvaluator):
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

    Raises:
        ValueError: unknown task or group, `max_dets` below 1, or a file that is no JSON.
    """

    federated = False
    default_max_dets = 100

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
    ):
        if tasks is not None and not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks {tuple(tasks)}: allowed are {TASKS}")
        max_dets = self.default_max_dets if max_dets is None else max_dets
        if max_dets < 1:
            raise ValueError(f"max_dets must be at least 1, got {max_dets}")
        check_groups(groups)
        if self.federated and not hasattr(MetadataCatalog.get(dataset_name), "json_file"):
            raise ValueError(
                f"dataset {dataset_name}: LVIS evaluation reads the image-level labels from its "
                "file; the metadata must name it as json_file"
            )
        try:
            super().__init__(dataset_name, tasks, distributed, output_dir, use_fast_impl=False)
        except json.JSONDecodeError as error:
            raise ValueError(f"dataset {dataset_name}: json_file is no JSON: {error}") from error
        self.per_class: dict[str, dict] = {}
        self._dataset_name = dataset_name
        self._max_dets = max_dets
        self._groups = groups
        self._train_image_count = train_image_count
        self._cuts = cuts
        self._files = None

    def reset(self) -> None:
        """Forget all predictions."""
        self._files = RankPredictions(self._directory(), comm.get_rank())
        self._category_ids = self._category_ids_by_class_index()
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
            instances = output["instances"].to(self._cpu_device)
            detections = instances_to_coco_json(instances, image["image_id"])
            detections = [self._as_result(d) for d in detections if self._is_finite(d)]
            self._files.append(image["image_id"], detections, instances.has("pred_masks"))

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
        if self._distributed:
            comm.synchronize()
            unreadable = {k: v for own in comm.all_gather(unreadable) for k, v in own.items()}
        try:
            if self._distributed and not comm.is_main_process():
                return {}
            notes = self._left_out(unreadable)
            if unreadable:
                every = self._coco_api.imgs if img_ids is None else img_ids
                img_ids = [i for i in every if i not in unreadable]
            if unreadable and not img_ids:
                logger.error(f"{self._dataset_name}: no image can be read; nothing is evaluated")
                return {}
            truth = self._ground_truth(img_ids)
            detections, has_masks = self._merge(truth)
        finally:
            self._files = None
            # No rank may start its next evaluation in the same directory before the merge is done.
            if self._distributed:
                comm.synchronize()
        if not self._do_evaluation:
            logger.info(f"{self._dataset_name} has no annotations: predictions saved only")
            return {}
        tables = {
            task: average_precision(truth, detections, task, self._max_dets)
            for task in self._tasks_of(truth, has_masks)
        }
        return self._report(truth, tables, notes)

    def _left_out(self, unreadable: Mapping[int | str, tuple[str, str]]) -> list[str]:
        """Log and return what a reader of the figures must know of images that were not read."""
        if not unreadable:
            return []
        note = (
            f"{len(unreadable)} of {len(self._coco_api.imgs)} images of {self._dataset_name} cannot "
            f"be read and are left out: {listed_images(dict(unreadable.values()))}"
        )
        logger.warning(note)
        return [note]

    def _ground_truth(self, img_ids: list | None) -> GroundTruth:
        report = bad_annotations(self._dataset_name)
        skip = {i for ids in report.skipped.values() for i in ids} if report else set()
        if skip:
            logger.warning(f"{len(skip)} bad annotations of {self._dataset_name} not evaluated")
        dataset = self._coco_api.dataset
        if self.federated and not any(i.get("neg_category_ids") for i in dataset["images"]):
            logger.warning(
                f"{self._dataset_name} lists no absent classes (neg_category_ids): detections "
                "count only where their class is annotated"
            )
        return GroundTruth(dataset, self._dataset_name, self.federated, img_ids, skip)

    def _merge(self, truth: GroundTruth) -> tuple[dict[int | str, list[dict]], bool]:
        """Save all ranks' predictions and return those that can count, by image."""
        ranks = list(range(comm.get_world_size())) if self._distributed else [comm.get_rank()]
        if self._output_dir:
            name = f"predictions_{file_name_of(self._dataset_name)}.json"
            self._files.write_results(ranks, os.path.join(self._output_dir, name))
        detections, has_masks, self._found = {}, False, 0
        lines = self._files.read(ranks)
        for image_id, masks, found in progress(lines, "reading predictions"):
            has_masks |= masks
            self._found += len(found)
            if image_id not in self._coco_api.imgs:
                name = self._dataset_name
                raise ValueError(f"predictions for image {image_id!r}, which is not in {name}")
            if image_id in truth.image_index:
                detections[image_id] = truth.select(image_id, found, self._max_dets)
        self._files.remove(ranks)
        return detections, has_masks

    def _report(self, truth: GroundTruth, tables: dict[str, APTable], notes: list[str]) -> dict:
        names = self._class_names(truth.class_ids)
        in_file = [self._coco_api.cats[c] for c in truth.class_ids] if self.federated else []
        counts = training_counts(names, self._train_image_count, in_file, self._dataset_name)
        groups = resolve_groups(names, self._groups, in_file, counts, self._cuts)
        self._results = OrderedDict()
        for task, table in tables.items():
            metrics, reasons = group_metrics(table, groups, self._dataset_name)
            self._results[task] = metrics
            logger.info(f"Evaluation results for {task}:\n{create_small_table(metrics)}")
            notes += [reason for reason in reasons if reason not in notes]
            for reason in reasons:
                log_first_n(logging.WARNING, reason, key="message")
        instances = [truth.instance_count(c) for c in truth.class_ids]
        log_classes_without_truth(names, instances, self._dataset_name)
        self.per_class = class_records(truth.class_ids, names, groups, counts, instances, tables)
        if self._output_dir:
            name = file_name_of(self._dataset_name)
            write_per_class(self.per_class, os.path.join(self._output_dir, f"per_class_ap_{name}"))
            figures = Evaluation(
                dataset=self._dataset_name,
                train="",
                rules="lvis" if self.federated else "coco",
                max_dets=self._max_dets,
                images=len(truth.images),
                detections=self._found,
                results=dict(self._results),
                classes=self.per_class,
                notes=notes,
            )
            figures.write(os.path.join(self._output_dir, f"evaluation_{name}.json"))
        return copy.deepcopy(self._results)

    def _tasks_of(self, truth: GroundTruth, has_masks: bool) -> list[str]:
        tasks = self._tasks or (TASKS if has_masks else TASKS[:1])
        if "segm" in tasks and not has_masks:
            logger.warning("segm is not evaluated: the model gives no masks")
            return [t for t in tasks if t != "segm"]
        if "segm" in tasks and truth.without_mask:
            logger.warning(
                f"segm is not evaluated: {len(truth.without_mask)} annotations of "
                f"{self._dataset_name} have no segmentation, the first is {truth.without_mask[0]}"
            )
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
        ids = sorted(self._coco_api.cats)
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
        self._skipped += not finite
        return finite

    def _class_names(self, class_ids: list[int]) -> list[str]:
        """Names as in training (`thing_classes`), else as in the file."""
        index = {c: i for i, c in self._category_ids.items()}
        known = dict(enumerate(self._metadata.get("thing_classes") or ()))
        in_file = self._coco_api.cats
        return [known.get(index.get(c)) or str(in_file[c].get("name", c)) for c in class_ids]


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
    default_max_dets = 300
