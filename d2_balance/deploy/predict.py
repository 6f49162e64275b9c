"""Predict on files: images, directories and videos become COCO JSON and drawn images.

An output directory holds `predictions.json`, a JSON list of detections as COCO's results are,
`images.json`, a COCO file of the images and classes they are for, and `drawn/`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from typing import IO, Any

import cv2
import msgspec
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from PIL import Image

from d2_balance.evaluation.draw import overlay
from d2_balance.utils.files import atomic_path, read_json
from d2_balance.utils.progress import progress
from d2_balance.utils.workers import leave_signals

from .predictor import Prediction, Predictor

IMAGES = frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
PREDICTIONS, DATASET, DRAWN = "predictions.json", "images.json", "drawn"
_COLOURS = colormap(rgb=True, maximum=1)
_MOST = 8  # workers on a CPU, for each needs memory for an image
# forked, as PyTorch's loader does it: a new interpreter takes seconds to import this
_START = "fork" if "fork" in get_all_start_methods() else None

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A file to predict on.

    Attributes:
        path: of the file.
        name: its name in the output, relative to what the files have in common, with slashes.
        is_video: whether it holds many images.
    """

    path: str
    name: str
    is_video: bool


@dataclass
class PredictionReport:
    """What was done.

    Attributes:
        images: images, and frames of videos, that have a prediction.
        detections: detections that were written.
        failed: path and reason of every file that could not be read.
    """

    images: int = 0
    detections: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def find_sources(paths: Sequence[str]) -> list[Source]:
    """List the files that arguments stand for.

    Args:
        paths: images, videos, and directories, which stand for the images and videos below them.

    Returns:
        The files in the order of the arguments, those of a directory by name.

    Raises:
        ValueError: a path does not exist, a directory holds no image, or a file is named twice.
    """
    found: list[tuple[str, str]] = []  # path, and directory that its name is relative to
    for path in paths:
        if os.path.isdir(path):
            files = sorted(_below(path))
            if not files:
                raise ValueError(f"{path}: the directory holds no image and no video")
            found += [(file, path) for file in files]
        elif os.path.isfile(path):
            found.append((path, os.path.dirname(os.path.abspath(path))))
        else:
            raise ValueError(f"{path} does not exist; it must be an image, a video or a directory")
    roots = {os.path.abspath(root) for _, root in found}
    common = os.path.commonpath(roots)
    seen: dict[str, str] = {}
    sources = []
    for path, _ in found:
        name = os.path.relpath(os.path.abspath(path), common).replace(os.sep, "/")
        if name in seen:
            raise ValueError(f"{path} is given twice ({seen[name]})")
        seen[name] = path
        sources.append(Source(path, name, os.path.splitext(path)[1].lower() in VIDEOS))
    return sources


def _below(directory: str) -> Iterator[str]:
    for parent, directories, names in os.walk(directory):
        directories[:] = [d for d in directories if not d.startswith(".")]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and (ending in IMAGES or ending in VIDEOS):
                yield os.path.join(parent, name)


def image_ids(sources: Sequence[Source], annotations: str = "") -> list[int]:
    """Return the image id of every source that is an image; videos get 0, their frames come last.

    Args:
        sources: what is predicted on.
        annotations: COCO file whose `images` give the ids by file name; "" counts from 1.

    Raises:
        ValueError: an image that the file does not list, or lists under several ids.
    """
    if not annotations:
        return [0 if source.is_video else n for n, source in enumerate(sources, start=1)]
    data = read_json(annotations)
    images = data.get("images", []) if isinstance(data, dict) else []
    by_name: dict[str, set[int]] = {}
    for record in images:
        name = str(record.get("file_name") or record.get("coco_url") or "").replace(os.sep, "/")
        for key in {name, name.rpartition("/")[2]}:
            by_name.setdefault(key, set()).add(record["id"])
    ids = []
    for source in sources:
        known = by_name.get(source.name) or by_name.get(source.name.rpartition("/")[2]) or set()
        if source.is_video:
            raise ValueError(f"{source.path} is a video; {annotations} gives ids to images only")
        if len(known) != 1:
            state = "lists no image" if not known else f"has {len(known)} images"
            raise ValueError(
                f"{annotations} {state} of the name {source.name!r}; give the directory that its "
                "file names are relative to"
            )
        ids.append(known.pop())
    return ids


def check_output(output: str) -> None:
    """Refuse a directory that holds results.

    Raises:
        FileExistsError: naming it.
    """
    for name in (PREDICTIONS, DATASET, DRAWN):
        if os.path.exists(path := os.path.join(output, name)):
            raise FileExistsError(f"{path} exists, and nothing is overwritten; give another output")


