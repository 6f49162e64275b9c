"""Images that cannot be read: skipped, named and counted, up to a limit.

Another image takes the place of one that cannot be read. Which one is a function of the seed, the
rank and the position, so that a resumed run and any number of workers see the same data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetFromList, MapDataset
from detectron2.utils import comm
from torch.utils.data import Dataset

from d2_balance.data.records import Records
from d2_balance.data.unreadable import SKIPPED, UNREADABLE, image_name, listed_images

from ..errors import RunStopped
from .random_state import seeded

KEY = "DATALOADER.MAX_UNREADABLE_IMAGES"
_TRIES = 10  # images that are tried for one place

logger = logging.getLogger(__name__)


class SeededImages(Dataset):
    """Images whose augmentation is seeded by the run's seed, the rank and the position.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        mapper: turns a dict into what the model takes.
        wide: whether each image is wide; it is replaced by one of the same kind.
        seed: at least 0.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[dict],
        mapper: Callable[[dict], dict],
        wide: Sequence[bool],
        seed: int,
    ) -> None:
        lazy = isinstance(dataset_dicts, Records)  # makes a record when it is asked for
        self._records = dataset_dicts if lazy else DatasetFromList(dataset_dicts, copy=False)
        self._images = MapDataset(self._records, mapper)
        self._wide = np.asarray(wide, dtype=bool)
        self._seed, self._rank = seed, comm.get_rank()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Return the image of (position in the stream, index); another one where it cannot be read.

        Without an image where too many could not be read.
        """
        position, index = key
        skipped: dict[str, str] = {}
        for attempt in range(_TRIES):
            # the first key is without a number of its own, so that whole images stay as they are
            more = (attempt,) if attempt else ()
            with seeded(self._seed, self._rank, position, *more):
                try:
                    record = self._images[index]
                except UNREADABLE as error:
                    record = {}
                    skipped[image_name(self._records[index])] = f"{type(error).__name__}: {error}"
                    same = np.flatnonzero(self._wide == self._wide[index])
                    index = int(same[np.random.randint(len(same))])
            if record:
                break
        return record | {SKIPPED: record.get(SKIPPED, {}) | skipped} if skipped else record


class UnreadableImages:
    """Counts the images that could not be read, on one rank.

    Args:
        limit: different images that may be unreadable, at least 0.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: dict[str, str] = {}

    def record(self, batch: list[dict[str, Any]]) -> None:
        """Log and count what was skipped for a batch, and take the notes off its records.

        Raises:
            RunStopped: more images than the limit are unreadable, or none could be read.
        """
        for record in batch:
            skipped = record.pop(SKIPPED, {})
            for name, reason in skipped.items():
                self._add(name, reason)
            if skipped and not record:
                raise RunStopped(
                    f"{len(skipped)} images in a row cannot be read: {listed_images(skipped)}. Is "
                    "the disk of the training set there? --resume continues."
                )

    def _add(self, name: str, reason: str) -> None:
        if name in self.found:
            return
        self.found[name] = reason
        if len(self.found) > self._limit:
            raise RunStopped(
                f"{len(self.found)} training images cannot be read and {KEY} is {self._limit}: "
                f"{listed_images(self.found)}. Fix them or take them out, or raise {KEY}; --resume "
                "continues."
            )
        logger.warning(
            f"The image {name} cannot be read and is skipped ({reason}); another one takes its "
            f"place. {len(self.found)} so far, {KEY} is {self._limit}."
        )
