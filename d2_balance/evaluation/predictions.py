"""The one reader of prediction files: a JSON list of detections as checked columns.

A detection has `image_id`, `category_id`, `score`, and `bbox` (x, y, width, height in pixels) or
`segmentation` (RLE of the image's size), or both. Masks stay in the file until they are asked for.

D: detections of the file.
"""

from __future__ import annotations

import codecs
import functools
import gc
import json
import math
import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.rle import all_fill, rle_problem
from d2_balance.utils.arrays import positions
from d2_balance.utils.files import read_json
from d2_balance.utils.progress import progress

FIELDS = ("image_id", "category_id", "score")
_CHUNK = 1 << 22  # bytes that are parsed at once
_GAP = re.compile(r"\s*(,?)\s*")
_BETWEEN = re.compile(rb"\}\s*,\s*\{")
_SPACE = re.compile(rb"[\s,]*")
_MASKS = 512  # masks whose runs are checked together
_SHOWN = 5
_NOTHING = (math.nan,) * 4  # the box of a detection without one


@dataclass(eq=False)
class Predictions:
    """Detections of one file, in its order.

    Attributes:
        path: the file.
        image: (D,) int32 index in the images of the dataset.
        category: (D,) int64 category id.
        score: (D,) float64.
        box: (D, 4) float64 x, y, width, height in pixels; NaN if the file has only a mask.
        has_mask: (D,) bool.
    """

    path: str
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    has_mask: np.ndarray
    _loaded: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.score)

    @functools.cached_property
    def span(self) -> np.ndarray:
        """(D, 2) int64 first byte and end of each detection in the file."""
        found = _spans_by_braces(self.path, self.has_mask)
        return np.array(_spans(self.path), np.int64).reshape(-1, 2) if found is None else found

    def load_masks(self) -> None:
        """Keep all masks in memory, for a file that goes away."""
        self._loaded = self.masks(np.arange(len(self)))

    def masks(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return the RLE masks of some detections, read from the file."""
        if not len(rows):
            return []
        if self._loaded is not None:
            return [self._loaded[n] for n in rows.tolist()]
        decode = msgspec.json.Decoder(_Masked).decode
        with _mapped(self.path) as content:
            found = (decode(content[a:b]).segmentation for a, b in self.span[rows].tolist())
            return [{"size": list(mask.size), "counts": mask.counts} for mask in found]

    def out_of_range(self) -> int | None:
        """Return the first detection whose score is not in [0, 1]."""
        wrong = np.flatnonzero((self.score < 0) | (self.score > 1))
        return int(wrong[0]) if len(wrong) else None


class _Mask(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str


class _Masked(msgspec.Struct, gc=False):
    segmentation: _Mask


class _Detection(msgspec.Struct, gc=False):
    image_id: int | str
    category_id: int
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: _Mask | None = None


def read_predictions(
    path: str, truth: Annotations, classes: Annotations | None = None
) -> Predictions:
    """Read and check a prediction file; an empty list is valid.

    Args:
        path: the file.
        truth: annotations of the images that the detections are for.
        classes: annotations whose classes the detections have; None: `truth`.

    Raises:
        ValueError: with file, number of the detection and remedy: a file that is empty, cut off or
            no list; a field that is missing; a score or box that is not finite; a box of negative
            size; a mask of another size than its image, or whose runs do not fill it; images or
            classes that the datasets lack.
    """
    classes = classes or truth
    collecting = gc.isenabled()
    gc.disable()  # millions of boxes, none of which is part of a cycle
    try:
        read = _read_typed(path, truth, classes)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError, ValueError, OverflowError):
        read = None
    finally:
        if collecting:
            gc.enable()
    # One that is wrong, or written in an unusual way, is read again by the slower one, which says
    # what is wrong.
    return _read_checked(path, truth, classes) if read is None else read


def _read_typed(path: str, truth: Annotations, classes: Annotations) -> Predictions | None:
    """Read a file without a flaw; None if anything is unusual."""
    decoder = msgspec.json.Decoder(list[_Detection])
    index = _Index(truth.image_id)
    columns = [
        (
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros(0),
            np.zeros((0, 4)),
            np.zeros(0, bool),
        )
    ]
    for _, text in progress(_chunks(path), f"reading {path}", unit="chunks"):
        found = decoder.decode(text)
        n = len(found)
        image = index(list(map(attrgetter("image_id"), found)))
        category = np.fromiter(map(attrgetter("category_id"), found), np.int64, n)
        score = np.fromiter(map(attrgetter("score"), found), np.float64, n)
        boxes = list(map(attrgetter("bbox"), found))
        if None in boxes:
            boxes = [_NOTHING if b is None else b for b in boxes]
        box = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * n).reshape(-1, 4)
        masks = list(map(attrgetter("segmentation"), found))
        has_mask = np.zeros(n, dtype=bool)
        if masks.count(None) < n:
            has_mask[:] = [m is not None for m in masks]
        usual = (
            (image >= 0).all()
            and np.isfinite(score).all()
            and (has_mask | ~np.isnan(box[:, 0])).all()
            and not (box[:, 2:] < 0).any()
            and not np.isinf(box).any()
            and _sound_masks([m for m in masks if m is not None], image[has_mask], truth)
        )
        if not usual:
            return None
        columns.append((image, category, score, box, has_mask))
    image, category, score, box, has_mask = (
        np.concatenate(parts) for parts in zip(*columns, strict=True)
    )
    predictions = Predictions(path, image, category, score, box, has_mask)
    known = positions(classes.category_id, predictions.category) >= 0
    return predictions if known.all() else None


class _Index:
    """Positions of ids in an array of them, -1 for others."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._places = ids, {i: n for n, i in enumerate(ids.tolist())}

    def __call__(self, given: list[int | str]) -> np.ndarray:
        if self._ids.dtype.kind != "i":
            return np.fromiter((self._places.get(i, -1) for i in given), np.int32, len(given))
        if str in set(map(type, given)):
            return np.full(len(given), -1, np.int32)  # numpy would take "7" for 7
        return positions(self._ids, np.fromiter(given, np.int64, len(given)))


def _sound_masks(masks: Sequence[_Mask], image: np.ndarray, truth: Annotations) -> bool:
    """Whether masks have the sizes of their images, and runs that fill them."""
    sizes = np.fromiter(chain.from_iterable(map(attrgetter("size"), masks)), np.int64)
    sizes = sizes.reshape(-1, 2)
    if (sizes != truth.size[image]).any():
        return False
    pixels, counts = sizes[:, 0] * sizes[:, 1], list(map(attrgetter("counts"), masks))
    return all(
        all_fill(counts[a : a + _MASKS], pixels[a : a + _MASKS])
        for a in range(0, len(counts), _MASKS)
    )


def _chunks(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (first byte of the entries, a list of them) of some megabytes each.

    Cuts between "}" and "{". Where these stand within an entry (a list of objects in a field of its
    own), a chunk is no JSON, and who reads it has to take the file in another way.

    Raises:
        ValueError: the file is no JSON list.
    """
    with _mapped(path) as content:
        start, end = _inner(content)
        while start < end:
            cut = _BETWEEN.search(content, start + _CHUNK) if start + _CHUNK < end else None
            stop = cut.start() + 1 if cut else end
            yield start, b"[" + content[start:stop] + b"]"
            start = cut.end() - 1 if cut else end


@contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    """The bytes of a file; ValueError if it is empty."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _inner(content: mmap.mmap) -> tuple[int, int]:
    """First byte and end of what stands between the brackets of a list."""
    start, end = 0, len(content)
    if content[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8:
        start = len(codecs.BOM_UTF8)
    while start < end and content[start] in b" \t\r\n":
        start += 1
    while end > start and content[end - 1] in b" \t\r\n":
        end -= 1
    if end - start < 2 or content[start] != ord("[") or content[end - 1] != ord("]"):
        raise ValueError("no list")
    start, end = start + 1, end - 1
    while start < end and content[start] in b" \t\r\n":
        start += 1
    return start, end


def _spans_by_braces(path: str, has_mask: np.ndarray) -> np.ndarray | None:
    """First byte and end of each entry, (D, 2), of a file that has been read before.

    Every entry has a pair of braces, and a second one if it has a mask. A file with as many braces
    as that has none in a string or in another field, so that their order tells what they are.

    Returns:
        None for a file with other braces.
    """
    pairs = 1 + has_mask.astype(np.int64)
    places = []
    with _mapped(path) as content:
        for brace in b"{}":
            found = [np.zeros(0, np.int64)]
            for start in range(0, len(content), _CHUNK):
                block = np.frombuffer(content[start : start + _CHUNK], np.uint8)
                found.append(start + np.flatnonzero(block == brace))
            places.append(np.concatenate(found))
    if any(len(found) != pairs.sum() for found in places):
        return None
    last = pairs.cumsum() - 1
    return np.column_stack([places[0][last - pairs + 1], places[1][last] + 1])


def _spans(path: str) -> list[tuple[int, int]]:
    """First byte and end of each entry, of a file that has been read before."""
    decoder = msgspec.json.Decoder(list[msgspec.Raw])
    spans = []
    try:
        for start, text in _chunks(path):
            position = 1
            for raw in decoder.decode(text):
                gap = _SPACE.match(text, position)
                assert gap is not None
                end = gap.end() + len(memoryview(raw))
                spans.append((start + gap.end() - 1, start + end - 1))
                position = end
    except msgspec.MsgspecError:
        return [(start, end) for start, end, _ in read_objects(path)]
    return spans


def read_objects(path: str) -> Iterator[tuple[int, int, Any]]:  # noqa: C901  one loop
    """Yield (first byte, end, value) of each entry of a JSON list, reading chunk by chunk.

    Raises:
        ValueError: the file cannot be read, is no list, or is cut off; with the byte.
    """
    decoder = json.JSONDecoder()
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        first_bytes = file.read(_CHUNK)
        if first_bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{path}: the text is UTF-16; predictions must be UTF-8")
        # latin-1: one character a byte, so that positions are those of the file
        text = first_bytes.decode("latin-1")
        mark = len(codecs.BOM_UTF8) if first_bytes.startswith(codecs.BOM_UTF8) else 0
        base, position, ended = 0, mark + len(text[mark:]) - len(text[mark:].lstrip()), False
        if not text[mark:].strip():
            raise ValueError(f"{path}: the file is empty; copy or write it again")
        if text[position : position + 1] != "[":
            found = type(read_json(path)).__name__  # raises where the file is no JSON
            raise ValueError(
                f"{path}: predictions must be a list of detections, not a {found}; an annotation "
                "file is given with --dataset"
            )
        position += 1
        first = True
        while True:
            gap = _GAP.match(text, position)
            assert gap is not None
            value, end = None, 0
            if gap.end() < len(text):
                if text[gap.end()] == "]" and not gap.group(1):
                    return
                if bool(gap.group(1)) != first:
                    try:
                        value, end = decoder.raw_decode(text, gap.end())
                    except json.JSONDecodeError:
                        value = None
            if value is not None and (end < len(text) or ended):
                yield base + gap.end(), base + end, _decoded(value, text[gap.end() : end], path)
                position, first = end, False
                continue
            if ended:
                raise ValueError(
                    f"{path}: not valid JSON at byte {base + gap.end()}; the list is corrupt or "
                    "the file ends too early: copy or write it again"
                )
            more = file.read(max(_CHUNK, len(text) - position)).decode("latin-1")
            ended = not more
            text, base, position = text[position:] + more, base + position, 0


def _decoded(value: Any, text: str, path: str) -> Any:
    if text.isascii():
        return value
    try:
        return json.loads(text.encode("latin-1"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the text must be UTF-8: {error.reason}") from error


def _read_checked(path: str, truth: Annotations, classes: Annotations) -> Predictions:
    """Read any valid file; raises where there is a flaw."""
    checks = _Checks(path, truth, classes)
    rows: list[tuple] = []
    spans: list[tuple[int, int]] = []
    objects = progress(read_objects(path), f"reading {path}", unit="detections")
    for start, end, detection in objects:
        checks.add(detection)
        image = checks.index.get(detection["image_id"], -1)
        box = detection.get("bbox") or _NOTHING
        mask = detection.get("segmentation") is not None
        rows.append((image, detection["category_id"], detection["score"], *box, mask))
        spans.append((start, end))
    checks.finish()
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)  # exact for integers below 2^53
    predictions = Predictions(
        path,
        image=table[:, 0].astype(np.int32),
        category=table[:, 1].astype(np.int64),
        score=table[:, 2].copy(),
        box=table[:, 3:7].copy(),
        has_mask=table[:, 7].astype(bool),
    )
    predictions.__dict__["span"] = np.array(spans, np.int64).reshape(-1, 2)
    return predictions


class _Checks:
    """Checks detections one by one, and reports unknown images and classes at the end.

    Args:
        path: the file of the detections, for messages.
        truth: annotations of the images.
        classes: annotations that have the classes.
    """

    def __init__(self, path: str, truth: Annotations, classes: Annotations) -> None:
        self.path, self.source, self.class_source = path, truth.path, classes.name
        self.index = {i: n for n, i in enumerate(truth.image_id.tolist())}
        self.sizes = truth.size
        self.classes = set(classes.category_id.tolist())
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
        problem = _problem(detection, self)
        if problem:
            raise ValueError(f"{self.path}: detection {self.count}: {problem}")
        if detection.get("segmentation") is not None:
            self._masks.append((self.count, detection["segmentation"]))
            if len(self._masks) == _MASKS:
                self._check_masks()
        if detection["image_id"] not in self.index:
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


def _problem(detection: Any, checks: _Checks) -> str:
    """Say what is wrong with one detection, "" if nothing."""
    if not isinstance(detection, dict):
        return f"{detection!r} is no object"
    for field in FIELDS:
        if field not in detection:
            return f"lacks {field!r}; needed are {', '.join(FIELDS)} and bbox or segmentation"
        if isinstance(detection[field], list | dict | bool):
            return f"{field!r} is {detection[field]!r}; it must be a number or, for ids, a string"
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
    return "" if mask is None else _mask_problem(mask, detection["image_id"], checks)


def _mask_problem(mask: Any, image_id: int | str, checks: _Checks) -> str:
    if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
        return "segmentation must be an RLE: an object with 'size' and 'counts'"
    if not isinstance(mask["size"], list) or [type(n) for n in mask["size"]] != [int, int]:
        return f"segmentation: size is {mask['size']!r}; it must be [height, width]"
    if not isinstance(mask["counts"], str):
        return (
            f"segmentation: counts is a {type(mask['counts']).__name__}; it must be a string, the "
            "compressed RLE that pycocotools.mask.encode gives"
        )
    image = checks.index.get(image_id)
    if image is not None and mask["size"] != checks.sizes[image].tolist():
        return (
            f"the mask is {mask['size']} pixels (height, width), but image {image_id!r} is "
            f"{checks.sizes[image].tolist()}; masks must have the image's size"
        )
    return ""


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN, and for integers that are too long


def _some(values: Iterable) -> str:
    values = list(dict.fromkeys(values))
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(repr, values[:_SHOWN])) + more


class DetectionTexts:
    """The detections' own JSON texts, read from the file when they are asked for.

    Args:
        predictions: detections of a file that has not changed since.
    """

    def __init__(self, predictions: Predictions):
        self.predictions = predictions
        self._file = open(predictions.path, "rb")  # noqa: SIM115  until close()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._spans = predictions.span
        self._decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

    def text(self, row: int) -> bytes:
        """Return detection `row` as it stands in the file, in UTF-8."""
        start, end = self._spans[row].tolist()
        return self._map[start:end]

    def texts(self, rows: np.ndarray) -> list[bytes]:
        """Return `text` of many detections."""
        return [self._map[start:end] for start, end in self._spans[rows].tolist()]

    def changed(self, row: int, **fields: Any) -> bytes:
        """Return detection `row` with other values in some fields."""
        text = self.text(row)
        try:
            return msgspec.json.encode(self._decode(text) | fields)
        except msgspec.MsgspecError:  # NaN in a field that nobody reads, for example
            return json.dumps(json.loads(text) | fields).encode()

    def close(self) -> None:
        """Close the file."""
        self._map.close()
        self._file.close()

    def __enter__(self) -> DetectionTexts:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def capped(predictions: Predictions, scores: np.ndarray, max_dets: int) -> np.ndarray:
    """Return the rows that stay when an image keeps its `max_dets` best scores.

    Args:
        predictions: the detections.
        scores: (D,) to rank by.
        max_dets: detections of an image, 0 for no limit.

    Returns:
        Row numbers, image by image, best first.
    """
    order = np.lexsort((-scores, predictions.image))
    if not max_dets:
        return order
    return order[_rank_in_runs(predictions.image[order]) < max_dets]


def _rank_in_runs(sorted_keys: np.ndarray) -> np.ndarray:
    """Count from 0 within each run of equal values."""
    return np.arange(len(sorted_keys)) - np.searchsorted(sorted_keys, sorted_keys)
