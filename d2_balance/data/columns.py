"""An annotation file as columns: one pass over its text, every field read in one way.

I: images, A: annotations, K: classes. What cannot be read as what it must be is refused with the
file, the id, the field and the value. Structure that cannot be trained on raises; a single bad
annotation does not (see `checks.annotations`).
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import msgspec
import numpy as np

from d2_balance.utils.arrays import unique
from d2_balance.utils.files import parse_json
from d2_balance.utils.names import listed

from .checks.annotations import POLYGONS, box_problems, mask_problems

TOP_LEVEL_KEYS = ("images", "annotations", "categories")
IMAGE_LABEL_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")
_LVIS_MARKS = re.compile(rb'"neg_category_ids"\s*:\s*\[|"frequency"\s*:\s*"[rcf]"')
_CHUNK = 1 << 15  # annotations that are objects at a time
_INT64 = range(-(1 << 63), 1 << 63)
# What tools write for a flag, by the value that it has.
_FLAGS: dict[Hashable, bool] = {
    **dict.fromkeys((msgspec.UNSET, None, False, 0, "", "0", "0.0", "false"), False),
    **dict.fromkeys((True, 1, "1", "1.0", "true"), True),
}


@dataclass(frozen=True, eq=False)
class Texts:
    """Byte strings one after the other.

    Attributes:
        content: (bytes,) uint8.
        offsets: (n + 1,) int64, where each begins.
    """

    content: np.ndarray
    offsets: np.ndarray

    @classmethod
    def join(cls, texts: Sequence[bytes]) -> Texts:
        """Keep some texts."""
        length = np.fromiter(map(len, texts), np.int64, len(texts))
        content = np.frombuffer(b"".join(texts), dtype=np.uint8)
        return cls(content, np.concatenate([[0], length.cumsum()]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self.offsets[index : index + 2].tolist()
        return self.content[start:end].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        content, offsets = self.content.tobytes(), self.offsets.tolist()
        return (content[start:end] for start, end in itertools.pairwise(offsets))


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """Classes that are listed for each image.

    Attributes:
        category: (L,) int32 index in the classes of the file.
        offsets: (I + 1,) int64, where those of each image begin.
        given: (I,) bool, images that have the field.
    """

    category: np.ndarray
    offsets: np.ndarray
    given: np.ndarray

    def of(self, image: int) -> np.ndarray:
        """Class indices of one image, in the order of the file."""
        return self.category[self.offsets[image] : self.offsets[image + 1]]

    def pairs(self) -> np.ndarray:
        """(L, 2) int64 image and class of every label, each once, ascending."""
        images = np.repeat(np.arange(len(self.given)), np.diff(self.offsets))
        classes = int(self.category.max(initial=0)) + 1
        pairs = unique(images * classes + self.category)
        return np.stack(np.divmod(pairs, classes), axis=1)


class _Annotation(msgspec.Struct, gc=False):
    id: int | str
    image_id: int | str
    category_id: int
    bbox: tuple[int | float, int | float, int | float, int | float]
    area: float | None = None
    iscrowd: int | msgspec.UnsetType = msgspec.UNSET
    ignore: int | msgspec.UnsetType = msgspec.UNSET
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    keypoints: msgspec.Raw = msgspec.Raw(b"")


class _Top(msgspec.Struct):
    images: msgspec.Raw = msgspec.Raw(b"")
    annotations: msgspec.Raw = msgspec.Raw(b"")
    categories: msgspec.Raw = msgspec.Raw(b"")


_raws = msgspec.json.Decoder(list[msgspec.Raw])
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_annotations = msgspec.json.Decoder(list[_Annotation])


def has_lvis_marks(content: Any) -> bool:
    """Whether the text of a file has verified negatives or groups r, c, f."""
    return _LVIS_MARKS.search(content) is not None


def category_name(category: Mapping[str, Any]) -> Any:
    """The name of a category; LVIS files of old call it only by its first synonym."""
    return category.get("name") or next(iter(category.get("synonyms") or ()), None)


def check_structure(data: Any, path: str) -> None:
    """Check the lists of a parsed COCO- or LVIS-style file, for scripts that rewrite one.

    Raises:
        ValueError: naming the file, the id and the field.
    """
    if not isinstance(data, dict):
        raise ValueError(_no_object(path, data))
    parse_columns(msgspec.json.encode(data), path, _Nowhere())


def check_categories(categories: Sequence[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Check ids and names of the categories of a file; returns those that are classes.

    Raises:
        ValueError: naming the file and the id.
    """
    return _Categories([msgspec.Raw(msgspec.json.encode(c)) for c in categories], path).categories


