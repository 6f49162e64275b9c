"""Made-up annotation files and detections, and Detectron2 outputs that carry them."""

import itertools
import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

_NUMBER = itertools.count()


def _polygon(rng, x, y, w, h):
    """An octagon in the box, its corners moved at random; its mask is not the box."""
    angle = np.arange(8) * np.pi / 4
    radius = rng.uniform(0.7, 1.0, 8)
    px = np.clip(x + w / 2 * (1 + radius * np.cos(angle)), x, x + w)
    py = np.clip(y + h / 2 * (1 + radius * np.sin(angle)), y, y + h)
    return [np.stack([px, py], axis=1).reshape(-1).tolist()]


def make_dataset(rng, num_classes=60, num_images=60, lvis=True, first_id=1, step=1):
    """A COCO- or LVIS-style file: small and large objects, listed absences, classes unseen."""
    ids = [first_id + step * k for k in range(num_classes)]
    # The last three classes are never annotated, so their AP is undefined.
    weight = 1 / np.arange(1, num_classes - 2)
    images, annotations = [], []
    for n in range(num_images):
        image = {"id": 1000 - 7 * n, "height": 120, "width": 160, "file_name": f"{n}.jpg"}
        count = int(rng.integers(0, 14))
        classes = rng.choice(num_classes - 3, count, p=weight / weight.sum())
        for k in classes:
            w, h = np.minimum(np.exp(rng.uniform(1.5, 5.2, 2)), (150, 110))
            x, y = rng.uniform(0, 160 - w), rng.uniform(0, 120 - h)
            ann = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": ids[k],
                "bbox": [x, y, w, h],
                "area": w * h * 0.7,
                "segmentation": _polygon(rng, x, y, w, h),
            }
            if not lvis:
                ann["iscrowd"] = int(rng.random() < 0.1)
            annotations.append(ann)
        present = sorted({ids[k] for k in classes})
        if lvis:
            absent = [c for c in ids if c not in present]
            image["neg_category_ids"] = rng.choice(
                absent, min(8, len(absent) // 2), replace=False
            ).tolist()
            image["not_exhaustive_category_ids"] = [c for c in present if rng.random() < 0.2]
        images.append(image)
    categories = [{"id": c, "name": f"class{c}"} for c in ids]
    if lvis:
        for k, category in enumerate(categories):
            frequency = "fcr"[min(3 * k // num_classes, 2)]
            category |= {
                "frequency": frequency,
                "image_count": {"f": 200, "c": 50, "r": 5}[frequency],
            }
    return {"images": images, "annotations": annotations, "categories": categories}


def make_detections(rng, dataset, crowded_image=None):
    """Ground truth moved a little, some of it under another class, and noise; scores with ties."""
    ids = [c["id"] for c in dataset["categories"]]
    by_image = defaultdict(list)
    for ann in dataset["annotations"]:
        if rng.random() < 0.15:
            continue
        x, y, w, h = ann["bbox"]
        box = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.06, 4) * (w, h, w, h)
        category = ann["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
        by_image[ann["image_id"]].append((box, category, round(float(rng.random()), 2)))
    for image in dataset["images"]:
        noise = 450 if image["id"] == crowded_image else int(rng.integers(0, 10))
        few = ids[:4] if image["id"] == crowded_image else ids
        for _ in range(noise):
            x, y = rng.uniform(0, 120), rng.uniform(0, 80)
            box = np.array([x, y, x + rng.uniform(3, 40), y + rng.uniform(3, 40)])
            score = round(float(rng.random() ** 2), 2)
            by_image[image["id"]].append((box, int(rng.choice(few)), score))
    return by_image


def to_outputs(dataset, detections, class_index, masks):
    """Pairs of Detectron2 inputs and outputs, one per image."""
    for image in dataset["images"]:
        found = detections.get(image["id"], [])
        size = (image["height"], image["width"])
        boxes = torch.tensor(np.array([d[0] for d in found]), dtype=torch.float32).reshape(-1, 4)
        instances = Instances(size)
        instances.pred_boxes = Boxes(boxes)
        instances.pred_boxes.clip(size)
        instances.scores = torch.tensor([d[2] for d in found], dtype=torch.float32)
        instances.pred_classes = torch.tensor([class_index[d[1]] for d in found]).long()
        if masks:
            # An ellipse in the box, so that mask and box differ in area and overlap.
            x0, y0, x1, y1 = instances.pred_boxes.tensor[:, :, None, None].unbind(1)
            yy, xx = torch.meshgrid(*map(torch.arange, size), indexing="ij")
            rx, ry = (x1 - x0).clamp(min=1) / 2, (y1 - y0).clamp(min=1) / 2
            inside = ((xx - (x0 + x1) / 2) / rx) ** 2 + ((yy - (y0 + y1) / 2) / ry) ** 2 <= 1
            instances.pred_masks = inside
        yield {"image_id": image["id"]}, {"instances": instances}


class Sets:
    """Writes annotation files and registers them under names of their own."""

    make_dataset = staticmethod(make_dataset)
    make_detections = staticmethod(make_detections)

    def __init__(self, directory):
        self.directory = directory

    def register(self, dataset, evaluator_type, name=None):
        name = name or f"evaluation_test_{next(_NUMBER)}"
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(dataset))
        ids = sorted(c["id"] for c in dataset["categories"])
        names = {c["id"]: c["name"] for c in dataset["categories"]}
        MetadataCatalog.get(name).set(
            json_file=str(path),
            evaluator_type=evaluator_type,
            thing_classes=[names[c] for c in ids],
            thing_dataset_id_to_contiguous_id={c: k for k, c in enumerate(ids)},
        )
        return name

    @staticmethod
    def feed(evaluator, dataset, detections, masks=False):
        """reset, process in batches of two, evaluate."""
        ids = sorted(c["id"] for c in dataset["categories"])
        pairs = list(to_outputs(dataset, detections, {c: k for k, c in enumerate(ids)}, masks))
        evaluator.reset()
        for i in range(0, len(pairs), 2):
            evaluator.process(*zip(*pairs[i : i + 2], strict=True))
        return evaluator.evaluate()


@pytest.fixture
def sets(tmp_path):
    return Sets(tmp_path)


@pytest.fixture
def rng():
    return np.random.default_rng(20)
