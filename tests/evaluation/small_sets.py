"""Small datasets that hold all that the rules speak of, and the figures of the official code."""

import contextlib
import copy
import io

import numpy as np
import pycocotools.mask as mask_util
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HEIGHT, WIDTH = 40, 50
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def rle(mask):
    found = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def box_mask(box, rng=None):
    """The box's pixels; with a generator some of its rows are missing."""
    x, y, w, h = (round(v) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[max(y, 0) : y + h, max(x, 0) : x + w] = True
    if rng is not None and rng.random() < 0.5:
        mask[max(y, 0) :: 3] = False
    return mask


def with_broken(rng, dataset):
    """Give some objects an empty mask, a flat polygon or a box without area."""
    for ann in dataset["annotations"]:
        x, y, w, h = ann["bbox"]
        form = rng.random()
        if form < 0.1:
            ann["segmentation"] = rle(np.zeros((HEIGHT, WIDTH), bool))
            ann["area"] = float(rng.choice([0, ann["area"]]))
        elif form < 0.2:
            ann["segmentation"] = [[x, y, x + w, y + h, x, y]]
        elif form < 0.3:
            ann["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        elif form < 0.35:
            ann["bbox"] = [x, y, 0, h]
    return dataset


def small_dataset(rng, lvis):
    """Up to 4 images and 4 classes, with crowds, ignored objects, areas of 0 and empty classes."""
    classes = int(rng.integers(1, 5))
    ids = sorted(rng.choice(20, classes, replace=False).tolist())
    images, annotations = [], []
    for n in rng.permutation(int(rng.integers(1, 5))).tolist():
        image = {"id": 10 + 3 * n, "height": HEIGHT, "width": WIDTH, "file_name": f"{n}.jpg"}
        present = set()
        for _ in range(int(rng.integers(0, 6))):
            box = _box(rng)
            if annotations and rng.random() < 0.15:
                box = annotations[-1]["bbox"]  # two objects in one place
            category = int(rng.choice(ids[: max(1, classes - 1)]))
            ann = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": category,
                "bbox": box,
                "area": float(box[2] * box[3]),
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": rle(box_mask(box, rng)),
            }
            if rng.random() < 0.15:
                ann["ignore"] = 1
            if rng.random() < 0.1:
                ann["area"] = 0
            elif rng.random() < 0.2:
                ann["area"] = float(rng.choice([500.0, 1024.0, 5000.0, 9216.0, 20000.0]))
            annotations.append(ann)
            present.add(category)
        if lvis:
            absent = [c for c in ids if c not in present]
            image["neg_category_ids"] = [c for c in absent if rng.random() < 0.5]
            image["not_exhaustive_category_ids"] = [c for c in ids if rng.random() < 0.2]
        images.append(image)
    categories = [{"id": c, "name": f"class {c}"} for c in ids]
    for category in categories if lvis else ():
        category["frequency"] = str(rng.choice(list("rcf")))
    return {"images": images, "annotations": annotations, "categories": categories}


def _box(rng):
    w, h = (int(v) for v in rng.integers(2, 25, 2))
    return [int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h)), w, h]


def small_detections(rng, dataset):
    """Objects moved or exact, other classes, noise, ties, boxes without area and empty masks."""
    ids = [c["id"] for c in dataset["categories"]]
    found = []
    for ann in dataset["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            moved = np.array(ann["bbox"]) + rng.integers(-3, 4, 4) * (rng.random() < 0.7)
            moved[2:] = moved[2:].clip(1)
            category = ann["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
            found.append((ann["image_id"], category, moved.clip(0).tolist()))
    for image in dataset["images"]:
        for _ in range(int(rng.integers(0, 5))):
            box = _box(rng)
            if rng.random() < 0.15:
                box[2] = 0
            found.append((image["id"], int(rng.choice(ids)), box))
    detections = []
    for at in rng.permutation(len(found)).tolist():
        image, category, box = found[at]
        mask = rle(box_mask(box, rng))
        if rng.random() < 0.08:
            mask = rle(np.zeros((HEIGHT, WIDTH), bool))
        detections.append(
            {
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "score": round(float(rng.random()), 1),
                "segmentation": mask,
            }
        )
    return detections


def official(dataset, detections, task, lvis, max_dets):
    """Metrics in percent by the official code, NaN where it says -1, and (T, R, K, A) precision."""
    detections = copy.deepcopy(detections)
    for detection in detections:
        detection.pop("segmentation" if task == "bbox" else "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        if lvis:
            return _lvis(copy.deepcopy(dataset), detections, task, max_dets)
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        results = truth.loadRes(detections) if detections else COCO()
        if not detections:
            results.dataset = {**truth.dataset, "annotations": []}
            results.createIndex()
        evaluator = COCOeval(truth, results, task)
        evaluator.params.maxDets = [max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0]
    return _metrics(precision, dataset), precision


def _lvis(dataset, detections, task, max_dets):
    truth = LVIS.__new__(LVIS)
    import logging

    truth.logger = logging.getLogger("lvis")
    truth.logger.setLevel(logging.ERROR)
    truth.dataset = dataset
    truth._create_index()
    evaluator = LVISEval(truth, LVISResults(truth, detections, max_dets=max_dets), task)
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"]
    order = np.argsort(evaluator.params.cat_ids, kind="stable")
    return _metrics(precision[:, :, order], dataset), precision[:, :, order]


def _metrics(precision, dataset):
    letters = [c.get("frequency") for c in sorted(dataset["categories"], key=lambda c: c["id"])]

    def mean(values):
        values = values[values > -1]
        return values.mean() * 100 if len(values) else np.nan

    figures = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0])}
    figures["AP75"] = mean(precision[5, ..., 0])
    for n, size in enumerate("sml", start=1):
        figures[f"AP{size}"] = mean(precision[..., n])
    for letter in "rcf":
        member = [k for k, own in enumerate(letters) if own == letter]
        figures[f"AP{letter}"] = mean(precision[:, :, member, 0])
    return figures
