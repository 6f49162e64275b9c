"""Images on disk against what the annotations say of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from d2_balance.utils.progress import progress

_ORIENTATION = 274  # EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_KEPT = (2, 3, 4)  # orientations that change the pixels and keep width and height
_DEEP = ("I", "F")  # first letters of the modes of more than 8 bits: I, I;16, I;16B, F
_NO_RGB = ("LAB",)  # modes that Pillow does not turn into RGB
_SHOWN = 5
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

logger = logging.getLogger(__name__)


def image_size(path: str) -> tuple[int, int]:
    """(height, width) in pixels of an image as Detectron2 reads it, turned as its EXIF says.

    Reads the head of the file only.

    Raises:
        ValueError: a file that is missing, no image, or above Pillow's limit of pixels.
    """
    return image_head(path)[0]


def image_head(path: str) -> tuple[tuple[int, int], str, int]:
    """Size of an image (see `image_size`), Pillow's mode, and EXIF's orientation (1: as it is).

    Raises:
        ValueError: see `image_size`.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(_ORIENTATION) or 1
            mode = image.mode
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; cut the image into tiles") from error
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: no image that can be read ({type(error).__name__}); download it again or "
            "leave it out of the annotations"
        ) from error
    size = (width, height) if orientation in _TURNED else (height, width)
    return size, mode, orientation


def is_deep(mode: str) -> bool:
    """Whether a mode of Pillow has more than 8 bits, which Detectron2 reads as one colour."""
    return mode.startswith(_DEEP)


def _check_modes(images: Sequence[tuple[str, str]], name: str) -> None:
    """Warn of (path, mode) of many bits; raise ValueError for one that cannot become RGB."""
    deep = [f"{path} (mode {mode})" for path, mode in images if is_deep(mode)]
    if deep:
        logger.warning(
            f"{name}: {len(deep)} of {len(images)} checked images have more than 8 bits per "
            f"channel, and will be read as one colour: {_some(deep)}; convert them to 8 bits"
        )
    wrong = [f"{path} (mode {mode})" for path, mode in images if mode in _NO_RGB]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} of {len(images)} checked images have a mode that cannot be "
            f"read as RGB: {_some(wrong)}; convert them to RGB"
        )


def is_flipped(size: tuple[int, int], orientation: int) -> bool:
    """Whether EXIF rotates or flips an image so that its (height, width) does not show it."""
    return orientation in _KEPT or (orientation in _TURNED and size[0] == size[1])


def has_pixels(path: str) -> bool:
    """Whether the pixels of an image can be read."""
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except UNREADABLE:
        return False
    return True


def check_image_sizes(
    dataset_dicts: Sequence[Mapping[str, Any]], name: str, limit: int | None = None
) -> None:
    """Compare the size of images with the height and width that the annotation file gives.

    Boxes of an image of another size point beside the objects, and nothing else would say so where
    only a part of the images was resized. Images that cannot be read are skipped: the loader skips,
    names and counts them. Images of 16 bits or of floats are warned of, and such as EXIF turns
    without a change of size.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        name: of the dataset or file, for the message.
        limit: look at that many, spread evenly; None: at all.

    Raises:
        ValueError: with the number of images of another size, the first ones by id and file, and
            both sizes.
    """
    count = len(dataset_dicts)
    limit = count if limit is None else min(limit, count)
    chosen = [int(n * count / limit) for n in range(limit)]
    wrong, flipped, modes, looked = [], [], [], 0
    for index in progress(chosen, "checking the sizes of images"):
        record = dataset_dicts[index]
        if "height" not in record or "width" not in record:
            continue
        looked += 1
        try:
            size, mode, orientation = image_head(record["file_name"])
        except ValueError:
            continue
        modes.append((record["file_name"], mode))
        if is_flipped(size, orientation):
            flipped.append(f"{record['file_name']} (orientation {orientation})")
        if size != (record["height"], record["width"]):
            turned = size[::-1] == (record["height"], record["width"]) and orientation != 1
            wrong.append(
                f"image {record.get('image_id')} ({record['file_name']}) is {size[1]} x {size[0]}, "
                f"not {record['width']} x {record['height']}"
                + (f" (turned by its EXIF orientation {orientation})" if turned else "")
            )
    _check_modes(modes, name)
    if flipped:
        logger.warning(
            f"{name}: {len(flipped)} of {looked} checked images are rotated or flipped by their "
            f"EXIF tag, which their size does not show: {_some(flipped)}; their boxes must be "
            "those of the turned image, or the tag must go"
        )
    if wrong:
        hint = "give the images that were annotated, or scale the boxes with them"
        if any("EXIF" in text for text in wrong):
            hint = (
                "the boxes are those of the stored pixels: rotate the pixels as the EXIF tag says "
                "and the boxes with them, or remove the tag"
            )
        raise ValueError(
            f"{name}: {len(wrong)} of {looked} checked images are not of the size "
            f"(width x height) that the annotations give: {_some(wrong)}; {hint}"
        )


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
