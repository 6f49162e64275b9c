"""Detectron2's mapper with ignore regions, objects without a mask, and copy-paste."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.transforms import TransformList
from detectron2.structures import BoxMode, Instances

from .ignore_regions import FIELD

MASKED = "gt_has_mask"
"""Field of the objects of an image of which some have no mask: (M,) bool."""


class BalancedMapper(DatasetMapper):
    """DatasetMapper for training sets with ignore regions or with boxes that have no mask.

    - `ignore_boxes` of a record, (M, 4) corners in pixels, are moved with the image and cut at
      its border; regions outside are dropped. The result is a float32 tensor.
    - Objects without `segmentation`, in a model with masks, get their box in place of a mask and
      `gt_has_mask` False, by which the mask head leaves them out.

    Arguments as DatasetMapper.

    Attributes:
        copy_paste: changes a mapped record, given the classes of its objects; None changes nothing.
    """

    copy_paste: Callable[[dict[str, Any], Collection[int]], dict[str, Any]] | None = None

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As DatasetMapper; objects are pasted last."""
        record: dict[str, Any] = super().__call__(dataset_dict)
        if self.copy_paste is None or "instances" not in record:
            return record
        classes = {a["category_id"] for a in dataset_dict["annotations"]}
        return self.copy_paste(record, classes)

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        if FIELD in dataset_dict:
            dataset_dict[FIELD] = moved_boxes(dataset_dict[FIELD], transforms, image_shape)
        objects = [a for a in dataset_dict["annotations"] if not a.get("iscrowd", 0)]
        if self.recompute_boxes and not objects:
            self._without_objects(dataset_dict, transforms, image_shape)
            return
        bare = [a for a in objects if not a.get("segmentation")]
        if not self.use_instance_mask or not bare:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Detectron2 reads off the first object whether there are masks, so each kind goes alone
        parts = []
        with_mask = [a for a in objects if a.get("segmentation")]
        boxed = [annotation | {"segmentation": [rectangle(annotation)]} for annotation in bare]
        for part, has_mask in ((with_mask, True), (boxed, False)):
            if part:
                dataset_dict["annotations"] = part
                super()._transform_annotations(dataset_dict, transforms, image_shape)
                found = dataset_dict["instances"]
                found.set(MASKED, torch.full((len(found),), has_mask))
                parts.append(found)
        dataset_dict["instances"] = Instances.cat(parts)

    def _without_objects(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Leave the boxes of no object alone: Detectron2 would ask for masks that are not there."""
        plain = copy.copy(self)
        plain.recompute_boxes = False
        DatasetMapper._transform_annotations(plain, dataset_dict, transforms, image_shape)


def moved_boxes(
    boxes: Any, transforms: TransformList, image_shape: tuple[int, int]
) -> torch.Tensor:
    """Boxes that went through the transforms of their image.

    Args:
        boxes: (M, 4) corners in pixels.
        transforms: those of the image.
        image_shape: (height, width) after them.

    Returns:
        (M', 4) float32, cut at the border; boxes of which nothing is left are dropped.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if len(boxes):
        boxes = transforms.apply_box(boxes)
    height, width = image_shape
    boxes = np.clip(boxes, 0, [width, height, width, height])
    left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return torch.as_tensor(boxes[left], dtype=torch.float32)


def rectangle(annotation: dict[str, Any]) -> list[float]:
    """The box of an annotation as a polygon x0, y0, x1, y0, x1, y1, x0, y1."""
    x0, y0, x1, y1 = BoxMode.convert(
        [float(x) for x in annotation["bbox"]], annotation["bbox_mode"], BoxMode.XYXY_ABS
    )
    return [x0, y0, x1, y0, x1, y1, x0, y1]
