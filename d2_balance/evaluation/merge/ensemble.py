"""Merges the detections of several models, which may know different classes.

Detections of one class in one image form clusters: the best detection that is in none starts one,
and each other model adds its detection of the highest IoU above a threshold, one of each model at
most. What a model itself left beside each other (its own non-maximum suppression has been over it)
stays so. A cluster becomes

- "nms": its best detection;
- "soft-nms": its best detection, and the others with a score times (1 - IoU with the best), the
  linear form of Bodla et al., arXiv:1704.04503;
- "wbf": the mean of its boxes weighted by score, with the sum of its scores divided by the number
  of models that know the class (Solovyev et al., arXiv:1910.13302, section 3, equations 1 to 6).

The rule of one detection of each model and the count of models by class are what the package
`ensemble-boxes` does not have: there a model merged with itself loses boxes of its own that
overlap, and an expert's detections lose score for each model that does not know their class. Where
neither matters, `wbf` equals its result (see the tests). Masks are those of the best member that
has one.

n: detections of a class in an image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.class_map import ClassMap, load_class_map
from d2_balance.data.resolve import load_annotations
from d2_balance.utils.files import atomic_path
from d2_balance.utils.progress import progress

from ..predictions import DetectionTexts, Predictions, read_predictions

METHODS = ("nms", "soft-nms", "wbf")
_BLOCK = 1 << 19  # detections that are merged at once


@dataclass
class Member:
    """Detections of one model, and what its classes are in the target dataset.

    Attributes:
        columns: its detections; `category` holds ids of the source.
        class_map: from the source's classes to the target's; None: they are the same.
        categories: ids of the target, all of which a model without class map knows.
    """

    columns: Predictions
    class_map: ClassMap | None
    categories: Sequence[int]

    def __post_init__(self) -> None:
        if self.class_map is not None and not self.class_map.ids:
            raise ValueError(
                f"{self.columns.path}: no class of {self.class_map.source} is a class of "
                f"{self.class_map.target}; an expert needs shared classes, give a class map file"
            )

    @property
    def knows(self) -> set[int]:
        """Category ids of the target that the model can predict."""
        return set(self.categories if self.class_map is None else self.class_map.ids.values())

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of shared classes, and their (rows,) category ids of the target."""
        category = self.columns.category
        if self.class_map is None:
            return np.arange(len(category)), category
        sources = np.array(sorted(self.class_map.ids), dtype=np.int64)
        targets = np.array([self.class_map.ids[i] for i in sources.tolist()], dtype=np.int64)
        place = np.searchsorted(sources, category).clip(max=len(sources) - 1)
        rows = np.flatnonzero(sources[place] == category)
        return rows, targets[place[rows]]

    def digest(self) -> str:
        """A key by content, which puts models in an order that does not depend on the caller's."""
        found = hashlib.sha256()
        with open(self.columns.path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                found.update(chunk)
        found.update(repr(self.class_map and sorted(self.class_map.ids.items())).encode())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Merged:
    """Detections of the result, by image, the best first.

    Attributes:
        image: (n,) index in the images of the dataset.
        score, category: (n,) of the result; category is an id of the target.
        box: (n, 4) x, y, width, height in pixels, where `moved`.
        moved: (n,) bool, whether the box is another than that of the detection.
        model, row: (n,) the detection whose text and mask the result takes.
    """

    image: np.ndarray
    score: np.ndarray
    category: np.ndarray
    box: np.ndarray
    moved: np.ndarray
    model: np.ndarray
    row: np.ndarray


class Ensemble:
    """Merges some images at a time; the order of the members makes no difference.

    Args:
        members: at least one.
        method: one of METHODS.
        iou: threshold in [0, 1) above which detections of two models may be the same object.
        max_dets: detections of an image that are kept, 0 for all.

    Raises:
        ValueError: an argument out of range, or a member without boxes.
    """

    def __init__(self, members: Sequence[Member], method: str, iou: float, max_dets: int):
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; must be one of {', '.join(METHODS)}")
        if not 0 <= iou < 1:
            raise ValueError(f"the IoU threshold is {iou}; must be a number in [0, 1)")
        if max_dets < 0:
            raise ValueError(f"max_dets is {max_dets}; it must be at least 0, which keeps all")
        for member in members:
            wrong = member.columns.out_of_range()
            if wrong is not None and len(members) > 1:
                raise ValueError(
                    f"{member.columns.path}: the score of detection {wrong} is "
                    f"{member.columns.score[wrong]:g}; scores of models that are merged must be in "
                    "[0, 1]"
                )
            if np.isnan(member.columns.box).any():
                raise ValueError(
                    f"{member.columns.path}: every detection needs a bbox; boxes are what is merged"
                )
        self.members = sorted(members, key=Member.digest)
        self.method, self.iou, self.max_dets = method, iou, max_dets
        known = [member.knows for member in self.members]
        self._models = {c: sum(c in k for k in known) for c in set().union(*known)}
        self._collect()

    def _collect(self) -> None:
        """One table of all members' rows, sorted by image, class, and descending score."""
        kept = [member.kept() for member in self.members]
        columns = [m.columns for m in self.members]
        rows = [rows for rows, _ in kept]
        image = np.concatenate([c.image[r] for c, r in zip(columns, rows, strict=True)])
        score = np.concatenate([c.score[r] for c, r in zip(columns, rows, strict=True)])
        box = np.concatenate([c.box[r] for c, r in zip(columns, rows, strict=True)])
        masks = [c.has_mask[r] for c, r in zip(columns, rows, strict=True)]
        category = np.concatenate([targets for _, targets in kept])
        model = np.repeat(np.arange(len(rows), dtype=np.int16), [len(r) for r in rows])
        # equal scores are ordered by box, then by model
        order = np.lexsort((model, *box.T[::-1], -score, category, image))
        self._image, self._score, self._category = image[order], score[order], category[order]
        self._box, self._model = box[order], model[order]
        self._row = np.concatenate(rows)[order]
        self._has_mask = np.concatenate(masks)[order]

    def merge(self, images: int) -> Iterator[Merged]:
        """Yield the result for some of the dataset's images at a time."""
        starts = np.searchsorted(self._image, np.arange(images + 1))
        first = 0
        while first < images:
            end = int(np.searchsorted(starts, starts[first] + _BLOCK, side="right")) - 1
            end = min(max(end, first + 1), images)
            yield self._merge_part(slice(int(starts[first]), int(starts[end])))
            first = end

    def _merge_part(self, part: slice) -> Merged:
        """Merge the detections of some images."""
        category, score = self._category[part], self._score[part]
        image, model = self._image[part], self._model[part]
        others = np.append(True, (np.diff(category) != 0) | (np.diff(image) != 0))
        group = np.cumsum(others[: len(category)]) - 1
        close = _close(self._box[part], model, group, self.iou)
        if self.method == "wbf":  # its boxes move, and may come close to others of the class
            linked = np.zeros(len(group), dtype=bool)
            linked[group[close]] = True
            close = linked[group]
        alone = np.flatnonzero(~close)
        own = score[alone]
        if self.method == "wbf":
            own = own / self._known(category[alone])
        parts = [(alone, alone, own, np.zeros((len(alone), 4)), np.zeros(len(alone), bool))]
        if close.any():
            parts.append(self._merge_close(part, np.flatnonzero(close), group))
        at, place, new, box, moved = (np.concatenate(c) for c in zip(*parts, strict=True))
        keys = model[at], self._row[part][at]
        order = np.lexsort(
            (keys[1], keys[0], *box.T[::-1], moved, category[place], -new, image[place])
        )
        if self.max_dets:
            sorted_image = image[place][order]
            rank = np.arange(len(order)) - np.searchsorted(sorted_image, sorted_image)
            order = order[rank < self.max_dets]
        columns = image[place], new, category[place], box, moved, *keys
        return Merged(*(column[order] for column in columns))

    def _known(self, category: np.ndarray) -> np.ndarray:
        """How many models know each class."""
        ids = np.array(sorted(self._models), dtype=np.int64)
        return np.array([self._models[i] for i in ids.tolist()])[np.searchsorted(ids, category)]

    def _merge_close(
        self, part: slice, rows: np.ndarray, group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Merge detections that may have something to merge with.

        Returns:
            For each of the result the detection whose text it takes and the one that it stands
            for, score, box, and whether that is another.
        """
        edges = np.flatnonzero(np.diff(group[rows])) + 1
        starts = np.append(0, edges)
        single = self._single(part, rows, starts)
        best = rows[starts[single]]
        score, model = self._score[part][rows].tolist(), self._model[part][rows].tolist()
        box, category = self._box[part][rows].tolist(), self._category[part][rows].tolist()
        masks = self._has_mask[part][rows].tolist()
        merged: list[tuple[int, int, float, list[float] | None]] = []
        ends = np.append(edges, len(rows))
        for a, b in np.column_stack([starts, ends])[~single].tolist():
            clusters = cluster(box[a:b], score[a:b], model[a:b], self.iou, self.method == "wbf")
            for found in clusters:
                members = [a + n for n in found]
                for row, new_score, new_box in self._fuse(members, score, box, category[a]):
                    leader = row if masks[row] else self._masked(masks, members, row)
                    if leader != row and new_box is None:
                        new_box = box[row]
                    merged.append((leader, row, new_score, new_box))
        chosen = np.array([m[:2] for m in merged], dtype=np.int64).reshape(-1, 2)
        leaders, places = (np.append(best, rows[chosen[:, k]]) for k in (0, 1))
        scores = np.append(self._score[part][best], [m[2] for m in merged])
        boxes = np.zeros((len(scores), 4))
        boxes[len(best) :] = np.array([m[3] or (0.0,) * 4 for m in merged]).reshape(-1, 4)
        moved = np.zeros(len(scores), dtype=bool)
        moved[len(best) :] = [m[3] is not None for m in merged]
        return leaders, places, scores, boxes, moved

    def _single(self, part: slice, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Groups that are one cluster of which "nms" keeps the best detection as it is.

        Args:
            part: the detections.
            rows: (n,) some of them, group by group.
            starts: (m,) where each group begins in `rows`.

        Returns:
            (m,) bool, groups of one detection of each model, all of which overlap with the best;
            if any of them has a mask, so has the best.
        """
        if self.method != "nms":
            return np.zeros(len(starts), dtype=bool)
        size = np.diff(starts, append=len(rows))
        first = np.repeat(starts, size)
        box, mask = self._box[part][rows], self._has_mask[part][rows]
        model = self._model[part][rows].astype(np.int64)
        alike = (_overlaps(box, box[first]) > self.iou) & (mask[first] | ~mask)
        single = np.logical_and.reduceat(alike, starts)
        keys = np.sort(np.repeat(np.arange(len(starts)), size) * len(self.members) + model)
        twice = keys[1:][keys[1:] == keys[:-1]]
        single[twice // len(self.members)] = False
        return single

    def _masked(self, masks: Sequence[bool], members: Sequence[int], leader: int) -> int:
        """The best member with a mask, the leader where there is none (members of soft-NMS)."""
        if self.method == "soft-nms":
            return leader
        return next((m for m in members if masks[m]), leader)

    def _fuse(
        self, members: list[int], score: list, box: list, category: int
    ) -> list[tuple[int, float, list[float] | None]]:
        """(row, score, box or None for its own) of what a cluster becomes; members best first."""
        best = members[0]
        if self.method == "nms":
            return [(best, score[best], None)]
        if self.method == "soft-nms":
            left = [(m, score[m] * (1 - overlap(box[best], box[m])), None) for m in members[1:]]
            return [(best, score[best], None), *(item for item in left if item[1] > 0)]
        scores = [score[m] for m in members]
        models = self._models[category]
        same = all(s == scores[0] for s in scores) and len(scores) == models
        # without this three equal scores would have a mean that is one rounding error off
        mean = scores[0] if same else sum(scores) / models
        if all(box[m] == box[best] for m in members):
            return [(best, mean, None)]
        return [(best, mean, weighted_box([box[m] for m in members], scores))]

    def texts(self, merged: Merged, sources: Sequence[DetectionTexts]) -> list[bytes]:
        """The result as JSON texts; untouched detections keep theirs to the letter."""
        lines: list[bytes] = [b""] * len(merged.row)
        for model, (member, source) in enumerate(zip(self.members, sources, strict=True)):
            at = np.flatnonzero(merged.model == model)
            rows = merged.row[at]
            scored = merged.score[at] != member.columns.score[rows]
            other = merged.category[at] != member.columns.category[rows]
            untouched = ~(scored | other | merged.moved[at])
            texts = source.texts(rows[untouched])
            for n, text in zip(at[untouched].tolist(), texts, strict=True):
                lines[n] = text
            for k in np.flatnonzero(~untouched).tolist():
                n = at[k]
                fields: dict[str, object] = {}
                if scored[k]:
                    fields["score"] = float(merged.score[n])
                if other[k]:
                    fields["category_id"] = int(merged.category[n])
                if merged.moved[n]:
                    fields["bbox"] = merged.box[n].tolist()
                lines[n] = source.changed(int(rows[k]), **fields)
        return lines


def _close(box: np.ndarray, model: np.ndarray, group: np.ndarray, iou: float) -> np.ndarray:
    """(n,) whether a detection has more than `iou` with one of its group of another model.

    Args:
        box: (n, 4) x, y, width, height.
        model: (n,) which model each is of.
        group: (n,) ascending.
        iou: threshold.
    """
    close = np.zeros(len(box), dtype=bool)
    size = np.bincount(group) if len(group) else np.zeros(1, int)
    left = np.flatnonzero(size[group] > 1)
    for step in range(1, int(size.max())):
        left = left[left + step < len(group)]
        left = left[group[left] == group[left + step]]
        a = left[model[left] != model[left + step]]
        b = a + step
        hit = _overlaps(box[a], box[b]) > iou
        close[a[hit]] = close[b[hit]] = True
    return close


def _overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`overlap` of (n, 4) boxes with (n, 4) others, by the same operations; (n,)."""
    inner = np.minimum(one[:, :2] + one[:, 2:], other[:, :2] + other[:, 2:])
    inner = (inner - np.maximum(one[:, :2], other[:, :2])).clip(0).prod(axis=1)
    union = one[:, 2] * one[:, 3] + other[:, 2] * other[:, 3] - inner
    found = np.divide(inner, union, out=np.zeros(len(one)), where=inner > 0)
    found[(one == other).all(axis=1)] = 1.0
    return found


def cluster(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    models: Sequence[int],
    iou: float,
    fuse: bool,
) -> list[list[int]]:
    """Clusters of detections of one class in one image.

    Args:
        boxes: (n, 4) x, y, width, height, best score first.
        scores: (n,) descending.
        models: (n,) which model each is of.
        iou: threshold; more than this joins.
        fuse: True compares with the weighted mean of a cluster's boxes, as weighted boxes fusion
            does; False with its first.

    Returns:
        Positions in the list, for each cluster with the best first.
    """
    if len(set(models)) == 1:
        return [[n] for n in range(len(models))]
    groups: list[list[int]] = []
    present: list[set[int]] = []
    faces: list[Sequence[float]] = []
    for n, (box, model) in enumerate(zip(boxes, models, strict=True)):
        best, best_iou = -1, iou
        x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
        for g, face in enumerate(faces):
            if x0 > face[0] + face[2] or face[0] > x1 or y0 > face[1] + face[3] or face[1] > y1:
                continue
            if model not in present[g]:
                found = overlap(face, box)
                if found > best_iou:
                    best, best_iou = g, found
        if best < 0:
            groups.append([n])
            present.append({model})
            faces.append(box)
            continue
        groups[best].append(n)
        present[best].add(model)
        if fuse:
            members = groups[best]
            faces[best] = weighted_box([boxes[m] for m in members], [scores[m] for m in members])
    return groups


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes x, y, width, height; 1 where they are equal, even without area."""
    if a == b:
        return 1.0
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    return inner / (a[2] * a[3] + b[2] * b[3] - inner)


def weighted_box(boxes: Sequence[Sequence[float]], scores: Sequence[float]) -> list[float]:
    """Mean of boxes (x, y, width, height) weighted by scores; plain where all scores are 0."""
    if all(box == boxes[0] for box in boxes):
        return list(boxes[0])
    total = sum(scores)
    weights = [s / total for s in scores] if total > 0 else [1 / len(scores)] * len(scores)
    return [sum(w * box[k] for w, box in zip(weights, boxes, strict=True)) for k in range(4)]


def merge_files(
    inputs: Sequence[tuple[str, str | None, str | None]],
    dataset: str,
    output: str,
    *,
    method: str = "nms",
    iou: float = 0.5,
    max_dets: int = 300,
) -> str:
    """Merge prediction files.

    Args:
        inputs: (file, dataset whose classes it has or None for those of `dataset`, class map file
            or None for names and synsets).
        dataset: name or annotation file of the images and of the result's classes.
        output: file to write, atomically; it must be new.
        method: see `Ensemble`.
        iou: see `Ensemble`.
        max_dets: see `Ensemble`.

    Returns:
        What each file gave and what came out, as text.

    Raises:
        ValueError: files that do not fit the dataset, an expert without shared classes, or an
            argument out of range.
        FileExistsError: the output is there.
    """
    if os.path.exists(output):
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new file")
    if not inputs:
        raise ValueError("nothing to merge: give prediction files, or --expert")
    truth = load_annotations(dataset, "--dataset")
    read = [_member(truth, *source) for source in inputs]
    ensemble = Ensemble([member for member, _ in read], method, iou, max_dets)
    images = len(truth.image_id)
    written = _write(ensemble, images, output)
    lines = [text for _, text in read]
    return "\n".join([*lines, f"{output}: {written:,} detections on {images:,} images, {method}"])


def _member(
    truth: Annotations, path: str, classes: str | None, map_file: str | None
) -> tuple[Member, str]:
    ids = truth.category_id.tolist()
    if classes is None:
        columns = read_predictions(path, truth)
        return Member(columns, None, ids), f"{path}: {len(columns):,} detections"
    source = load_annotations(classes, f"classes of {path}")
    found = load_class_map(map_file, source.categories, truth.categories, (classes, truth.name))
    columns = read_predictions(path, truth, source)
    member = Member(columns, found, ids)
    kept = len(member.kept()[0])
    head = f"{path}: {kept:,} of {len(columns):,} detections are of shared classes"
    return member, f"{head}\n{found.report()}"


def _write(ensemble: Ensemble, images: int, output: str) -> int:
    count = 0
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(output))
        texts = [stack.enter_context(DetectionTexts(member.columns)) for member in ensemble.members]
        file = stack.enter_context(open(temporary, "wb"))
        file.write(b"[")
        for merged in progress(ensemble.merge(images), "merging"):
            lines = ensemble.texts(merged, texts)
            # a line for each image
            edges = [0, *(np.flatnonzero(np.diff(merged.image)) + 1).tolist(), len(lines)]
            for a, b in pairwise(edges):
                if b > a:
                    file.write((b"," if count else b"") + b"\n" + b", ".join(lines[a:b]))
                    count += b - a
        file.write(b"\n]\n")
    return count
