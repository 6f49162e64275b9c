"""Images that are missing, cannot be read, or have another size than their file says."""

from __future__ import annotations

import os

import numpy as np

from d2_balance.data.checks.images import image_head, is_deep
from d2_balance.utils.progress import progress

from .source import Source
from .table import DataTable

MISSING = "image that does not exist"
UNREADABLE = "image that cannot be read"
OTHER_SIZE = "image of another size than the file says"
DEEP = "image of more than 8 bits per channel, which is read as one colour: convert it to 8 bits"


def sample_images(table: DataTable, count: int, seed: int) -> np.ndarray:
    """Return indices of up to `count` images with objects, one of each class first."""
    rng = np.random.default_rng(seed)
    image, label = table.image[~table.crowd], table.label[~table.crowd]
    known = np.unique(image)
    if len(known) <= count:
        return known
    order = rng.permutation(len(image))
    _, first = np.unique(label[order], return_index=True)
    needed = np.unique(image[order][first])[:count]
    rest = rng.permutation(np.setdiff1d(known, needed))
    return np.sort(np.concatenate([needed, rest[: count - len(needed)]]))


def check_images(source: Source, images: np.ndarray) -> dict[str, list]:
    """Open some images and compare their sizes; only the heads of the files are read.

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
    for image in progress(images, "looking at images"):
        places = [os.path.join(source.image_root, name) for name in table.files[image]]
        path = next((place for place in places if os.path.isfile(place)), None)
        if path is None:
            problems.setdefault(MISSING, []).append(places[0] if places else f"image {image}")
            continue
        try:
            size, mode, _ = image_head(path)
        except ValueError:
            problems.setdefault(UNREADABLE, []).append(path)
            continue
        if is_deep(mode):
            problems.setdefault(DEEP, []).append(f"{path} (mode {mode})")
        if size != tuple(table.sizes[image].tolist()):
            problems.setdefault(OTHER_SIZE, []).append(path)
    return problems
