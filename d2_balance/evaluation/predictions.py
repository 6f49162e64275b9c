"""Prediction files in the result format of COCO and LVIS, checked before they are evaluated."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from d2_balance.data.rle import all_fill, rle_problem
from d2_balance.utils.files import read_json

FIELDS = ("image_id", "category_id", "score")
_SHOWN = 5
_MASKS = 128  # masks whose runs are checked together

Detections = dict[int | str, list[dict[str, Any]]]


def read_predictions(path: str, truth: Mapping[str, Any], source: str) -> Detections:
    """Detections of a JSON file by image id; an empty list of them is valid.

    A detection has `image_id`, `category_id`, `score`, and `bbox` (x, y, width, height in pixels)
    or `segmentation` (RLE of the image's size), or both.

    Args:
        path: the file, a JSON list.
        truth: content of the annotation file the detections are for.
        source: its name, for messages.

    Raises:
        ValueError: with file, number of the detection and remedy: a file that is empty, cut off or
            no list; a field that is missing; a score or box that is not finite; a box of negative
            size; a mask of another size than its image; images or classes that `truth` lacks.
    """
    found = read_json(path)
    if not isinstance(found, list):
        raise ValueError(
            f"{path}: predictions must be a list of detections, not a {type(found).__name__}; "
            "an annotation file is given with --dataset"
        )
    check_predictions(found, truth, path, source)
    by_image = defaultdict(list)
    for detection in found:
        by_image[detection["image_id"]].append(detection)
    return dict(by_image)


def check_predictions(
    found: Sequence[Any], truth: Mapping[str, Any], path: str, source: str
) -> None:
    """Check every detection of a list; arguments and errors as in `read_predictions`."""
    checks = PredictionChecks(truth["images"], truth["categories"], path, source)
    for detection in tqdm(found, "checking detections", delay=2, disable=None):
        checks.add(detection)
    checks.finish()


class PredictionChecks:
    """Checks detections one by one, and reports foreign images and classes at the end.

    Args:
        images: `images` of the annotation file the detections are for.
        categories: `categories` of the file whose classes they have.
        path: the file of the detections, for messages.
        source: name of the annotation file; `class_source` that of the categories, if another.
    """

    def __init__(
        self,
        images: Sequence[Mapping],
        categories: Sequence[Mapping],
        path: str,
        source: str,
        class_source: str = "",
    ):
        self.path, self.source, self.class_source = path, source, class_source or source
        self.sizes = {i["id"]: (i.get("height"), i.get("width")) for i in images}
        self.classes = {c["id"] for c in categories}
        self.count = 0
        self._foreign: list = []
        self._unknown: list = []
        self._masks: list[tuple[int, Mapping]] = []

    def add(self, detection: Any) -> None:
        """Check one detection.

        Raises:
            ValueError: with its number, where its form is wrong, or the runs of a mask some hundred
                detections before.
        """
        problem = _problem(detection, self.sizes)
        if problem:
            raise ValueError(f"{self.path}: detection {self.count}: {problem}")
        if detection.get("segmentation") is not None:
            self._masks.append((self.count, detection["segmentation"]))
            if len(self._masks) == _MASKS:
                self._check_masks()
        if detection["image_id"] not in self.sizes:
            self._foreign.append(detection["image_id"])
        elif detection["category_id"] not in self.classes:
            self._unknown.append(detection["category_id"])
        self.count += 1

    def _check_masks(self) -> None:
        masks, self._masks = self._masks, []
        counts = [mask["counts"] for _, mask in masks]
        if not masks or all_fill(counts, [mask["size"][0] * mask["size"][1] for _, mask in masks]):
            return
        for number, mask in masks:
            if problem := rle_problem(mask["counts"], mask["size"]):
                raise ValueError(f"{self.path}: detection {number}: the mask is no RLE: {problem}")

    def finish(self) -> None:
        """Raise ValueError where runs of masks are wrong, or images or classes not the files'."""
        self._check_masks()
        if self._foreign:
            raise ValueError(
                f"{self.path}: {len(self._foreign):,} of {self.count:,} detections are of "
                f"{len(set(self._foreign)):,} images that {self.source} does not have, ids "
                f"{_some(self._foreign)}; give the dataset that these predictions were made for"
            )
        if self._unknown:
            raise ValueError(
                f"{self.path}: {len(self._unknown):,} of {self.count:,} detections have a "
                f"category_id that {self.class_source} does not have: {_some(self._unknown)}; it "
                "must be the id of the annotation file's 'categories' "
                f"({min(self.classes)} to {max(self.classes)}), not the model's class index"
            )


def _problem(detection: Any, sizes: Mapping) -> str:
    """What is wrong with one detection, "" if nothing."""
    if not isinstance(detection, dict):
        return f"{detection!r} is no object"
    for field in FIELDS:
        if field not in detection:
            return f"lacks {field!r}; needed are {', '.join(FIELDS)} and bbox or segmentation"
        if isinstance(detection[field], list | dict):
            return f"{field!r} is {detection[field]!r}; it must be a number or, for ids, a text"
    if not _is_number(detection["score"]):
        return f"score is {detection['score']!r}; it must be a finite number"
    box, mask = detection.get("bbox"), detection.get("segmentation")
    if box is None and mask is None:
        return "has neither bbox nor segmentation; one of them is needed"
    if box is not None:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return f"bbox is {box!r}; it must be [x, y, width, height], four finite numbers"
        if box[2] < 0 or box[3] < 0:
            return f"bbox is {box!r}; width and height must be at least 0 (x, y, width, height)"
    if mask is not None:
        size = sizes.get(detection["image_id"])
        if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
            return "segmentation must be an RLE: an object with 'size' and 'counts'"
        if not isinstance(mask["size"], list) or [type(n) for n in mask["size"]] != [int, int]:
            return f"segmentation: size is {mask['size']!r}; it must be [height, width]"
        if not isinstance(mask["counts"], str):
            kind = type(mask["counts"]).__name__
            return (
                f"segmentation: counts is a {kind}; it must be a text, the compressed RLE that "
                "pycocotools.mask.encode gives"
            )
        if size is not None and None not in size and tuple(mask["size"]) != size:
            return (
                f"the mask is {mask['size']} pixels (height, width), but image "
                f"{detection['image_id']!r} is {list(size)}; masks must have the image's size"
            )
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _some(values: Iterable) -> str:
    values = list(dict.fromkeys(values))
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(repr, values[:_SHOWN])) + more
