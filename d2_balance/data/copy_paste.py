"""Copy-paste of rare classes: their objects appear in other images.

n objects are sampled for an image, n uniform in 0 .. MAX_OBJECTS: a class with probability
proportional to sqrt(t / f_c), among the classes in a fraction f_c < t of the training images, then
one of its objects, uniformly. An object is resized as its image would be, times a factor from
SCALE, flipped as images are, and put anywhere in the image. With U the pixels of what was pasted,

    image <- pasted where U, else image;   m_i <- m_i and not U;   b_i <- tight box of m_i

for every object i that U touches. It stays if at least one pixel is left and if all four sides of
its box moved by at most `max_shift` pixels or more than `min_pixels` of it are left. Objects
without a mask are rectangles, as are ignore regions. Later objects cover earlier ones.

LVIS's image-level labels follow: a pasted class is not verified absent any more, and it is not
exhaustive where the image was not annotated for it. Counts of classes stay those of the training
set: what is pasted does not count.

The authors paste a random subset of the objects of one other image after large-scale jitter of
both; the choice of rare classes and of places is ours. Crops are kept in memory, since reading a
second image would double the time of the mapper.

Shapes: M objects, image (H, W).

Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance
Segmentation, arXiv:2012.07177.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image

from .annotations import count_classes
from .catalog.metadata import id_map
from .columns import IMAGE_LABEL_KEYS
from .ignore_regions import FIELD
from .mapper import MASKED, BalancedMapper
from .records import objects_of
from .samplers import class_factors
from .unreadable import SKIPPED, UNREADABLE, image_name

KEY = "DATALOADER.COPY_PASTE"
FORMATS = ("BGR", "RGB")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Crop:
    """An object cut out of its image.

    Attributes:
        pixels: (h, w, 3) uint8.
        mask: (h, w) uint8, 255 on the object; None for a rectangle.
        category: class index.
        side: shortest side of its image.
        file_name: of its image.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    category: int
    side: int
    file_name: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.pixels.nbytes + (0 if self.mask is None else self.mask.nbytes)


