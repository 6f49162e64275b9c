"""Re-scoring: scores of rare classes are raised before the cap on detections of an image.

LVIS counts the best 300 detections of an image over all classes. Scores of rare classes are low,
and the cap cuts them. AP ranks within a class, so that one factor for all scores of a class changes
which detections pass the cap, and nothing else. Two rules, both fitted on images of the training
set that the models did not see:

- "groups": a factor for each frequency group (rare, common, frequent), the largest of them 1;
- "norcal": s' = (s / n^gamma) / (s / n^gamma + 1 - s) with n the class's training images, which is
  NorCal (arXiv:2107.02170, equation 5) with the rest of the scores as one other class.

A file holds one score of each detection, that of its class, and both rules need no more. NorCal
with the scores of all classes is MODEL.BALANCE.NORCAL.GAMMA, before the predictions are written.

D: detections; K: classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d2_balance.data.annotations import Annotations
from d2_balance.data.checks.annotations import NO_MASK
from d2_balance.data.groups import GROUPS, LVIS_CUTS
from d2_balance.data.resolve import load_annotations
from d2_balance.utils.files import atomic_path, read_json
from d2_balance.utils.text import percent, table

from ..groups import group_metrics, resolve_groups, training_counts
from ..matching import SIZES, APTable, GroundTruth, Matcher, Ranked, select
from ..predictions import DetectionTexts, Predictions, capped, read_predictions

METHODS = ("groups", "norcal")
METRICS = ("AP", "APr", "APc", "APf")
"""What can be maximised."""
STEPS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
"""Factors tried for rare and common classes, those of frequent ones being 1."""
GAMMAS = tuple(round(0.1 * n, 1) for n in range(16))
_ROUNDS = 3


@dataclass(frozen=True)
class Rescoring:
    """A rule with its numbers, and where they come from.

    Attributes:
        method: one of METHODS.
        factors: factor of each group, letters of GROUPS; for "groups".
        gamma: at least 0; for "norcal".
        groups: class name to the letter of its group.
        image_count: class name to its training images; for "norcal".
        fitted_on: name of the images it was fitted on, "" for numbers given by hand.
    """

    method: str
    groups: dict[str, str]
    factors: dict[str, float]
    gamma: float = 0.0
    image_count: dict[str, int] | None = None
    fitted_on: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method {self.method!r} is unknown; must be one of {', '.join(METHODS)}"
            )
        for letter, factor in self.factors.items():
            if letter not in GROUPS or not 0 < factor < float("inf"):
                raise ValueError(
                    f"factor {letter!r}: {factor!r}; must be one of the groups {', '.join(GROUPS)} "
                    "with numbers above 0"
                )
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"gamma is {self.gamma!r}; it must be a number of at least 0")
        if self.method == "norcal" and self.gamma and self.image_count is None:
            raise ValueError("norcal needs the training images of each class")

    def write(self, path: str, **more: Any) -> None:
        """Write as JSON, atomically; `more` are figures for readers, which `read` leaves out."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"rescoring": asdict(self), **more}, file, indent=1)

    @classmethod
    def read(cls, path: str) -> Rescoring:
        """Read what `write` wrote.

        Raises:
            ValueError: naming the file.
        """
        found = read_json(path)
        try:
            return cls(**found["rescoring"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: no file of factors; `d2-balance rescore fit` writes them ({error})"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def scores(self, predictions: Predictions, names: Mapping[int, str]) -> np.ndarray:
        """(D,) scores after the rule.

        Args:
            predictions: the detections.
            names: class name by category id.

        Raises:
            ValueError: classes that the rule does not know.
        """
        missing = [name for name in names.values() if name not in self.groups]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} classes have no frequency group in the factors, "
                f"such as {missing[0]!r}; fit them on a dataset of the same classes"
            )
        ids = np.array(sorted(names), dtype=np.int64)
        if self.method == "groups":
            by_class = [self.factors.get(self.groups[names[i]], 1.0) for i in ids.tolist()]
            return (
                predictions.score * np.array(by_class)[np.searchsorted(ids, predictions.category)]
            )
        if self.gamma == 0:
            return predictions.score.copy()
        images = self.image_count or {}
        counts = np.array([max(images.get(names[i], 0), 1) for i in ids.tolist()])
        shrunk = (
            predictions.score / counts[np.searchsorted(ids, predictions.category)] ** self.gamma
        )
        return shrunk / (shrunk + 1 - predictions.score.clip(0, 1))