class _Nowhere:
    def write(self, _: bytes) -> None:
        """Forget it."""


def parse_columns(content: bytes, path: str, masks: BinaryIO | _Nowhere) -> dict[str, Any]:
    """Parse and check a COCO- or LVIS-style file.

    Args:
        content: its text.
        path: its name, for messages.
        masks: gets the text of the masks, one after the other.

    Returns:
        The attributes of `Annotations` but for the texts of the masks, of which it has the
        offsets.

    Raises:
        ValueError: naming the file, the id and the field, for missing keys, duplicate ids or class
            names, sizes that are not positive, references to unknown images or categories, and
            values that cannot be read.
    """
    with _without_collecting():
        return _parse_columns(content, path, masks)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Leave millions of new objects, none of them garbage, alone while the block runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _parse_columns(content: bytes, path: str, masks: BinaryIO | _Nowhere) -> dict[str, Any]:
    try:
        top = msgspec.json.decode(content, type=_Top)
        tables = [_raws.decode(t) for t in (top.images, top.annotations, top.categories)]
    except msgspec.ValidationError:  # no object, or a table that is missing or no list
        tables = _tables_of(parse_json(content, path), path)
    except (msgspec.DecodeError, UnicodeDecodeError):  # with NaN or Infinity, or corrupt
        tables = _tables_of(parse_json(content, path), path)
    images, annotations, categories = tables
    table = _Categories(categories, path)
    result = table.columns | _image_columns(images, table, path)
    result |= _annotation_columns(annotations, result, table, path, masks)
    table.finish(result)
    result["categories"] = table.categories
    result["federated"] = has_lvis_marks(content)
    return result


def _tables_of(data: Any, path: str) -> list[list[msgspec.Raw]]:
    if not isinstance(data, dict):
        raise ValueError(_no_object(path, data))
    missing = [key for key in TOP_LEVEL_KEYS if not isinstance(data.get(key), list)]
    if missing:
        raise ValueError(
            f"{path}: the top-level key(s) {_listed(missing)} are missing or no lists; a "
            f"COCO- or LVIS-style file has the lists {_listed(TOP_LEVEL_KEYS)}"
        )
    return [[msgspec.Raw(json.dumps(r).encode()) for r in data[key]] for key in TOP_LEVEL_KEYS]


def _no_object(path: str, data: Any) -> str:
    return (
        f"{path}: the top level must be an object with the keys {_listed(TOP_LEVEL_KEYS)}, not a "
        f"{type(data).__name__}"
    )


def _records(table: Sequence[msgspec.Raw], name: str, path: str) -> list[dict[str, Any]]:
    """Records of a small table as objects."""
    try:
        found = [msgspec.json.decode(record) for record in table]
    except msgspec.DecodeError:  # a number out of range
        found = [json.loads(bytes(record)) for record in table]
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: {name}[{number}] is {record!r}; it must be an object")
    return found


class _Categories:
    """The classes of a file, by ascending id.

    A parent category of Roboflow's exports that bears the name of a class and has no object is left
    out: it is no class.

    Attributes:
        categories: K entries of the file.
        columns: `category_id` (K,) int64.
        index: class by category id; -1 for a parent that is left out.
    """

    def __init__(self, table: Sequence[msgspec.Raw], path: str) -> None:
        records = _records(table, "categories", path)
        if not records:
            raise ValueError(f"{path}: 'categories' is empty; at least one class is needed")
        ids = _ids(records, "categories", path, integer=True)
        for category_id, record in zip(ids, records, strict=True):
            record["id"] = category_id
            if not isinstance(category_name(record), str):
                raise ValueError(
                    f"{path}: category {category_id} has no 'name'; it must be a string"
                )
        self._path = path
        self._parents: list[dict[str, Any]] = []
        by_name: dict[str, dict[str, Any]] = {}
        for record in records:
            name = category_name(record)
            other = by_name.setdefault(name, record)
            if other is not record:
                parent, child = (other, record) if _is_root(other) else (record, other)
                if not _is_root(parent) or _is_root(child) or parent in self._parents:
                    raise ValueError(_same_name(path, other, record))
                self._parents.append(parent)
                by_name[name] = child
        self.categories = sorted(by_name.values(), key=lambda c: c["id"])
        self.columns = {"category_id": np.array([c["id"] for c in self.categories], np.int64)}
        self.index = {c["id"]: k for k, c in enumerate(self.categories)}
        self.index |= {c["id"]: -1 for c in self._parents}

    def finish(self, columns: dict[str, Any]) -> None:
        """Refuse parents with objects, and note the others."""
        for parent in self._parents:
            if (columns["category"] < 0).any():
                child = next(
                    c for c in self.categories if category_name(c) == category_name(parent)
                )
                raise ValueError(_same_name(self._path, parent, child))
        columns["unused_parents"] = [f"{c['id']} {category_name(c)!r}" for c in self._parents]