@dataclass
class _Placed:
    """A pasted object: its window (y0, x0, y1, x1) of the image, and what is seen of it there."""

    window: tuple[int, int, int, int]
    pixels: np.ndarray
    mask: np.ndarray
    category: int
    has_mask: bool


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return x0 y0 x1 y1 (exclusive) of the pixels of a mask (h, w) bool, None without any."""
    rows, columns = (np.asarray(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.any():
        return None
    height, width = mask.shape
    low = int(columns.argmax()), int(rows.argmax())
    return *low, width - int(columns[::-1].argmax()), height - int(rows[::-1].argmax())


def cut_objects(
    boxes: np.ndarray,
    masks: np.ndarray | None,
    covered: np.ndarray,
    windows: Sequence[tuple[int, int, int, int]] | None = None,
    *,
    max_shift: float = 10.0,
    min_pixels: int = 300,
) -> np.ndarray:
    """Take covered pixels from objects; boxes and masks are changed in place.

    Args:
        boxes: (M, 4) x0 y0 x1 y1 in pixels.
        masks: (M, H, W) bool; None takes the boxes for masks.
        covered: (H, W) bool.
        windows: y0 x0 y1 x1 of parts that hold all covered pixels; None looks everywhere.
        max_shift: pixels that a side of a box may move.
        min_pixels: number of pixels above which an object stays, however its box moves.

    Returns:
        (M,) bool, the objects that stay.
    """
    if windows is None:
        windows = [(0, 0, *covered.shape)]
    stays = np.ones(len(boxes), dtype=bool)
    touched = np.zeros(len(boxes), dtype=bool)
    for y0, x0, y1, x1 in windows:
        if masks is None:
            touched |= ((boxes[:, :2] < (x1, y1)) & (boxes[:, 2:] > (x0, y0))).all(axis=1)
        else:
            under = masks[:, y0:y1, x0:x1] & covered[y0:y1, x0:x1]
            touched |= under.any(axis=(1, 2))
    for i in touched.nonzero()[0].tolist():
        if masks is None:
            box, left = _rest_of_rectangle(boxes[i], covered)
        else:
            for y0, x0, y1, x1 in windows:
                masks[i, y0:y1, x0:x1] &= ~covered[y0:y1, x0:x1]
            box, left = tight_box(masks[i]), int(np.count_nonzero(masks[i]))
        if box is None:
            stays[i] = False
            continue
        near = bool((np.abs(boxes[i] - box) <= max_shift).all())
        stays[i] = near or left > min_pixels
        boxes[i] = box
    return stays


def _rest_of_rectangle(
    box: np.ndarray, covered: np.ndarray
) -> tuple[tuple[float, float, float, float] | None, int]:
    """Box around what is not covered of a box, and its pixels; free sides keep their fractions."""
    x0, y0 = np.floor(box[:2]).astype(int).clip(min=0)
    x1, y1 = np.ceil(box[2:]).astype(int)
    free = ~covered[y0:y1, x0:x1]
    rest = tight_box(free)
    if rest is None:
        return None, 0
    height, width = free.shape
    left, up, right, low = rest
    return (
        float(box[0]) if left == 0 else float(x0 + left),
        float(box[1]) if up == 0 else float(y0 + up),
        float(box[2]) if right == width else float(x0 + right),
        float(box[3]) if low == height else float(y0 + low),
    ), int(np.count_nonzero(free))


class CopyPaste:
    """Pastes objects of rare classes into mapped records.

    All that is random comes from numpy's global generator, which the training stream seeds by
    seed, rank and position. What the cache holds does not change the result.

    Args:
        records: the training set, as Detectron2's standard dicts.
        threshold: classes in a smaller fraction of the images are pasted, above 0.
        max_objects: objects pasted into an image at most, at least 1.
        scale: least and largest factor of an object's size.
        max_shift: see `cut_objects`.
        min_pixels: see `cut_objects`.
        cache_bytes: memory of crops in each process.
        use_masks: whether objects have masks (BitMasks); else only the boxes are kept.
        image_format: "BGR" or "RGB".
        flip: "horizontal", "vertical" or "none", half of the objects.
        raw_ids: category id of the file for each class; None is class index + 1.
        ignore_value: label of the pixels of `sem_seg` under what was pasted.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        *,
        threshold: float = 0.001,
        max_objects: int = 3,
        scale: tuple[float, float] = (0.8, 1.25),
        max_shift: float = 10.0,
        min_pixels: int = 300,
        cache_bytes: int = 64 << 20,
        use_masks: bool = False,
        image_format: str = "BGR",
        flip: str = "horizontal",
        raw_ids: Mapping[int, int] | None = None,
        ignore_value: int = 255,
    ) -> None:
        self._records, self._max_objects = records, max_objects
        self._scale, self._max_shift, self._min_pixels = scale, max_shift, min_pixels
        self._use_masks, self._format, self._flip = use_masks, image_format, flip
        self._raw_ids, self._ignore_value = raw_ids, ignore_value
        objects = objects_of(records)
        kept = ~objects.crowd
        classes = int(objects.category.max()) + 1 if len(objects.category) else 0
        counts = count_classes(objects.image[kept], objects.category[kept], classes, objects.images)
        factor = np.where(counts.image_count > 0, class_factors(counts, threshold), 0.0)
        self._image = objects.image
        self._source = kept & (factor > 1)[objects.category]
        found = np.flatnonzero(self._source)
        self._objects = found[np.argsort(objects.category[found], kind="stable")]
        self.classes, self._starts = np.unique(objects.category[self._objects], return_index=True)
        self._counts = np.diff(np.append(self._starts, len(self._objects)))
        weight = factor[self.classes]
        self._cumulated = weight.cumsum() / max(weight.sum(), 1e-12)
        self._cache: OrderedDict[int, _Crop | str | None] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes

    def __getstate__(self) -> dict[str, Any]:
        """Leave the crops to the process that has read them."""
        return self.__dict__ | {"_cache": OrderedDict(), "_cached_bytes": 0}

    def __call__(self, record: dict[str, Any], annotated: Collection[int]) -> dict[str, Any]:
        """Paste objects into an image.

        Args:
            record: as the mapper returns it, with `image` and `instances`; changed in place.
            annotated: classes with objects in the image before it was cropped.

        Returns:
            The record.
        """
        placed = self._place(record)
        if not placed:
            return record
        image = record["image"].numpy()
        covered = np.zeros(image.shape[1:], dtype=bool)
        seen = []
        for one in reversed(placed):  # the last one lies on top
            y0, x0, y1, x1 = one.window
            under = covered[y0:y1, x0:x1]
            visible = one.mask & ~under
            np.copyto(image[:, y0:y1, x0:x1], one.pixels.transpose(2, 0, 1), where=visible)
            under |= one.mask
            if self._stays(one.mask, visible):
                seen.append(_Placed(one.window, one.pixels, visible, one.category, one.has_mask))
        seen.reverse()
        windows = [one.window for one in placed]
        record["instances"] = self._joined(record["instances"], seen, covered, windows)
        if FIELD in record:
            regions = record[FIELD].numpy().astype(np.float64)
            stays = cut_objects(regions, None, covered, windows, max_shift=np.inf)
            record[FIELD] = torch.as_tensor(regions[stays], dtype=torch.float32)
        if "sem_seg" in record:
            record["sem_seg"][torch.from_numpy(covered)] = self._ignore_value
        self._relabel(record, {one.category for one in seen}, annotated)
        return record

    def _stays(self, mask: np.ndarray, visible: np.ndarray) -> bool:
        """Apply the rule of `cut_objects` to a pasted object that later ones cover."""
        box, rest = tight_box(mask), tight_box(visible)
        if box is None or rest is None:
            return False
        near = np.abs(np.subtract(box, rest)).max() <= self._max_shift
        return bool(near or np.count_nonzero(visible) > self._min_pixels)

    def _place(self, record: dict[str, Any]) -> list[_Placed]:
        count = np.random.randint(self._max_objects + 1)
        if not count or not len(self._objects):
            return []
        height, width = record["image"].shape[1:]
        placed = []
        for u in np.random.rand(count, 6):
            k = min(int(np.searchsorted(self._cumulated, u[0], "right")), len(self.classes) - 1)
            number = self._objects[self._starts[k] + int(u[1] * self._counts[k])]
            crop = self._crop(int(number))
            if isinstance(crop, str):  # what is wrong with its image
                name = image_name(self._records[int(self._image[number])])
                record.setdefault(SKIPPED, {})[name] = f"{crop}, a source of {KEY}"
            elif crop is not None and crop.file_name != record.get("file_name"):
                one = self._placed(crop, u[2:], height, width)
                if one.mask.any():
                    placed.append(one)
        return placed

    def _placed(self, crop: _Crop, u: np.ndarray, height: int, width: int) -> _Placed:
        low, high = self._scale
        factor = (low + u[0] * (high - low)) * min(height, width) / crop.side
        h, w = (max(round(side * factor), 1) for side in crop.pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(crop.pixels).resize((w, h), Image.Resampling.BILINEAR))
        mask = np.ones((h, w), dtype=bool)
        if crop.mask is not None:
            resized = Image.fromarray(crop.mask).resize((w, h), Image.Resampling.BILINEAR)
            mask = np.asarray(resized) >= 128
        if self._flip != "none" and u[1] < 0.5:
            axis = 1 if self._flip == "horizontal" else 0
            pixels, mask = np.flip(pixels, axis), np.flip(mask, axis)
        y = _offset(u[2], height - h)
        x = _offset(u[3], width - w)
        y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + h, height), min(x + w, width)
        inside = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
        has_mask = crop.mask is not None
        return _Placed((y0, x0, y1, x1), pixels[inside], mask[inside], crop.category, has_mask)

    def _joined(
        self,
        own: Instances,
        seen: Sequence[_Placed],
        covered: np.ndarray,
        windows: Sequence[tuple[int, int, int, int]],
    ) -> Instances:
        """Objects of the image that stay, then those that were pasted."""
        boxes = own.gt_boxes.tensor.numpy().astype(np.float64)
        masks = own.gt_masks.tensor.numpy() if own.has("gt_masks") else None
        stays = cut_objects(
            boxes,
            masks,
            covered,
            windows,
            max_shift=self._max_shift,
            min_pixels=self._min_pixels,
        )
        own.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        own = own[torch.from_numpy(stays)]
        if not seen:
            return own
        pasted = Instances(own.image_size)
        corners = []
        for one in seen:
            y, x, _, _ = one.window
            x0, y0, x1, y1 = tight_box(one.mask) or (0, 0, 0, 0)
            corners.append([x + x0, y + y0, x + x1, y + y1])
        pasted.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        pasted.gt_classes = torch.tensor([one.category for one in seen])
        if self._use_masks:
            canvas = np.zeros((len(seen), *covered.shape), dtype=bool)
            for mask, one in zip(canvas, seen, strict=True):
                y0, x0, y1, x1 = one.window
                mask[y0:y1, x0:x1] = one.mask
            pasted.gt_masks = BitMasks(torch.from_numpy(canvas))
            has_mask = [one.has_mask for one in seen]
            if own.has(MASKED) or not all(has_mask):
                pasted.set(MASKED, torch.tensor(has_mask))
                if not own.has(MASKED):
                    own.set(MASKED, torch.ones(len(own), dtype=torch.bool))
        return Instances.cat([own, pasted]) if len(own) else pasted

    def _relabel(
        self, record: dict[str, Any], pasted: Collection[int], annotated: Collection[int]
    ) -> None:
        negative, partial = IMAGE_LABEL_KEYS
        if negative not in record and partial not in record:
            return  # annotated for all classes
        absent = list(record.get(negative) or ())
        unsure = list(record.get(partial) or ())
        for category in sorted(pasted):
            raw = category + 1 if self._raw_ids is None else self._raw_ids[category]
            if raw in absent:
                absent = [other for other in absent if other != raw]
            elif category not in annotated and raw not in unsure:
                unsure.append(raw)  # other objects of it may be in the image
        record[negative], record[partial] = absent, unsure

    def _crop(self, number: int) -> _Crop | str | None:
        """Return an object of the training set; what is wrong where its image cannot be read."""
        if number not in self._cache:
            self._read(int(self._image[number]))
        self._cache.move_to_end(number)
        crop = self._cache[number]
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= _bytes(dropped)
        return crop

    def _read(self, index: int) -> None:
        """Cut all objects that can be pasted out of one image."""
        first, last = np.searchsorted(self._image, [index, index + 1]).tolist()
        numbers = [n for n in range(first, last) if self._source[n]]
        record = self._records[index]
        image: np.ndarray | str
        try:
            image = read_image(record["file_name"], format=self._format)
            check_image_size(record, image)
        except UNREADABLE as error:
            image = f"{type(error).__name__}: {error}"
        for number in numbers:
            crop: _Crop | str | None
            if isinstance(image, str):
                crop = image
            else:
                crop = _cut_out(image, record, record["annotations"][number - first])
            self._cached_bytes += _bytes(crop) - _bytes(self._cache.pop(number, None))
            self._cache[number] = crop


