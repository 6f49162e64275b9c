"""A trained model that takes images and returns detections with class names.

It is called as Detectron2's DefaultPredictor is, takes batches, and reads files in worker
processes. Images of a batch have the same size after resizing, so that no image is padded to the
size of another one and each gets the detections that it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import nn
from torch.utils.data import DataLoader, Dataset

from d2_balance.data.model_classes import ModelClasses, class_activation, class_thresholds
from d2_balance.utils.names import closest
from d2_balance.utils.workers import leave_signals_for_a_while

_Item = tuple[int, dict[str, Any] | str]  # index, and inputs of the model or why there are none
_AHEAD = 4  # batches of other sizes that wait until they are full


@dataclass(frozen=True)
class Prediction:
    """What became of one image.

    Attributes:
        index: position in the sequence of images that was given.
        source: path of the image; None if an array was given.
        size: height and width of the image; None if it could not be read.
        instances: detections on the CPU (`pred_boxes`, `scores`, `pred_classes`, and `pred_masks`
            if the model has masks), or None if the image could not be read.
        error: why it could not be read, else None.
    """

    index: int
    source: str | None
    size: tuple[int, int] | None
    instances: Instances | None
    error: str | None = None


class Predictor:
    """A model in evaluation mode with what is known of its classes; `load` makes it.

    Args:
        model: a detector of Detectron2.
        cfg: its config.
        classes: names, ids and thresholds of its K classes.
        checkpoint: path of its weights.
        resize: what is done to images; None resizes as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST say.
        input_format: "BGR" or "RGB"; "" is INPUT.FORMAT.

    Attributes:
        names: K class names, in the order of `pred_classes`.
        category_ids: K ids of the training file.
        activation: how logits become scores, "sigmoid", "softmax" or "gumbel"; None if unknown.
        metadata: for Detectron2's Visualizer.

    Raises:
        ValueError: the model has another number of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        classes: ModelClasses,
        checkpoint: str = "",
        *,
        resize: T.Augmentation | None = None,
        input_format: str = "",
    ) -> None:
        self.model, self.cfg, self.checkpoint = model.eval(), cfg, checkpoint
        self.names = list(classes.names)
        self.category_ids = list(classes.category_ids)
        self.classes = classes
        self.activation = class_activation(model) or classes.activation
        own = _num_classes(model)
        if own is not None and own != len(self.names):
            raise ValueError(
                f"{checkpoint or 'the model'} has {own} classes, and {len(self.names)} names are "
                "known; there must be one for each class, in the order of training"
            )
        self.metadata = Metadata(
            name=f"classes of {checkpoint}",
            thing_classes=self.names,
            thing_dataset_id_to_contiguous_id={raw: k for k, raw in enumerate(self.category_ids)},
        )
        self._has_masks = bool(getattr(getattr(model, "roi_heads", None), "mask_on", False))
        self.input_format = input_format or cfg.INPUT.FORMAT
        self.resize = resize or T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def score_thresholds(self) -> list[float]:
        """K scores; a detection of a class is returned if its score is above."""
        per_class = class_thresholds(self.model)
        return list(
            per_class or [float(_owners(self.model)[0].test_score_thresh)] * len(self.names)
        )

    def set_score_threshold(self, threshold: float | Mapping[str, float]) -> None:
        """Set the scores that detections must exceed, before non-maximum suppression and the cap.

        Args:
            threshold: for all classes, or by class name; classes that are not named keep theirs.

        Raises:
            ValueError: a name that the model does not have, or a value outside [0, 1].
        """
        values = self.score_thresholds
        if isinstance(threshold, Mapping):
            index = {name: k for k, name in enumerate(self.names)}
            for name, value in threshold.items():
                if name not in index:
                    raise ValueError(
                        f"score threshold: the model has no class {name!r}; "
                        f"{closest(name, self.names)}"
                    )
                values[index[name]] = float(value)
        else:
            values = [float(threshold)] * len(values)
        for name, value in zip(self.names, values, strict=True):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"score threshold of {name!r} is {value}; it must be a number in [0, 1]"
                )
        for owner in _owners(self.model):
            if "test_score_thresh" in owner._buffers:
                del owner._buffers["test_score_thresh"]
            if len(set(values)) == 1:
                owner.test_score_thresh = values[0]
            else:  # Detectron2 compares it with (R, K) scores
                if hasattr(owner, "test_score_thresh"):
                    del owner.test_score_thresh
                column = torch.tensor(values, device=self.device)
                owner.register_buffer("test_score_thresh", column, persistent=False)

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """Return the model's input for one image.

        Args:
            image: (H, W, 3) uint8 in the order of INPUT.FORMAT.

        Returns:
            `image` (3, h, w) uint8, resized, and the `height` and `width` that detections are for.
        """
        return _preprocessed(image, self.resize)

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """Detect in one image, as Detectron2's DefaultPredictor does.

        Args:
            image: (H, W, 3) uint8 in BGR order, as `cv2.imread` returns it.

        Returns:
            The model's output for this image, `{"instances": Instances}`, on the model's device.
        """
        return self.forward([self.preprocess(self._in_format(image))])[0]

    @torch.no_grad()
    def forward(
        self, inputs: Sequence[dict[str, Any]], *, paste_masks: bool = True
    ) -> list[dict[str, Any]]:
        """Run the model on a batch.

        Args:
            inputs: what `preprocess` returns.
            paste_masks: False leaves boxes in the resized image and masks (R, 1, M, M) in their
                boxes, for `detector_postprocess` to finish; for models with masks only.

        Returns:
            `{"instances": Instances}` for each image.
        """
        if paste_masks or not self._has_masks:
            return self.model(list(inputs))
        model: Any = self.model
        return [{"instances": i} for i in model.inference(list(inputs), do_postprocess=False)]

    def predict(
        self,
        images: Sequence[str | np.ndarray],
        *,
        batch_size: int = 1,
        num_workers: int = 0,
        paste_masks: bool = True,
    ) -> Iterator[Prediction]:
        """Detect in many images.

        Args:
            images: paths, or arrays as for `__call__`. Files are read as Detectron2 reads them:
                turned upright by their EXIF orientation.
            batch_size: images that the model takes at once, at least 1.
            num_workers: processes that read and resize images; 0 does so in this process.
            paste_masks: see `forward`.

        Yields:
            One prediction for each image. With a batch size of 1 they come in order; otherwise in
            the order in which batches of equal sizes fill up.

        Raises:
            ValueError: a number that is out of range.
        """
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size is {batch_size} and num_workers {num_workers}; they must be at least "
                "1 and 0"
            )
        items = DataLoader(
            _Images(self, images),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=2 * batch_size if num_workers else None,
            worker_init_fn=leave_signals_for_a_while,
        )
        for prediction in self._predict(items, batch_size, paste_masks):
            image = images[prediction.index]
            yield replace(prediction, source=image) if isinstance(image, str) else prediction

    def predict_frames(
        self, frames: Iterable[np.ndarray], *, batch_size: int = 1, paste_masks: bool = True
    ) -> Iterator[Prediction]:
        """Detect in images that come one after another, such as the frames of a video.

        Args:
            frames: arrays as for `__call__`, read as they are needed.
            batch_size: as for `predict`.
            paste_masks: as for `predict`.
        """
        items = (
            (index, self.preprocess(self._in_format(frame))) for index, frame in enumerate(frames)
        )
        return self._predict(items, batch_size, paste_masks)

    def _predict(
        self, items: Iterable[_Item], batch_size: int, paste_masks: bool
    ) -> Iterator[Prediction]:
        for batch in _batches(items, batch_size):
            index, content = batch[0]
            if isinstance(content, str):
                yield Prediction(index, None, None, None, content)
                continue
            kept = [(index, inputs) for index, inputs in batch if not isinstance(inputs, str)]
            outputs = self.forward([inputs for _, inputs in kept], paste_masks=paste_masks)
            for (index, inputs), output in zip(kept, outputs, strict=True):
                size = (inputs["height"], inputs["width"])
                yield Prediction(index, None, size, output["instances"].to("cpu"))

    def _in_format(self, image: np.ndarray) -> np.ndarray:
        return image[:, :, ::-1] if self.input_format == "RGB" else image


