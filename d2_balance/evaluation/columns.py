"""Prediction files as columns: 1.5 million detections in 110 MB, masks left in the file.

D: detections of the file.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from .predictions import PredictionChecks

_CHUNK = 1 << 22  # bytes read at once
_GAP = re.compile(r"\s*(,?)\s*")


@dataclass
class PredictionColumns:
    """Detections of one file.

    Attributes:
        path: the file.
        image: (D,) index in the images of the dataset, int32.
        category: (D,) category id, int64.
        score: (D,) float64.
        box: (D, 4) x, y, width, height in pixels, float64; NaN where the file has masks only.
        has_mask: (D,) bool.
        span: (D, 2) first byte and end of each detection in the file, int64.
    """

    path: str
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    has_mask: np.ndarray
    span: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


def read_columns(
    path: str,
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    source: str,
    class_source: str = "",
) -> PredictionColumns:
    """Read and check a prediction file without holding its detections as objects.

    Args:
        path: JSON list of detections in the result format of COCO and LVIS.
        images: `images` of the dataset the detections are for.
        categories: `categories` of the dataset whose classes they have.
        source: name of the dataset, for messages.
        class_source: name of the one with the categories, if another.

    Raises:
        ValueError: as `read_predictions`.
    """
    checks = PredictionChecks(images, categories, path, source, class_source)
    index = {image["id"]: number for number, image in enumerate(images)}
    parts = []
    rows: list[tuple] = []
    nothing = (float("nan"),) * 4
    bar = tqdm(desc=f"reading {path}", unit=" detections", delay=2, disable=None)
    for start, end, detection in read_objects(path):
        checks.add(detection)
        rows.append(
            (
                index.get(detection["image_id"], -1),
                detection["category_id"],
                detection["score"],
                *(detection.get("bbox") or nothing),
                detection.get("segmentation") is not None,
                start,
                end,
            )
        )
        if len(rows) == 100_000:
            parts.append(np.array(rows, dtype=np.float64))  # exact for integers below 2^53
            bar.update(len(rows))
            rows = []
    checks.finish()
    bar.close()
    parts.append(np.array(rows, dtype=np.float64).reshape(-1, 10))
    table = np.concatenate(parts)
    return PredictionColumns(
        path,
        image=table[:, 0].astype(np.int32),
        category=table[:, 1].astype(np.int64),
        score=table[:, 2].copy(),
        box=table[:, 3:7].copy(),
        has_mask=table[:, 7].astype(bool),
        span=table[:, 8:].astype(np.int64),
    )


def read_objects(path: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (first byte, end, value) of each entry of a JSON list, reading piece by piece.

    Raises:
        ValueError: the file cannot be read, is no list, or is cut off; with the byte.
    """
    decoder = json.JSONDecoder()
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        # latin-1: one character a byte, so that positions are those of the file
        text = file.read(_CHUNK).decode("latin-1")
        base, position, ended = 0, len(text) - len(text.lstrip()), False
        if text[position : position + 1] != "[":
            raise ValueError(f"{path}: predictions must be a JSON list of detections")
        position += 1
        first = True
        while True:
            gap = _GAP.match(text, position)
            found = None
            if gap.end() < len(text):
                if text[gap.end()] == "]" and not gap.group(1):
                    return
                if bool(gap.group(1)) != first:
                    try:
                        found, end = decoder.raw_decode(text, gap.end())
                    except json.JSONDecodeError:
                        found = None
            if found is not None and (end < len(text) or ended):
                yield base + gap.end(), base + end, _decoded(found, text[gap.end() : end], path)
                position, first = end, False
                continue
            if ended:
                raise ValueError(
                    f"{path}: not valid JSON at byte {base + gap.end()}; the list is broken or "
                    "ends too early"
                )
            piece = file.read(max(_CHUNK, len(text) - position)).decode("latin-1")
            ended = not piece
            text, base, position = text[position:] + piece, base + position, 0


def _decoded(value: Any, text: str, path: str) -> Any:
    if text.isascii():
        return value
    try:
        return json.loads(text.encode("latin-1"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the text must be UTF-8: {error.reason}") from error


class DetectionTexts:
    """The detections' own JSON texts, read from the file when they are asked for.

    Args:
        columns: detections of a file that has not changed since.
    """

    def __init__(self, columns: PredictionColumns):
        self.columns = columns
        self._file = open(columns.path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def text(self, row: int) -> str:
        """Detection `row` as it stands in the file."""
        start, end = self.columns.span[row].tolist()
        return self._map[start:end].decode("utf-8")

    def changed(self, row: int, **fields: Any) -> str:
        """Detection `row` with other values in some fields."""
        return json.dumps(json.loads(self.text(row)) | fields)

    def close(self) -> None:
        self._map.close()
        self._file.close()

    def __enter__(self) -> DetectionTexts:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def capped(columns: PredictionColumns, scores: np.ndarray, max_dets: int) -> np.ndarray:
    """Rows that stay when an image keeps its `max_dets` best scores; all where it is 0.

    Args:
        columns: the detections.
        scores: (D,) to rank by.
        max_dets: detections of an image, 0 for no limit.

    Returns:
        Row numbers, image by image, best first.
    """
    order = np.lexsort((-scores, columns.image))
    if not max_dets:
        return order
    image = columns.image[order]
    rank = np.arange(len(order)) - np.searchsorted(image, image)
    return order[rank < max_dets]