def _bytes(crop: _Crop | str | None) -> int:
    return crop.size if isinstance(crop, _Crop) else 0


def _offset(u: float, room: int) -> int:
    """Place of an object along one axis; one that is larger than the image shows a part."""
    return min(room, 0) + int(u * (abs(room) + 1))


def _cut_out(image: np.ndarray, record: dict[str, Any], annotation: dict[str, Any]) -> _Crop | None:
    """Return an object of an image (H, W, 3); None if nothing of it is inside."""
    height, width = image.shape[:2]
    mask = _full_mask(annotation.get("segmentation"), height, width)
    if mask is None:
        box = np.array(
            BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        )
        x0, y0 = np.floor(box[:2]).astype(int).clip(min=0).tolist()
        x1, y1 = np.ceil(box[2:]).astype(int).clip(max=(width, height)).tolist()
    else:
        x0, y0, x1, y1 = tight_box(mask) or (0, 0, 0, 0)
    if x0 >= x1 or y0 >= y1:
        return None
    window = slice(y0, y1), slice(x0, x1)
    return _Crop(
        np.ascontiguousarray(image[window]),
        None if mask is None else mask[window].astype(np.uint8) * 255,
        int(annotation["category_id"]),
        min(height, width),
        str(record["file_name"]),
    )