def _is_root(category: Mapping[str, Any]) -> bool:
    return category.get("supercategory") in (None, "", "none")


def _same_name(path: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    return (
        f"{path}: the categories {first['id']} and {second['id']} have the same name "
        f"{category_name(first)!r}; class names must be unique: rename one, or delete the one that "
        "has no objects"
    )


_NO_SIZE = " (Label Studio writes null without annotations: write the sizes, or take them out)"


def _image_columns(
    table: Sequence[msgspec.Raw], categories: _Categories, path: str
) -> dict[str, Any]:
    records = _records(table, "images", path)
    ids = _ids(records, "images", path)
    sizes = np.empty((len(records), 2), dtype=np.int64)
    names: dict[str, list[bytes]] = {"file_name": [], "coco_url": []}
    for number, (image_id, record) in enumerate(zip(ids, records, strict=True)):
        for place, key in enumerate(("height", "width")):
            size = record.get(key)
            if isinstance(size, bool) or not isinstance(size, int | float) or not _whole(size):
                raise ValueError(
                    f"{path}: image {image_id}: {key!r} is {_short(size)}; it must be an integer "
                    f"number of pixels above 0{_NO_SIZE if size is None else ''}"
                )
            sizes[number, place] = size
        for key, texts in names.items():
            text = record.get(key) or ""
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}: image {image_id}: {key!r} is {_short(text)}; it must be a string"
                )
            texts.append(text.encode("utf-8", "surrogatepass"))
    labels = {key: _image_labels(records, ids, key, categories, path) for key in IMAGE_LABEL_KEYS}
    return {
        "image_id": _id_array(ids),
        "size": sizes,
        **{key: Texts.join(texts) for key, texts in names.items()},
        "negative": labels[IMAGE_LABEL_KEYS[0]],
        "not_exhaustive": labels[IMAGE_LABEL_KEYS[1]],
    }


def _image_labels(
    records: Sequence[dict[str, Any]],
    ids: Sequence[Hashable],
    key: str,
    categories: _Categories,
    path: str,
) -> ImageLabels:
    found: list[list[int]] = []
    known = frozenset(categories.index)
    for image_id, record in zip(ids, records, strict=True):
        listed = record.get(key, ())
        try:
            unknown = set(listed) - known
        except TypeError:
            unknown = {str(listed)}
        if unknown:
            raise ValueError(
                f"{path}: image {image_id}: {key!r} holds {_some(unknown)}; only ids of the "
                "file's 'categories' can be used"
            )
        classes = (categories.index[i] for i in listed)
        found.append([k for k in classes if k >= 0])
    length = np.fromiter(map(len, found), np.int64, len(found))
    return ImageLabels(
        np.fromiter((k for own in found for k in own), np.int32, length.sum()),
        np.concatenate([[0], length.cumsum()]),
        np.fromiter((key in record for record in records), bool, len(records)),
    )


