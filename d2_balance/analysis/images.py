"""Images that are missing, cannot be read, or have another size than their file says."""

from __future__ import annotations

import numpy as np
from PIL import Image

from d2_balance.data.checks.images import has_pixels, image_head, is_deep, is_flipped
from d2_balance.data.records import ImageFinder
from d2_balance.utils.arrays import unique
from d2_balance.utils.progress import progress

from .source import Source
from .table import DataTable

MISSING = "image that does not exist"
UNREADABLE = "image that cannot be read"
TOO_LARGE = "image above Pillow's limit of pixels: cut it into tiles"
OTHER_SIZE = "image of another size than the file says"
DEEP = "image of more than 8 bits per channel, which is read as one colour: convert it to 8 bits"
FLIPPED = (
    "image that its EXIF tag turns and leaves as large as it is: its boxes must be those of the "
    "turned image"
)
_PIXELS = 100  # images that are decoded as a whole


def sample_images(table: DataTable, count: int, seed: int) -> np.ndarray:
    """Return indices of up to `count` images with objects, one of each class first."""
    rng = np.random.default_rng(seed)
    image, label = table.image[~table.crowd], table.label[~table.crowd]
    known = unique(image)
    if len(known) <= count:
        return known
    order = rng.permutation(len(image))
    _, first = np.unique(label[order], return_index=True)
    needed = np.unique(image[order][first])[:count]
    rest = rng.permutation(np.setdiff1d(known, needed))
    return np.sort(np.concatenate([needed, rest[: count - len(needed)]]))


def check_images(source: Source, images: np.ndarray) -> dict[str, list]:
    """Open some images and compare their sizes; the pixels of the first 100 are read too.

    Args:
        source: the dataset.
        images: (S,) which of its images to look at.

    Returns:
        What is wrong, to file names. Empty where the images' directory is not known.
    """
    table = source.table
    if table is None or not table.files or not source.image_root:
        return {}
    problems: dict[str, list] = {}
    finder = ImageFinder(source.image_root)
    paths = [finder.find(table.files[image]) for image in images]
    if None in paths:  # others of the file say whether a name may stand for it without directories
        every = finder.find_all(table.files)
        paths = [every[image] for image in images]
    for n, image in enumerate(progress(images, "checking images")):
        names, path = table.files[image], paths[n]
        if path is None:
            problems.setdefault(MISSING, []).append(names[0] if names else f"image {image}")
            continue
        try:
            size, mode, orientation = image_head(path)
        except ValueError as error:
            large = isinstance(error.__cause__, Image.DecompressionBombError)
            problems.setdefault(TOO_LARGE if large else UNREADABLE, []).append(path)
            continue
        if n < _PIXELS and not has_pixels(path):
            problems.setdefault(UNREADABLE, []).append(path)
        if is_flipped(size, orientation):
            problems.setdefault(FLIPPED, []).append(f"{path} (EXIF orientation {orientation})")
        if is_deep(mode):
            problems.setdefault(DEEP, []).append(f"{path} (mode {mode})")
        if size != tuple(table.sizes[image].tolist()):
            problems.setdefault(OTHER_SIZE, []).append(path)
    return problems
