"""Images that cannot be read: which errors say so, and how a test set goes on without them."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from d2_balance.utils.names import listed

SKIPPED = "skipped_images"
"""Key of a record: images that it stands for, and what was wrong with each."""

# What Pillow raises for files that are missing, cut off or no images, and Detectron2 where the
# size is not that of the annotations. Everything else is a mistake in the code and ends the run.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    SizeMismatchError,
)
_BLANK = 32  # side in pixels of the image that a model gets in its place
_SHOWN = 8  # images that a message lists

logger = logging.getLogger(__name__)


def image_name(record: dict[str, Any]) -> str:
    """Return how a message calls an image: its file name, or its id if there is none."""
    return str(record.get("file_name") or f"image_id {record.get('image_id', 'unknown')}")


def listed_images(images: dict[str, str], shown: int = _SHOWN) -> str:
    """Return names and reasons for a message, the first ones and how many more there are."""
    return listed([f"{name} ({reason})" for name, reason in images.items()], shown)


class SkipUnreadable:
    """A mapper of test images that does not stop at one that cannot be read.

    A blank image of 32 x 32 pixels takes its place, and its record has the key `SKIPPED`, by which
    the evaluators of this package leave the image out.

    Args:
        mapper: turns a record into what the model takes.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._mapper(record)
        except UNREADABLE as error:
            name, reason = image_name(record), f"{type(error).__name__}: {error}"
            logger.warning(f"The test image {name} cannot be read and is left out ({reason}).")
            kept = ("file_name", "image_id", "height", "width")
            blank = {key: record[key] for key in kept if key in record}
            blank["image"] = torch.zeros(3, _BLANK, _BLANK, dtype=torch.uint8)
            return blank | {SKIPPED: {name: reason}}