def _annotation_columns(
    table: Sequence[msgspec.Raw],
    images: Mapping[str, Any],
    categories: _Categories,
    path: str,
    masks: BinaryIO | _Nowhere,
) -> dict[str, Any]:
    image_index = {i: n for n, i in enumerate(images["image_id"].tolist())}
    references = _References(path)
    names = (
        "image",
        "category",
        "box",
        "integral",
        "malformed",
        "area",
        "crowd",
        "ignore",
        "marked",
    )
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    more: dict[str, list[np.ndarray]] = {
        n: [] for n in ("mask", "mask_problem", "trimmed", "length")
    }
    ids: list[Hashable] = []
    points = False
    for start in range(0, len(table), _CHUNK):
        part = table[start : start + _CHUNK]
        try:
            records = _annotations.decode(b"[" + b",".join(part) + b"]")
        except msgspec.DecodeError:
            records = [_read_slowly(raw, start + n, path) for n, raw in enumerate(part)]
        points = points or any(bytes(a.keypoints) not in _NOTHING for a in records[:100])
        ids += [a.id for a in records]
        references.look_at(records, "image_id", image_index, "images")
        references.look_at(records, "category_id", categories.index, "categories")
        if references.wrong:
            continue
        found = _chunk_columns(records, image_index, categories.index, path)
        texts = [bytes(a.segmentation) for a in records]
        texts = [b"" if text in _NOTHING else text for text in texts]
        what, problem, rewritten = mask_problems(texts, images["size"][found["image"]])
        for i, text in rewritten.items():
            texts[i] = text
        kept = [t if w and p < 0 else b"" for t, w, p in zip(texts, what, problem, strict=True)]
        masks.write(b"".join(kept))
        trimmed = np.zeros(len(records), bool)
        trimmed[[i for i in rewritten if what[i] == POLYGONS]] = True
        for name, column in found.items():
            columns[name].append(column)
        length = np.fromiter(map(len, kept), np.int64, len(kept))
        for name, column in zip(more, (what, problem, trimmed, length), strict=True):
            more[name].append(column)
    _check_ids(ids, "annotations", path)
    references.finish()
    if not ids:
        empty = _chunk_columns([], image_index, categories.index, path)
        kinds = (np.uint8, np.int8, bool, np.int64)
        columns = {name: [column] for name, column in empty.items()}
        for name, dtype in zip(more, kinds, strict=True):
            more[name] = [np.zeros(0, dtype)]
    result: dict[str, Any] = {n: np.concatenate(c) for n, c in (columns | more).items()}
    length = result.pop("length")
    result["mask_offsets"] = np.concatenate([[0], length.cumsum()])
    result["id"] = _id_array(ids)
    result["has_keypoints"] = points
    sizes = images["size"][result["image"]]
    result["box_problem"], result["clipped"] = box_problems(
        result["box"], result.pop("malformed"), sizes
    )
    return result


_NOTHING = frozenset((b"", b"null", b"[]", b"[[]]", b'""', b"false", b"{}", b"NaN"))


def _chunk_columns(
    records: Sequence[_Annotation],
    image_index: Mapping[Hashable, int],
    class_index: Mapping[Hashable, int],
    path: str,
) -> dict[str, np.ndarray]:
    count = len(records)
    numbers = [a.bbox for a in records]
    malformed = np.fromiter((box is None for box in numbers), bool, count)
    integral = [
        box is not None and type(box[0]) is type(box[1]) is type(box[2]) is type(box[3]) is int
        for box in numbers
    ]
    flat = list(chain.from_iterable([_NO_BOX if box is None else box for box in numbers]))
    try:
        boxes = np.array(flat, dtype=np.float64)
    except OverflowError:
        boxes = np.array(list(map(_finite, flat)), dtype=np.float64)
    areas = [math.nan if a.area is None else a.area for a in records]
    return {
        "image": np.array([image_index[a.image_id] for a in records], dtype=np.int32),
        "category": np.array([class_index[a.category_id] for a in records], dtype=np.int32),
        "box": boxes.reshape(-1, 4),
        "integral": np.array(integral, dtype=bool),
        "malformed": malformed,
        "area": np.array(areas, dtype=np.float64),
        "crowd": _flags(records, [a.iscrowd for a in records], "iscrowd", path),
        "ignore": _flags(records, [a.ignore for a in records], "ignore", path),
        "marked": np.array([a.iscrowd is not msgspec.UNSET for a in records], dtype=bool),
    }


_NO_BOX = (math.nan,) * 4


def _flags(
    records: Sequence[_Annotation], values: Sequence[Any], key: str, path: str
) -> np.ndarray:
    """(n,) bool, what the values of a flag mean."""
    try:
        return np.array([_FLAGS[value] for value in values], dtype=bool)
    except (KeyError, TypeError):
        flags = []
    for record, value in zip(records, values, strict=True):
        plain = value.strip().lower() if isinstance(value, str) else value
        if isinstance(plain, float) and math.isnan(plain):
            plain = None  # pandas writes NaN where nothing is given
        if not isinstance(plain, Hashable) or plain not in _FLAGS:
            raise ValueError(
                f"{path}: annotation {record.id}: {key!r} is {_short(value)}; it must be 0 or 1"
            )
        flags.append(_FLAGS[plain])
    return np.array(flags, dtype=bool)