def predict_files(
    predictor: Predictor,
    sources: Sequence[Source],
    output: str,
    *,
    annotations: str = "",
    batch_size: int = 4,
    num_workers: int | None = None,
    draw: bool = True,
    min_drawn_score: float = 0.3,
    quiet: bool = False,
) -> PredictionReport:
    """Predict on files and write what was detected.

    A file that cannot be read is listed in the report, and the others are still predicted. Ctrl-C
    and SIGTERM go on to the caller, and the output holds the images that were done.

    Args:
        predictor: the model.
        sources: see `find_sources`.
        output: directory; it must not hold results.
        annotations: see `image_ids`.
        batch_size: images that the model takes at once.
        num_workers: processes that read images, and as many that paste masks, draw and write. On
            a CPU they detect as well, one image at a time with one thread each, which takes less
            time than many threads for one image. 0 does everything in this process; None is 2, and
            on a CPU the number of threads that PyTorch would take, up to 8.
        draw: whether to write drawn images and videos.
        min_drawn_score: detections below it are not drawn.
        quiet: whether to show no progress.

    Raises:
        FileExistsError: the output holds results.
        ValueError: an image without an id; a number out of range.
    """
    check_output(output)
    num_workers = _checked_workers(predictor, batch_size, num_workers)
    ids = image_ids(sources, annotations)
    targets = _drawn_paths(sources, os.path.join(output, DRAWN)) if draw else {}
    stills = [(s, n) for s, n in zip(sources, ids, strict=True) if not s.is_video]
    report = PredictionReport()
    stopped: BaseException | None = None
    detector = _Detector(predictor, batch_size, num_workers)
    work = _Work(
        tuple(predictor.names),
        tuple(predictor.category_ids),
        min_drawn_score,
        predictor if detector.in_workers else None,
    )
    with _results(output, predictor, report) as results, _Workers(work, num_workers) as workers:
        try:
            paths = [source.path for source, _ in stills]
            for index, prediction in progress(
                detector.files(paths), "predicting", len(paths), quiet=quiet
            ):
                source, image_id = stills[index]
                target = targets.get(source.name, "")
                job = _Job(prediction, image_id, source.name, source.path, target)
                results.add(workers.submit(job))
            results.add(workers.drain())
            number = len(sources)
            for source in (s for s in sources if s.is_video):
                target = targets.get(source.name, "")
                try:
                    with _Video(source.path, target) as video:
                        for index, prediction in progress(
                            detector.frames(video.frames()),
                            f"predicting {source.name}",
                            video.length,
                            unit="frames",
                            quiet=quiet,
                        ):
                            number += 1
                            frame = video.waiting.pop(index)
                            name = f"{source.name}#{index}"
                            job = _Job(prediction, number, name, frame, "" if draw else None)
                            results.add(workers.submit(job), video)
                        results.add(workers.drain(), video)
                except ValueError as error:
                    results.add(workers.drain())
                    report.failed.append((source.path, str(error)))
        except (KeyboardInterrupt, SystemExit) as stop:
            stopped = stop
        results.add(workers.drain())
    if stopped is not None:
        logger.warning(f"{output} holds the {report.images} images that were done.")
        raise stopped
    return report


def _checked_workers(predictor: Predictor, batch_size: int, num_workers: int | None) -> int:
    if num_workers is None:
        on_cpu = predictor.device.type == "cpu"
        num_workers = min(torch.get_num_threads(), _MOST) if on_cpu else 2
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size is {batch_size} and num_workers {num_workers}; they must be at least 1 "
            "and 0"
        )
    return num_workers


class _Detector:
    """Detects in this process, or leaves that to the workers.

    Args:
        predictor: the model.
        batch_size: images that the model takes at once.
        num_workers: processes that read images.

    Attributes:
        in_workers: whether the workers detect; the predictions are None then.
    """

    def __init__(self, predictor: Predictor, batch_size: int, num_workers: int) -> None:
        self._predictor, self._batch_size, self._readers = predictor, batch_size, num_workers
        self.in_workers = num_workers > 0 and predictor.device.type == "cpu" and _START == "fork"

    def files(self, paths: Sequence[str]) -> Iterator[tuple[int, Prediction | None]]:
        """Yield the index and the prediction of each image."""
        return self._pairs(
            paths,
            lambda: self._predictor.predict(
                paths,
                batch_size=self._batch_size,
                num_workers=self._readers,
                paste_masks=False,
            ),
        )

    def frames(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[int, Prediction | None]]:
        """Yield the index and the prediction of each frame."""
        return self._pairs(
            frames,
            lambda: self._predictor.predict_frames(
                frames, batch_size=self._batch_size, paste_masks=False
            ),
        )

    def _pairs(
        self, images: Iterable[Any], predict: Callable[[], Iterator[Prediction]]
    ) -> Iterator[tuple[int, Prediction | None]]:
        if self.in_workers:
            yield from ((index, None) for index, _ in enumerate(images))
        else:
            yield from ((prediction.index, prediction) for prediction in predict())