class Measure:
    """AP of detections whose scores change, at the cap; matched once.

    A rule keeps the order of the scores within a class, so that it changes only which detections
    pass the cap.

    Args:
        truth: annotations of the images.
        predictions: the detections.
        groups: frequency group by class name.
        task: "bbox" or "segm".
        max_dets: detections of an image that count.
    """

    def __init__(
        self,
        truth: Annotations,
        predictions: Predictions,
        groups: Mapping[str, str],
        task: str,
        max_dets: int,
    ):
        self.truth, self.predictions = truth, predictions
        ground = GroundTruth(truth, task)
        detections = select(ground, predictions, None)
        self._ranked = Ranked(Matcher(ground, detections))
        self._rows = detections.row[self._ranked.order]
        self._letters = [groups.get(name) for name in truth.class_names.values()]
        self._cap = Cap(predictions.image, max_dets)

    def __call__(self, scores: np.ndarray) -> dict[str, float]:
        """AP, APr, APc, APf and others in percent, for (D,) scores."""
        values = self._ranked.average_precision(self._cap(scores)[self._rows].astype(np.int32))
        sizes = np.full((*values.shape, len(SIZES)), np.nan)
        sizes[..., 0] = values
        table = APTable(self._ranked.class_ids, sizes, self._ranked.iou_thresholds)
        return group_metrics(table, self._letters, self.truth.name)[0]