def _full_mask(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Return (H, W) bool of polygons or an RLE; None if there are none."""
    import pycocotools.mask as mask_util

    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation).astype(bool)


def check_copy_paste(cfg: CfgNode) -> None:
    """Check DATALOADER.COPY_PASTE.

    Raises:
        ValueError: naming the key.
    """
    node = cfg.DATALOADER.COPY_PASTE
    low_high = node.SCALE
    pair = isinstance(low_high, list | tuple) and len(low_high) == 2
    for name, known, rule in (
        ("THRESHOLD", node.THRESHOLD > 0, "a fraction of images above 0 (LVIS: 0.001)"),
        ("MAX_OBJECTS", node.MAX_OBJECTS >= 1, "an integer of at least 1"),
        ("SCALE", pair and 0 < low_high[0] <= low_high[1], "two numbers above 0, the lower first"),
        ("MAX_SHIFT", node.MAX_SHIFT >= 0, "a number of pixels of at least 0"),
        ("MIN_PIXELS", node.MIN_PIXELS >= 0, "an integer of at least 0"),
        ("CACHE_MB", node.CACHE_MB >= 0, "a number of at least 0"),
    ):
        if not known:
            raise ValueError(f"{KEY}.{name} is {node[name]}; must be {rule}.")
    if not node.ENABLED:
        return
    if cfg.INPUT.FORMAT not in FORMATS:
        raise ValueError(
            f"{KEY}.ENABLED True works with INPUT.FORMAT {' or '.join(FORMATS)}, not "
            f"{cfg.INPUT.FORMAT!r}."
        )
    for key, value in (
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
    ):
        if value:
            raise ValueError(
                f"{KEY}.ENABLED True pastes boxes and masks only, and {key} is True; set one of "
                "them to False."
            )
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise ValueError(
            f"{KEY}.ENABLED True cuts masks, which INPUT.MASK_FORMAT {cfg.INPUT.MASK_FORMAT!r} "
            "cannot hold; must be 'bitmask'."
        )


def add_copy_paste(mapper: DatasetMapper, cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Let a mapper paste as DATALOADER.COPY_PASTE says; does nothing where it is off.

    Args:
        mapper: of the training set.
        cfg: full config.
        records: the training set.

    Raises:
        ValueError: a value is out of range, or the mapper cannot paste.
    """
    check_copy_paste(cfg)
    node = cfg.DATALOADER.COPY_PASTE
    if not node.ENABLED:
        return
    if not isinstance(mapper, BalancedMapper):
        raise ValueError(
            f"{KEY}.ENABLED True needs the mapper BalancedMapper, not {type(mapper).__name__}."
        )
    if mapper.use_instance_mask and mapper.instance_mask_format != "bitmask":
        raise ValueError(
            f"{KEY}.ENABLED True cuts masks; instance_mask_format of the mapper is "
            f"{mapper.instance_mask_format!r} and must be 'bitmask'."
        )
    names = [name for name in cfg.DATASETS.TRAIN if MetadataCatalog.get(name).get("thing_classes")]
    mapping = id_map(names[0]) if names else None
    mapper.copy_paste = CopyPaste(
        records,
        threshold=node.THRESHOLD,
        max_objects=node.MAX_OBJECTS,
        scale=tuple(node.SCALE),
        max_shift=node.MAX_SHIFT,
        min_pixels=node.MIN_PIXELS,
        cache_bytes=int(node.CACHE_MB * (1 << 20)),
        use_masks=mapper.use_instance_mask,
        image_format=mapper.image_format,
        flip=cfg.INPUT.RANDOM_FLIP,
        raw_ids=None if mapping is None else {index: raw for raw, index in mapping.items()},
        ignore_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )
    classes = mapper.copy_paste.classes
    logger.info(f"Copy-paste of {len(classes)} classes below {KEY}.THRESHOLD {node.THRESHOLD:g}.")