@dataclass(frozen=True)
class _Job:
    """One image on its way to the files.

    Attributes:
        prediction: with masks that are not pasted yet; None is made by the worker.
        image_id: id in the output.
        name: file name in the output.
        image: path of the image, or its pixels (H, W, 3) in BGR order.
        target: file of the drawn image; "" returns the pixels of an array, and draws no file; None
            draws nothing.
    """

    prediction: Prediction | None
    image_id: int
    name: str
    image: str | np.ndarray
    target: str | None


@dataclass(frozen=True)
class _Done:
    """What the output says of one image; `drawn` (h, w, 3) in BGR order is for videos."""

    record: dict[str, Any]
    detections: list[dict[str, Any]]
    drawn: np.ndarray | None = None
    failed: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Work:
    """Detect if that is not done, paste masks, encode them, and draw: the work for one image."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    min_drawn_score: float
    predictor: Predictor | None = None

    def __call__(self, job: _Job) -> _Done:
        prediction = job.prediction or self._predict(job.image)
        if prediction.size is None or prediction.instances is None:
            return _Done({}, [], failed=(str(job.image), prediction.error or "unknown error"))
        height, width = prediction.size
        instances = prediction.instances
        if instances.has("pred_masks") and instances.pred_masks.dim() == 4:
            instances = detector_postprocess(instances, height, width)
        detections = instances_to_coco_json(instances, job.image_id)
        drawn = None
        if job.target or (job.target == "" and not isinstance(job.image, str)):
            drawn = self._draw(job.image, detections)
        if job.target and drawn is not None:
            os.makedirs(os.path.dirname(job.target), exist_ok=True)
            with atomic_path(job.target) as temporary:
                Image.fromarray(drawn[:, :, ::-1]).save(temporary, format="PNG", compress_level=1)
            drawn = None
        for detection in detections:
            detection["category_id"] = self.category_ids[detection["category_id"]]
        record = {"id": job.image_id, "file_name": job.name, "width": width, "height": height}
        return _Done(record, detections, drawn)

    def _predict(self, image: str | np.ndarray) -> Prediction:
        assert self.predictor is not None  # else the main process predicts
        if isinstance(image, str):
            return next(self.predictor.predict([image], paste_masks=False))
        return next(self.predictor.predict_frames([image], paste_masks=False))

    def _draw(self, image: str | np.ndarray, detections: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(h, w, 3) in BGR order, enlarged where the image is small."""
        pixels = read_image(image, format="RGB") if isinstance(image, str) else image[:, :, ::-1]
        shown = [d for d in detections if d["score"] >= self.min_drawn_score]
        items = [
            {
                "box": BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
                "mask": d.get("segmentation"),
                "label": f"{self.names[d['category_id']]} {d['score']:.0%}",
                "colour": tuple(_COLOURS[d["category_id"] % len(_COLOURS)]),
            }
            for d in sorted(shown, key=lambda d: d["score"])
        ]
        return overlay(pixels, items)[:, :, ::-1]


class _Workers:
    """Does work in processes, and returns results in the order of the jobs.

    Args:
        work: what is done for a job.
        num_workers: processes; 0 works in this one.
    """

    def __init__(self, work: _Work, num_workers: int) -> None:
        self._work, self._limit = work, 4 * num_workers
        self._waiting: deque[Future[_Done]] = deque()
        self._pool = None
        if num_workers:
            # the model goes to forked workers by way of memory, without a copy
            self._pool = ProcessPoolExecutor(
                num_workers, get_context(_START), _begin_worker, (work,)
            )

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, job: _Job) -> list[_Done]:
        """Take a job; return results that are ready, or that must be awaited to bound the queue."""
        if self._pool is None:
            return [self._work(job)]
        self._waiting.append(self._pool.submit(_run, job))
        done = []
        while self._waiting and (len(self._waiting) > self._limit or self._waiting[0].done()):
            done.append(self._waiting[0].result())  # a signal while it waits must not lose it
            self._waiting.popleft()
        return done

    def drain(self) -> list[_Done]:
        """Await and return all that is left."""
        done = [future.result() for future in self._waiting]
        self._waiting.clear()
        return done