class Cap:
    """The detections that pass a cap on those of an image.

    Args:
        image: (D,) image of each detection.
        max_dets: detections of an image that pass.

    Attributes:
        cuts: whether an image has more.
    """

    def __init__(self, image: np.ndarray, max_dets: int) -> None:
        self._count, self._max_dets = len(image), max_dets
        order = np.argsort(image, kind="stable")
        sorted_image = image[order]
        start = np.searchsorted(sorted_image, sorted_image)
        place = np.arange(len(order)) - start
        size = np.searchsorted(sorted_image, sorted_image, side="right") - start
        full = size > max_dets
        self.cuts = bool(full.any())
        # a row for each image that has more
        line = np.cumsum(np.append(True, sorted_image[full][1:] != sorted_image[full][:-1])) - 1
        width = int(size.max(initial=0))
        self._table = np.full((int(line[-1]) + 1 if self.cuts else 0, width), -1)
        self._table[line[: full.sum()], place[full]] = order[full]

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(D,) bool for (D,) scores; of equal scores the first in the file pass."""
        kept = np.ones(self._count, dtype=bool)
        if not self.cuts:
            return kept
        there = self._table >= 0
        own = np.where(there, scores[self._table], -np.inf)
        last = -np.partition(-own, self._max_dets - 1, axis=1)[:, self._max_dets - 1, None]
        above = own > last
        tied = (own == last) & there
        left = self._max_dets - above.sum(axis=1, keepdims=True)
        passes = above | (tied & (np.cumsum(tied, axis=1) <= left))
        kept[self._table[there & ~passes]] = False
        return kept


def fit(  # noqa: C901  the search and what it asks for
    measure: Measure,
    groups: Mapping[str, str],
    counts: Mapping[str, int] | None,
    method: str = "groups",
    metric: str = "AP",
) -> tuple[Rescoring, list[tuple[str, dict[str, float]]]]:
    """Choose factors, or gamma, of the best AP.

    Factors of rare and common classes are searched together, then one at a time, until none gains;
    of equal ones the smallest stays, so that classes without influence keep factor 1.

    Args:
        measure: AP on the held-out images.
        groups: frequency group by class name.
        counts: training images by class name; needed by "norcal".
        method: one of METHODS.
        metric: what to maximise, a key of the measure's results.

    Returns:
        The rule, and what was tried: (text, metrics).
    """
    predictions, names = measure.predictions, measure.truth.class_names
    tried: dict[tuple[float, ...], dict[str, float]] = {}

    def rule(values: tuple[float, ...]) -> Rescoring:
        gamma, factors = 0.0, dict[str, float]()
        if method == "norcal":
            gamma = values[0]
        else:
            top = max(*values, 1.0)
            factors = {"r": values[0] / top, "c": values[1] / top, "f": 1 / top}
        counted = dict(counts) if counts is not None and method == "norcal" else None
        return Rescoring(method, dict(groups), factors, gamma, counted, measure.truth.name)

    def value(values: tuple[float, ...]) -> float:
        if values not in tried:
            tried[values] = measure(rule(values).scores(predictions, names))
        found = tried[values][metric]
        return -1.0 if np.isnan(found) else found

    best: tuple[float, ...] = (0.0,) if method == "norcal" else (1.0, 1.0)
    choices = GAMMAS if method == "norcal" else STEPS
    # rare and common together first: alone, the one pushes out the other
    moves = [{0}] if method == "norcal" else [{0, 1}, {0}, {1}]
    for _ in range(_ROUNDS):
        before = best
        for places in moves:
            for choice in choices:
                candidate = tuple(choice if n in places else v for n, v in enumerate(best))
                if value(candidate) > value(best) + 1e-9:
                    best = candidate
        if best == before:
            break
    for place in range(len(best)):  # a factor that gains nothing by itself goes back
        smaller = [(*best[:place], c, *best[place + 1 :]) for c in choices if c < best[place]]
        best = next((v for v in smaller if value(v) >= value(best) - 1e-9), best)
    return rule(best), [(_text(method, v), metrics) for v, metrics in sorted(tried.items())]


def _text(method: str, values: Sequence[float]) -> str:
    if method == "norcal":
        return f"gamma {values[0]:g}"
    return f"rare {values[0]:g}, common {values[1]:g}, frequent 1"


def changes(
    predictions: Predictions,
    scores: np.ndarray,
    names: Mapping[int, str],
    groups: Mapping[str, str],
    max_dets: int,
) -> list[list]:
    """Rows of (group, classes, detections, kept before, kept after) for a table."""
    letters = np.array(
        [groups.get(names[c], "") for c in predictions.category.tolist()], dtype="<U1"
    )
    before, after = (capped(predictions, s, max_dets) for s in (predictions.score, scores))
    rows = []
    for letter, name in GROUPS.items():
        classes = sum(groups.get(n) == letter for n in names.values())
        parts = (letters, letters[before], letters[after])
        rows.append([name, classes, *(int((part == letter).sum()) for part in parts)])
    return rows


def check_held_out(truth: Annotations, tests: Sequence[Annotations]) -> None:
    """Refuse to fit on what is evaluated on.

    Raises:
        ValueError: `truth` is one of the test sets, or shares images with one (equal id, and no
            file names that differ).
    """
    ours = _file_names(truth)
    for test in tests:
        if os.path.realpath(truth.path) == os.path.realpath(test.path):
            raise ValueError(
                f"{truth.name} is {test.name}, which is evaluated on; factors are fitted on "
                "images of the training set that were held out"
            )
        shared = [
            image
            for image, name in _file_names(test).items()
            if image in ours and not _differ(name, ours[image])
        ]
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(ours)} images of {truth.name} are in {test.name} as well"
                f", which is evaluated on: image ids {', '.join(map(str, shared[:5]))}; fit on "
                "images of the training set that were held out"
            )


def _file_names(annotations: Annotations) -> dict[Hashable, bytes]:
    """Where each image is from, by id; b"" where the file does not say."""
    names = zip(annotations.coco_url, annotations.file_name, strict=True)
    ids = annotations.image_id.tolist()
    return {i: url or name for i, (url, name) in zip(ids, names, strict=True)}


def _differ(a: bytes, b: bytes) -> bool:
    return bool(a and b) and a.split(b"/")[-1] != b.split(b"/")[-1]


def fit_factors(
    path: str,
    dataset: str,
    output: str,
    *,
    tests: Sequence[str],
    trained_on: Sequence[str] = (),
    train: str | None = None,
    method: str = "groups",
    task: str = "",
    metric: str = "AP",
    max_dets: int = 300,
) -> str:
    """Fit a rule on held-out images and write it.

    Args:
        path: prediction file of the held-out images.
        dataset: the held-out images.
        output: file to write; it must be new.
        tests: datasets that are evaluated on; `dataset` must share no image with them.
        trained_on: datasets the model was trained on; shared images are reported.
        train: dataset that gives groups and counts; None: `dataset`.
        method: one of METHODS.
        task: "bbox" or "segm"; "": masks if everything has one.
        metric: what to maximise, one of METRICS.
        max_dets: detections of an image that count.

    Returns:
        What was chosen and what it changes, as text.

    Raises:
        ValueError: no test set is named, the images are among those of one, or the classes have
            no frequency groups.
        FileExistsError: the output is there.
    """
    _check_output(output, max_dets)
    if not tests:
        raise ValueError(
            "name what is evaluated on with --test or --run; factors are never fitted on it"
        )
    truth = load_annotations(dataset)
    check_held_out(truth, [load_annotations(test, "--test") for test in tests])
    notes = [_trained_on(truth, load_annotations(name, "--run")) for name in trained_on]
    groups, counts = _groups(truth, load_annotations(train, "--train") if train else truth)
    predictions = read_predictions(path, truth)
    if not task:
        masks = len(predictions) and predictions.has_mask.all()
        task = "segm" if masks and _all_masks(truth) else "bbox"
    lacking = ~predictions.has_mask if task == "segm" else np.isnan(predictions.box[:, 0])
    if lacking.any():
        what = "a mask" if task == "segm" else "a bbox"
        raise ValueError(
            f"{path}: {task} needs {what} in every detection, {lacking.sum()} "
            "have none; --task chooses the other"
        )
    if not Cap(predictions.image, max_dets).cuts:
        raise ValueError(
            f"{path}: no image has more than {max_dets} detections: the cap cuts nothing, and "
            "factors would change nothing. Predict with a larger TEST.DETECTIONS_PER_IMAGE and a "
            "smaller score threshold"
        )
    measure = Measure(truth, predictions, groups, task, max_dets)
    plain = measure(predictions.score)
    rule, tried = fit(measure, groups, counts, method, metric)
    scores = rule.scores(predictions, truth.class_names)
    after = measure(scores)
    rule.write(
        output,
        task=task,
        metric=metric,
        max_dets=max_dets,
        before={k: plain[k] for k in METRICS},
        after={k: after[k] for k in METRICS},
        tried=[[text, {k: metrics[k] for k in METRICS}] for text, metrics in tried],
    )
    chosen = (
        f"gamma {rule.gamma:g}"
        if method == "norcal"
        else ", ".join(f"{k} {v:.3g}" for k, v in rule.factors.items())
    )
    lines = [
        *notes,
        f"{len(tried)} settings tried on {dataset}, {task}; best {metric}: {chosen}",
        _metrics(plain, after),
        _change_table(changes(predictions, scores, truth.class_names, groups, max_dets), max_dets),
    ]
    return "\n".join(filter(None, lines))


def apply_factors(
    path: str, factors: str, dataset: str, output: str, *, max_dets: int = 300
) -> str:
    """Write predictions with new scores, the best `max_dets` of each image (0: all).

    Returns:
        What changed, as text.

    Raises:
        ValueError: files that do not fit each other.
        FileExistsError: the output is there.
    """
    _check_output(output, max_dets, 0)
    rule = Rescoring.read(factors)
    truth = load_annotations(dataset)
    predictions = read_predictions(path, truth)
    scores = rule.scores(predictions, truth.class_names)
    rows = capped(predictions, scores, max_dets).tolist()
    if rows:
        with (
            DetectionTexts(predictions) as texts,
            atomic_path(output) as temporary,
            open(temporary, "wb") as file,
        ):
            for number, row in enumerate(rows):
                same = scores[row] == predictions.score[row]
                text = texts.text(row) if same else texts.changed(row, score=float(scores[row]))
                file.write((b",\n" if number else b"[\n") + text)
            file.write(b"\n]\n")
    else:
        with atomic_path(output) as temporary, open(temporary, "w") as file:
            file.write("[]\n")
    changed = int((scores != predictions.score).sum())
    table = _change_table(
        changes(predictions, scores, truth.class_names, rule.groups, max_dets), max_dets
    )
    counts = f"{changed:,} of {len(predictions):,} scores changed"
    return f"{output}: {len(rows):,} detections; {counts}\n{table}"


def _check_output(output: str, max_dets: int, least: int = 1) -> None:
    if os.path.exists(output):
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new file")
    if max_dets < least:
        raise ValueError(f"max_dets is {max_dets}; it must be at least {least}")


def _groups(truth: Annotations, train: Annotations) -> tuple[dict[str, str], dict[str, int]]:
    """Frequency group and training images by class name."""
    names = list(truth.class_names.values())
    place = {name: k for k, name in enumerate(train.class_names.values())}
    missing = [name for name in names if name not in place]
    if missing:
        raise ValueError(f"{train.name} lacks {len(missing)} classes, such as {missing[0]!r}")
    chosen = [place[name] for name in names]
    own, letters = train.training_image_count, train.file_groups
    counts = training_counts(names, train.image_count, own and [own[k] for k in chosen], train.name)
    groups = resolve_groups(
        names, None, letters and [letters[k] for k in chosen], counts, LVIS_CUTS
    )
    return (
        {name: group for name, group in zip(names, groups, strict=True) if group},
        {name: count or 0 for name, count in zip(names, counts, strict=True)},
    )


def _trained_on(truth: Annotations, train: Annotations) -> str:
    """Say how many of the images the model was trained on, "" if none."""
    ids = set(train.image_id.tolist())
    seen = sum(image in ids for image in truth.image_id.tolist())
    if not seen:
        return ""
    return (
        f"- {seen} of {len(truth.image_id)} images have ids of {train.name}, which the "
        "model was trained on: its scores are higher there than on new images"
    )


def _all_masks(truth: Annotations) -> bool:
    return bool((truth.mask[truth.usable] != NO_MASK).all())


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = [
        [name, *(percent(figures[k], 2) for k in METRICS)]
        for name, figures in (("before", before), ("after", after))
    ]
    return table(rows, ["", *METRICS])


def _change_table(rows: list[list], max_dets: int) -> str:
    cap = f"of {max_dets} an image" if max_dets else "(no cap)"
    return table(
        rows, ["group", "classes", "detections", f"kept {cap}, before", "after"], align=True
    )