def _read_slowly(raw: msgspec.Raw, number: int, path: str) -> _Annotation:
    """One annotation that has a field of an odd type, which is read as what it means or refused."""
    label = f"{path}: annotations[{number}]"
    try:
        fields = _fields.decode(raw)
    except msgspec.DecodeError:  # no object, or NaN somewhere
        record = json.loads(bytes(raw))
        if not isinstance(record, dict):
            raise ValueError(f"{label} is {_short(record)}; it must be an object") from None
        fields = {key: msgspec.Raw(json.dumps(value).encode()) for key, value in record.items()}
    read: dict[str, Any] = {
        key: json.loads(bytes(fields[key]))
        for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")
        if key in fields
    }
    known = f" (id {read['id']})" if "id" in read else ""
    for key in ("id", "image_id", "category_id"):
        if key not in read:
            raise ValueError(f"{label}{known} lacks the field {key!r}")
        if isinstance(read[key], list | dict | bool | None):
            raise ValueError(
                f"{label}{known}: {key!r} is {_short(read[key])}; it must be an integer or a string"
            )
        read[key] = _integer(read[key])
    box = read.get("bbox")
    numbers = list(map(_number, box)) if isinstance(box, list) and len(box) == 4 else [None]
    read["bbox"] = None if None in numbers else tuple(map(_finite, numbers))
    read["area"] = _area(read.get("area"), read["id"], path)
    for key in ("segmentation", "keypoints"):
        if key in fields:
            read[key] = fields[key]
    return _Annotation(**read)


def _number(value: Any) -> int | float | None:
    """A number, also one that is written as text; None for anything else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _finite(value: Any) -> int | float:
    """A number, NaN for one that a float64 cannot hold."""
    try:
        return value if math.isfinite(float(value)) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        return math.nan


def _area(value: Any, annotation_id: Hashable, path: str) -> float | None:
    """An area, None for one that says nothing; it is taken from mask or box then."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        area = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{path}: annotation {annotation_id}: 'area' is {_short(value)}; it must be a number "
            "of pixels"
        ) from None
    return area if math.isfinite(area) else None


class _References:
    """Ids of images and categories that the annotations name and the file does not have."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.wrong: dict[str, tuple[str, dict[Hashable, None], list[Hashable]]] = {}

    def look_at(
        self,
        records: Sequence[_Annotation],
        key: str,
        known: Mapping[Hashable, int],
        table: str,
    ) -> None:
        """Keep what is unknown in a chunk."""
        values = [getattr(a, key) for a in records]
        unknown = {value for value in set(values) if value not in known}
        if unknown:
            _, ids, where = self.wrong.setdefault(key, (table, {}, []))
            ids.update(dict.fromkeys(sorted(unknown, key=str)))
            where += [a.id for a, v in zip(records, values, strict=True) if v in unknown]

    def finish(self) -> None:
        """Raise where something was unknown."""
        for key, (table, ids, where) in self.wrong.items():
            raise ValueError(
                f"{self._path}: {key!r} {_some(ids)} of {len(where)} annotation(s) (ids "
                f"{_some(where)}) is not in {table!r}; must be an id listed there"
            )


def _ids(
    records: Sequence[dict[str, Any]], table: str, path: str, integer: bool = False
) -> list[Hashable]:
    ids = []
    for number, record in enumerate(records):
        if "id" not in record:
            raise ValueError(f"{path}: {table}[{number}] lacks the field 'id'")
        value = record["id"]
        if isinstance(value, list | dict):
            raise ValueError(
                f"{path}: {table}[{number}]: 'id' is {_short(value)}; it must be an integer"
                f"{'' if integer else ' or a string'}"
            )
        ids.append(_integer(value))
    _check_ids(ids, table, path, integer)
    return ids


def _check_ids(ids: Sequence[Hashable], table: str, path: str, integer: bool = False) -> None:
    def is_sound(value: Hashable) -> bool:
        if isinstance(value, int):
            return not isinstance(value, bool) and value in _INT64
        return isinstance(value, str) and not integer

    wrong = [i for i in ids if not is_sound(i)]
    if wrong:
        raise ValueError(
            f"{path}: {table!r}: 'id' is {_some(wrong)}; it must be an integer of 64 bits"
            f"{'' if integer else ' or a string'}"
        )
    if len(set(ids)) < len(ids):
        seen: set[Hashable] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
        raise ValueError(
            f"{path}: {table!r}: the id(s) {_some(dict.fromkeys(twice))} occur more than once; "
            "ids must be unique"
        )


def _id_array(ids: Sequence[Hashable]) -> np.ndarray:
    """Ids as int64, or as objects where some are strings."""
    if all(type(i) is int for i in ids):
        return np.array(ids, dtype=np.int64)
    array = np.empty(len(ids), dtype=object)
    array[:] = ids
    return array


def _integer(value: Any) -> Any:
    """An id written as a float becomes the integer that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole(size: float) -> bool:
    return 0 < size < 1 << 31 and size == int(size)  # some tools write 480.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _some(values: Iterable[Any]) -> str:
    return listed([_short(value) for value in values])


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys)