_worker: dict[str, _Work] = {}  # what this process does, if it is a worker


def _begin_worker(work: _Work) -> None:
    """Leave signals to the main process, and the other cores to the other workers."""
    leave_signals()
    torch.set_num_threads(1)
    _worker["work"] = work


def _run(job: _Job) -> _Done:
    return _worker["work"](job)


class _Results:
    """Writes detections as they come, so that they need no memory.

    Args:
        file: gets the JSON list.
        report: gets the numbers.
    """

    def __init__(self, file: IO[bytes], report: PredictionReport) -> None:
        self._file, self._report = file, report
        self.images: list[dict[str, Any]] = []

    def add(self, done: Iterable[_Done], video: _Video | None = None) -> None:
        for one in done:
            if one.failed is not None:
                self._report.failed.append(one.failed)
                continue
            self.images.append(one.record)
            for detection in one.detections:
                self._file.write(b",\n" if self._report.detections else b"[\n")
                self._file.write(msgspec.json.encode(detection))
                self._report.detections += 1
            self._report.images += 1
            if video is not None and one.drawn is not None:
                video.write(one.drawn)

    def close(self) -> None:
        self._file.write(b"\n]\n" if self._report.detections else b"[]\n")


@contextmanager
def _results(output: str, predictor: Predictor, report: PredictionReport) -> Iterator[_Results]:
    """The two JSON files of an output; they are whole or not there."""
    path = os.path.join(output, PREDICTIONS)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        results = _Results(file, report)
        yield results
        results.close()
    pairs = zip(predictor.category_ids, predictor.names, strict=True)
    dataset = {
        "info": {"description": f"images predicted with {predictor.checkpoint}"},
        "images": sorted(results.images, key=lambda record: record["id"]),
        "categories": [{"id": raw, "name": name} for raw, name in pairs],
        "annotations": [],
    }
    with atomic_path(os.path.join(output, DATASET)) as temporary, open(temporary, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(dataset), indent=1))


class _Video:
    """Frames of a video, and the drawn video if a path is given.

    Args:
        path: of the video.
        target: file of the drawn video (MP4); "" writes none.

    Attributes:
        length: number of frames that the file claims to have, or None.
        waiting: frames that were read and whose prediction is not there yet, by number.

    Raises:
        ValueError: the file is no video that OpenCV can read.
    """

    def __init__(self, path: str, target: str) -> None:
        self._capture = cv2.VideoCapture(path)
        if not self._capture.isOpened():
            raise ValueError("OpenCV cannot read it as a video")
        self.length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None
        self._rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.waiting: dict[int, np.ndarray] = {}
        self._target = target
        self._writer: Any = None  # of OpenCV
        self._stack = ExitStack()

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.release()
        if self._writer is not None:
            self._writer.release()
        self._stack.__exit__(*error)

    def frames(self) -> Iterator[np.ndarray]:
        """(H, W, 3) in BGR order."""
        number = 0
        while True:
            good, frame = self._capture.read()
            if not good:
                break
            self.waiting[number] = frame
            yield frame
            number += 1
        if not number:
            raise ValueError("OpenCV reads no frame of it")

    def write(self, drawn: np.ndarray) -> None:
        """Add a drawn frame."""
        height, width = (side - side % 2 for side in drawn.shape[:2])  # MP4 takes even sides
        if self._writer is None:
            path = self._stack.enter_context(atomic_path(self._target))
            # OpenCV chooses the container by the ending
            renamed = f"{path}.mp4"
            self._stack.callback(_move, renamed, path)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(renamed, code, self._rate, (width, height))
        self._writer.write(np.ascontiguousarray(drawn[:height, :width]))


def _move(source: str, target: str) -> None:
    if os.path.exists(source):
        os.replace(source, target)


def _drawn_paths(sources: Sequence[Source], directory: str) -> dict[str, str]:
    """File of the drawn image of each source; images whose names differ in the ending keep it."""
    paths: dict[str, str] = {}
    for source in sources:
        ending = ".mp4" if source.is_video else ".png"
        path = f"{os.path.splitext(source.name)[0]}{ending}"
        taken = {*paths.values()}
        paths[source.name] = f"{source.name}{ending}" if path in taken else path
    return {name: os.path.join(directory, *path.split("/")) for name, path in paths.items()}
