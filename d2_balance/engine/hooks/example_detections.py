"""Detections on a few test images, drawn after each evaluation for TensorBoard and the trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import takewhile
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase
from detectron2.utils.visualizer import Visualizer
from torch import nn

from d2_balance.data.unreadable import SKIPPED, image_name

logger = logging.getLogger(__name__)


class ImageWriter(Protocol):
    """A writer that takes images besides scalars."""

    def add_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Write an image.

        Args:
            name: of the image, the same at every iteration.
            image: (H, W, 3) uint8, RGB.
            iteration: x axis.
        """


class ExampleDetections(HookBase):
    """Draws the detections on the first images of a test set after each evaluation.

    Stands behind EvalHook. Only the first rank draws.

    Args:
        model: wrapped in DDP or not.
        inputs: what the model takes at test time, for each image.
        dataset: name of the test set, for class names and colours.
        image_format: of the inputs, such as "BGR".
        writers: take the images.
        period: TEST.EVAL_PERIOD.
        min_score: lower scores are not drawn, in [0, 1].
        weights: makes a block in which the model has the weights that are evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[dict[str, Any]],
        dataset: str,
        image_format: str,
        writers: Sequence[ImageWriter],
        *,
        period: int,
        min_score: float,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = getattr(model, "module", model)
        self._inputs, self._dataset, self._format = inputs, dataset, image_format
        self._names = short_names([image_name(record) for record in inputs])
        self._writers, self._period, self._min_score = writers, period, min_score
        self._weights = weights

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        mode = self._model.training
        self._model.eval()
        try:
            with self._weights():
                for record, name in zip(self._inputs, self._names, strict=True):
                    if SKIPPED not in record:
                        self._draw_one(record, name)
        except Exception:  # drawing must not cost a training
            logger.exception("LOG.IMAGES: the detections cannot be drawn.")
        finally:
            self._model.train(mode)

    def _draw_one(self, record: dict[str, Any], name: str) -> None:
        """Draw an image as the model sees it, at its size after the augmentations."""
        pixels = record["image"].permute(1, 2, 0).numpy()
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        output = self._model([record | size])[0]
        if "instances" not in output:
            return  # of a model without detections
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= self._min_score]
        rgb = np.ascontiguousarray(convert_image_to_rgb(pixels, self._format))
        canvas = Visualizer(rgb, MetadataCatalog.get(self._dataset))
        image = canvas.draw_instance_predictions(instances).get_image()
        for writer in self._writers:
            writer.add_image(f"detections/{name}", image, self.trainer.iter)


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the directories that all have, on one level."""
    parts = [PurePath(path).parts for path in paths]
    levels = zip(*(p[:-1] for p in parts), strict=False)  # of the directories
    shared = sum(1 for _ in takewhile(lambda level: len({*level}) == 1, levels))
    return ["_".join(p[shared:]).lstrip("/_") for p in parts]
