"""Average precision by class, size and IoU threshold, with faster-coco-eval as the engine.

T: IoU thresholds, K: classes, A: size ranges, G: ground truths, D: detections.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api
from tqdm import tqdm

SIZES = ("all", "small", "medium", "large")
"""Size ranges of COCO and LVIS: areas below 32*32, up to 96*96, and above, in square pixels."""

_PAIR_LIMIT = 50_000
"""(image, class) pairs evaluated at once. The engine spends memory and time on empty pairs too: the
24 million pairs of LVIS validation at once would take gigabytes. Few classes at a time leave out
the images that show none of them. On 5,000 images and 1,203 classes: 14 s with 1,000,000, 4 s with
50,000, 10,000 or 1."""


@dataclass(frozen=True)
class APTable:
    """Average precision in [0, 1]; NaN where a class has no ground truth of a size.

    Attributes:
        class_ids: (K,) category ids of the file, ascending.
        values: (T, K, A) float64, sizes in the order of `SIZES`.
        iou_thresholds: (T,) float64, .5 to .95 in steps of .05.
    """

    class_ids: list[int]
    values: np.ndarray
    iou_thresholds: np.ndarray

    def by_class(self, iou: float | None = None, size: str = "all") -> np.ndarray:
        """(K,) AP of each class, at one IoU threshold or as the mean over all of them."""
        values = self.values[:, :, SIZES.index(size)]  # (T, K)
        if iou is not None:
            values = values[np.isclose(self.iou_thresholds, iou)]
        return values.mean(axis=0)


class GroundTruth:
    """Annotations of a COCO or LVIS file, indexed by class for the engine.

    Images and annotations get ids of their own from 1: the engine takes an annotation of id 0 for
    "no match", and image ids may be strings. Images keep the order of their ids, because that
    order decides between detections of equal score in pycocotools and lvis.

    Args:
        dataset: content of the JSON file.
        source: name of the file or dataset, for messages.
        federated: True for LVIS rules: detections of classes that are neither annotated nor
            listed as absent in their image are dropped, unmatched detections of classes listed as
            not exhaustive are ignored, and `iscrowd` means nothing.
        image_ids: images to evaluate; all where None.
        skip: ids of annotations to leave out.

    Raises:
        ValueError: an annotation without box.
    """

    def __init__(self, dataset: dict, source: str, federated: bool, image_ids=None, skip=()):
        self.federated = federated
        self.class_ids = sorted({c["id"] for c in dataset["categories"]})
        wanted = None if image_ids is None else set(image_ids)
        images = [i for i in dataset["images"] if wanted is None or i["id"] in wanted]
        images = sorted(images, key=lambda i: (isinstance(i["id"], str), i["id"]))
        self.images = {n: {**image, "id": n} for n, image in enumerate(images, start=1)}
        self.image_index = {image["id"]: n for n, image in enumerate(images, start=1)}
        self.annotations: dict[int, list[dict]] = defaultdict(list)
        self._listed = {n: set(i.get("neg_category_ids", ())) for n, i in self.images.items()}
        known = set(self.class_ids)
        no_mask = []
        for ann in dataset.get("annotations", ()):
            if ann["category_id"] not in known or ann["image_id"] not in self.image_index:
                continue
            if ann.get("id") in skip:
                continue
            if len(ann.get("bbox") or ()) != 4:
                raise ValueError(
                    f"{source}: annotation {ann.get('id')} has no bbox [x, y, width, height]"
                )
            if not ann.get("segmentation"):
                no_mask.append(ann.get("id"))
            index = self.image_index[ann["image_id"]]
            self._listed[index].add(ann["category_id"])
            self.annotations[ann["category_id"]].append({**ann, "image_id": index})
        self.without_mask = no_mask

    def instance_count(self, class_id: int) -> int:
        """Ground truths of a class, crowds (COCO) and ignored ones (LVIS) not counted."""
        flag = "ignore" if self.federated else "iscrowd"
        return sum(not a.get(flag) for a in self.annotations.get(class_id, ()))

    def select(self, image_id: int | str, detections: list[dict], max_dets: int) -> list[dict]:
        """Detections of one image that can count, best first where the limit cuts.

        LVIS limits the detections of an image over all classes, and before it drops those of
        classes whose presence is unknown (lvis-api, `limit_dets_per_image`). COCO
        limits them per class, which the engine does.
        """
        if not self.federated:
            return detections
        if len(detections) > max_dets:
            detections = sorted(detections, key=lambda d: d["score"], reverse=True)[:max_dets]
        listed = self._listed[self.image_index[image_id]]
        return [d for d in detections if d["category_id"] in listed]

    def engine_annotation(self, ann: dict, number: int, iou_type: str) -> dict:
        """One ground truth as the engine wants it."""
        size = self.images[ann["image_id"]]
        record = {
            "id": number,
            "image_id": ann["image_id"],
            "category_id": ann["category_id"],
            "bbox": ann["bbox"],
            "iscrowd": 0 if self.federated else int(ann.get("iscrowd", 0)),
            "area": ann.get("area"),
        }
        if iou_type == "segm":
            record["segmentation"] = ann["segmentation"]
        if record["area"] is None and iou_type == "segm":
            rle = mask_api.segmToRle(ann["segmentation"], size["width"], size["height"])
            record["area"] = float(mask_api.area(rle))
        elif record["area"] is None:
            record["area"] = float(ann["bbox"][2] * ann["bbox"][3])
        if self.federated and ann.get("ignore"):
            # The engine overwrites `ignore`; an area outside every size range has its effect.
            record["area"] = -1.0
        return record


def average_precision(
    truth: GroundTruth,
    detections: dict[int | str, list[dict]],
    iou_type: str,
    max_dets: int,
    pair_limit: int = _PAIR_LIMIT,
) -> APTable:
    """Evaluate detections; equal to pycocotools, or to lvis where `truth.federated`.

    Args:
        truth: the ground truth.
        detections: COCO results (`category_id`, `bbox` in XYWH, `score`, `segmentation` as RLE for
            masks) by image id, as `GroundTruth.select` leaves them.
        iou_type: "bbox" or "segm".
        max_dets: detections per image and class that count (COCO: 100).
        pair_limit: (image, class) pairs evaluated at once; bounds the memory, not the result.

    Raises:
        ValueError: detections of an image that the ground truth does not have.
    """
    by_class = defaultdict(list)
    for image_id, found in detections.items():
        if image_id not in truth.image_index:
            raise ValueError(f"detections of image {image_id!r}, which the ground truth lacks")
        for detection in found:
            by_class[detection["category_id"]].append((truth.image_index[image_id], detection))

    step = max(1, pair_limit // max(1, len(truth.images)))
    chunks = [truth.class_ids[i : i + step] for i in range(0, len(truth.class_ids), step)]
    parts = []
    for ids in tqdm(chunks, desc=f"evaluating {iou_type}", delay=2, disable=None):
        parts.append(_evaluate_classes(truth, by_class, ids, iou_type, max_dets))
    thresholds = COCOeval_faster(iouType=iou_type).params.iouThrs
    values = np.concatenate(parts, axis=1) if parts else np.zeros((len(thresholds), 0, len(SIZES)))
    return APTable(truth.class_ids, values, thresholds)


def _evaluate_classes(
    truth: GroundTruth, by_class: dict, ids: list[int], iou_type: str, max_dets: int
) -> np.ndarray:
    """(T, K, A) AP of the classes `ids`; NaN without ground truth."""
    anns = [a for c in ids for a in truth.annotations.get(c, ())]
    gts = [truth.engine_annotation(a, n, iou_type) for n, a in enumerate(anns, start=1)]
    dts = [_engine_detection(i, d, iou_type) for c in ids for i, d in by_class.get(c, ())]
    for number, detection in enumerate(dts, start=1):
        detection["id"] = number
    # Images without either add nothing to these classes, only (image, class) pairs.
    numbers = sorted({g["image_id"] for g in gts} | {d["image_id"] for d in dts})
    evaluator = COCOeval_faster(iouType=iou_type)
    shape = (len(evaluator.params.iouThrs), len(ids), len(SIZES))
    if not gts:
        return np.full(shape, np.nan)

    images = [truth.images[n] for n in numbers]
    # The engine asks for `frequency` in LVIS style; groups are formed outside of it.
    categories = [{"id": c, "name": str(c), "frequency": "f"} for c in ids]
    gt = COCO({"images": images, "annotations": gts, "categories": categories})
    dt = COCO({"images": images, "annotations": dts, "categories": categories})
    evaluator = COCOeval_faster(
        gt, dt, iou_type, print_function=lambda *_: None, lvis_style=truth.federated
    )
    evaluator.params.maxDets = [max_dets]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0]  # (T, recalls, K, A), -1: no ground truth
    return np.where(precision.min(axis=1) < 0, np.nan, precision.mean(axis=1))


def _engine_detection(image_index: int, detection: dict, iou_type: str) -> dict:
    record = {
        "image_id": image_index,
        "category_id": detection["category_id"],
        "score": detection["score"],
        "iscrowd": 0,
    }
    if iou_type == "segm":
        # Size ranges of masks go by the mask's area, not the box's.
        record["segmentation"] = detection["segmentation"]
        record["area"] = float(mask_api.area(detection["segmentation"]))
    else:
        record["bbox"] = detection["bbox"]
        record["area"] = float(detection["bbox"][2] * detection["bbox"][3])
    return record