class _Images(Dataset):
    """Images ready for the model, or the reason why one is not; carries no model to the workers."""

    def __init__(self, predictor: Predictor, images: Sequence[str | np.ndarray]) -> None:
        self.images, self.format = images, predictor.input_format
        self.resize = predictor.resize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any] | str]:
        image = self.images[index]
        try:
            if isinstance(image, str):
                image = read_image(image, format=self.format)
            elif self.format == "RGB":
                image = image[:, :, ::-1]
            return index, _preprocessed(image, self.resize)
        except Exception as error:  # decoders raise what they like; the other images go on
            return index, f"{type(error).__name__}: {error}"


def _preprocessed(image: np.ndarray, resize: T.Augmentation) -> dict[str, Any]:
    height, width = image.shape[:2]
    augmented = T.AugInput(image)
    resize(augmented)
    resized = augmented.image
    # bytes, which cost a quarter of float32 on their way from a worker; the model takes both
    tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width}


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Batches of inputs of equal size, and each failure as a batch of its own."""
    waiting: dict[tuple[int, ...], list[_Item]] = {}
    for item in items:
        if isinstance(item[1], str):
            yield [item]
            continue
        shape = tuple(item[1]["image"].shape)
        waiting.setdefault(shape, []).append(item)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _AHEAD * size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


def _owners(model: nn.Module) -> list[Any]:
    """The modules that hold the score threshold of detections."""
    return [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers | DenseDetector)]


def _num_classes(model: nn.Module) -> int | None:
    return next((owner.num_classes for owner in _owners(model)), None)
