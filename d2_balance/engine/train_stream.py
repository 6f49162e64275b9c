"""The training data as a stream that can be entered at any iteration.

Detectron2's loader starts its random order anew when a run is resumed. Here batch t of a rank is a
function of the seed and of t: pictures are grouped by aspect ratio before they are loaded, and the
augmentation of a picture is seeded by its position. Numbers of workers do not change the data.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..data.samplers import ClassAwareTrainingSampler
from .random_state import seeded

# Samplers of this package, besides those that Detectron2 builds by name.
SAMPLERS = {"ClassAwareTrainingSampler": ClassAwareTrainingSampler}
TRAINING_SAMPLERS = (  # Detectron2 keeps no list of them
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
    *SAMPLERS,
)

logger = logging.getLogger(__name__)


class TrainStream:
    """Endless batches of one rank.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        mapper: turns a dict into what the model takes.
        sampler: endless indices of this rank, the same ones each time it is iterated.
        batch_size: pictures per batch of this rank.
        group_by_aspect: whether a batch holds either wide or high pictures only.
        num_workers: loading processes; 0 loads in this one.
        seed: seeds the augmentations, at least 0.

    Attributes:
        start: batch at which the next iteration over the stream begins.
    """

    def __init__(
        self,
        dataset_dicts: list[dict],
        mapper: Callable[[dict], dict],
        sampler: Iterable[int],
        batch_size: int,
        *,
        group_by_aspect: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        self._wide = [group_by_aspect and d["width"] > d["height"] for d in dataset_dicts]
        pictures = MapDataset(DatasetFromList(dataset_dicts, copy=False), mapper)
        self._pictures = _SeededPictures(pictures, seed)
        self._sampler, self._batch_size = sampler, batch_size
        self._num_workers, self._seed = num_workers, seed
        self.start = 0

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            self._pictures,
            batch_sampler=itertools.islice(self.batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # Without one of its own, a loader draws from the global generator when it starts, and
            # the first step of a resumed run would see other random numbers.
            generator=torch.Generator().manual_seed(self._seed),
        )
        return iter(loader)

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the stream, index of the picture), from the first one on."""
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for position, index in enumerate(self._sampler):
            batch = waiting[self._wide[index]]
            batch.append((position, index))
            if len(batch) == self._batch_size:
                yield batch[:]
                batch.clear()


class _SeededPictures(Dataset):
    """Pictures whose augmentation is seeded by the run's seed, the rank and the position."""

    def __init__(self, pictures: Dataset, seed: int) -> None:
        self._pictures = pictures
        self._seed, self._rank = seed, comm.get_rank()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        with seeded(self._seed, self._rank, position):
            return self._pictures[index]


def check_sampler(cfg: CfgNode) -> None:
    """Checks the name of the training sampler, and that repeat factors repeat something.

    Raises:
        ValueError: naming the key and what is allowed.
    """
    name, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if name not in TRAINING_SAMPLERS:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN: {name!r} is unknown; allowed: "
            f"{', '.join(TRAINING_SAMPLERS)}."
        )
    if name == "RepeatFactorTrainingSampler" and not threshold > 0:
        raise ValueError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold}, with which {name} repeats no picture; "
            "allowed is a frequency above 0, below which classes are repeated (LVIS: 0.001)."
        )


def build_train_stream(cfg: CfgNode) -> Iterable[list[dict]]:
    """The training loader of a config: data sets, sampler and mapper as Detectron2 makes them.

    DATALOADER.SAMPLER_TRAIN takes the names of `TRAINING_SAMPLERS`. The order is seeded by SEED;
    where that is negative, by a number that the ranks agree on. Data sets that are no list of dicts
    get Detectron2's own loader, which a resumed run starts anew.

    Raises:
        ValueError: the batch cannot be shared out evenly, or the sampler does not fit the data.
    """
    ranks = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; allowed is a multiple of the "
            f"number of processes, {ranks}."
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    with seeded(seed):  # the sampler draws the seed of its order from numpy
        parts = _loader_parts(cfg)
    if not isinstance(parts["dataset"], list):
        logger.warning("The training set is no list of pictures; a resumed run starts it anew.")
        return build_detection_train_loader(**parts)
    return TrainStream(
        parts["dataset"],
        parts["mapper"],
        parts["sampler"],
        parts["total_batch_size"] // ranks,
        group_by_aspect=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=seed,
    )


def _loader_parts(cfg: CfgNode) -> dict:
    """The arguments of Detectron2's loader, with a sampler of ours where the config names one."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in SAMPLERS:
        return build_detection_train_loader.from_config(cfg)
    stock = cfg.clone()
    stock.defrost()
    stock.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    parts = build_detection_train_loader.from_config(stock)
    if not isinstance(parts["dataset"], list):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN {name} needs data sets that are lists of dicts; "
            "TrainingSampler works with others."
        )
    return parts | {"sampler": SAMPLERS[name](parts["dataset"])}
