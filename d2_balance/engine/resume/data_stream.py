"""The training data as a stream that can be entered at any iteration.

Detectron2's loader starts its random order anew when a run is resumed. Here batch t of a rank is a
function of the seed and of t: images are grouped by aspect ratio before they are loaded, and the
augmentation of an image is seeded by its position. Numbers of workers do not change the data.
"""

from __future__ import annotations

import itertools
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from d2_balance.data.copy_paste import add_copy_paste, check_copy_paste
from d2_balance.data.mapper import BalancedMapper
from d2_balance.data.records import Records, objects_of
from d2_balance.data.samplers import (
    ClassAwareTrainingSampler,
    repeat_factors,
    weighted_repeat_factors,
)
from d2_balance.data.training_set import sources, training_records
from d2_balance.utils.config_tree import changed
from d2_balance.utils.workers import leave_signals_for_a_while

from ..errors import RunStopped
from .random_state import seeded
from .unreadable_images import SeededImages, UnreadableImages

# Samplers of this package, besides those that Detectron2 builds by name.
WEIGHTED = "WeightedRepeatFactorTrainingSampler"
SAMPLERS = ("ClassAwareTrainingSampler", WEIGHTED)
TRAINING_SAMPLERS = (  # Detectron2 keeps no list of them
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
    *SAMPLERS,
)

_RESTARTS = 3  # of workers in a row, without a batch in between
_WORKER_DIED = re.compile(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)")

logger = logging.getLogger(__name__)


class TrainStream:
    """Endless batches of one rank.

    An image that cannot be read is replaced, see `SeededImages`. Workers that were
    killed are started again at the batch that is missing; where a batch was announced already, the
    error is one of the connection to the worker.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        mapper: turns a dict into what the model takes.
        sampler: endless indices of this rank, the same ones each time it is iterated.
        batch_size: images per batch of this rank.
        group_by_aspect: whether a batch holds either wide or high images only.
        num_workers: workers; 0 loads in this one.
        seed: seeds the augmentations, at least 0.
        max_unreadable: different images that may be unreadable before the run ends, at least 0.

    Attributes:
        start: batch at which the next iteration over the stream begins.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[dict],
        mapper: Callable[[dict], dict],
        sampler: Iterable[int],
        batch_size: int,
        *,
        group_by_aspect: bool,
        num_workers: int,
        seed: int,
        max_unreadable: int = 0,
    ) -> None:
        self._wide = _wide(dataset_dicts) if group_by_aspect else [False] * len(dataset_dicts)
        self._images = SeededImages(dataset_dicts, mapper, self._wide, seed)
        self._sampler, self._batch_size = sampler, batch_size
        self._num_workers, self._seed = num_workers, seed
        self._unreadable = UnreadableImages(max_unreadable)
        self.start = 0

    @property
    def unreadable(self) -> dict[str, str]:
        """Images that were skipped on this rank, and what was wrong with them."""
        return self._unreadable.found

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches from `start` on.

        Raises:
            RunStopped: too many images cannot be read, or workers die again and again.
        """
        place, deaths = self.start, 0
        while True:
            try:
                for batch in self._loaded(place):
                    self._unreadable.record(batch)
                    yield batch
                    place, deaths = place + 1, 0
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                if isinstance(error, RuntimeError) and not _WORKER_DIED.search(str(error)):
                    raise
                deaths += 1
                text = f"A worker has died ({error}); usually there was too little "
                text += "memory: lower DATALOADER.NUM_WORKERS."
                if deaths > _RESTARTS:
                    raise RunStopped(f"{text} --resume continues.") from error
                logger.warning(f"{text} The workers start again at batch {place}.")

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": self.unreadable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unreadable.found = dict(state["unreadable"])

    def _loaded(self, start: int) -> Iterator[list[dict]]:
        loader = DataLoader(
            self._images,
            batch_sampler=itertools.islice(self.batches(), start, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=leave_signals_for_a_while,
            # Without one of its own, a loader draws from the global generator when it starts, and
            # the first step of a resumed run would see other random numbers.
            generator=torch.Generator().manual_seed(self._seed),
        )
        with _deaths_found_when_waiting():
            return iter(loader)

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the stream, index of the image), from the first one on."""
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for position, index in enumerate(self._sampler):
            batch = waiting[self._wide[index]]
            batch.append((position, index))
            if len(batch) == self._batch_size:
                yield batch[:]
                batch.clear()


@contextmanager
def _deaths_found_when_waiting() -> Iterator[None]:
    """Keep PyTorch from raising wherever the run is when a worker dies.

    Its handler of SIGCHLD would break off a step that has changed the state of a loss already. The
    loader finds the death itself, within seconds, when the next batch is missing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and PyTorch sets none elsewhere
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):
        before = signal.SIG_DFL
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def check_sampler(cfg: CfgNode) -> None:
    """Check the training sampler, its threshold and form, and the weights of training sets.

    Raises:
        ValueError: naming the key.
    """
    name, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if name not in TRAINING_SAMPLERS:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN: {name!r} is unknown; must be one of "
            f"{', '.join(TRAINING_SAMPLERS)}."
        )
    if name in ("RepeatFactorTrainingSampler", WEIGHTED) and not threshold > 0:
        raise ValueError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold}, with which {name} repeats no image; "
            "must be a frequency above 0, below which classes are repeated (LVIS: 0.001)."
        )
    form = cfg.DATALOADER.REPEAT_FORM
    if form != "rfs" and name not in ("RepeatFactorTrainingSampler", WEIGHTED):
        raise ValueError(
            f"DATALOADER.REPEAT_FORM is {form!r} and DATALOADER.SAMPLER_TRAIN {name} would not use "
            f"it; must be RepeatFactorTrainingSampler or {WEIGHTED}."
        )
    check_weights_of_sets(cfg)
    check_copy_paste(cfg)


def build_train_stream(cfg: CfgNode) -> Iterable[list[dict]]:
    """Build the training loader of a config: datasets, sampler and mapper as in Detectron2.

    DATALOADER.SAMPLER_TRAIN takes the names of `TRAINING_SAMPLERS`. The order is seeded by SEED;
    where that is negative, by a number that the ranks agree on. Datasets that are no list of dicts
    get Detectron2's own loader, which a resumed run starts anew.

    Raises:
        ValueError: the batch cannot be shared out evenly, or the sampler does not fit the data.
    """
    ranks = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; must be a multiple of the "
            f"number of processes, {ranks}."
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    with seeded(seed):
        # later versions of Detectron2 give its samplers cfg.SEED, earlier ones draw this number
        given = changed(cfg, {"SEED": comm.shared_random_seed()})
    with seeded(seed):
        parts = _loader_parts(given)
    if not isinstance(parts["dataset"], list | Records):
        logger.warning("The training set is no list of images; a resumed run starts it anew.")
        return build_detection_train_loader(**parts)
    return TrainStream(
        parts["dataset"],
        parts["mapper"],
        parts["sampler"],
        parts["total_batch_size"] // ranks,
        group_by_aspect=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=seed,
        max_unreadable=cfg.DATALOADER.MAX_UNREADABLE_IMAGES,
    )


def check_weights_of_sets(cfg: CfgNode) -> None:
    """Check DATASETS.TRAIN_REPEAT_FACTOR, the weights of training sets.

    Raises:
        ValueError: naming the entry.
    """
    weights = cfg.DATASETS.TRAIN_REPEAT_FACTOR
    for entry in weights:
        pair = isinstance(entry, list | tuple) and len(entry) == 2
        known = pair and entry[0] in cfg.DATASETS.TRAIN
        if not known or not isinstance(entry[1], int | float) or not entry[1] > 0:
            raise ValueError(
                f"DATASETS.TRAIN_REPEAT_FACTOR has the entry {entry!r}; must be [name, factor] "
                f"with a factor above 0 and a name of DATASETS.TRAIN: "
                f"{', '.join(cfg.DATASETS.TRAIN)}."
            )
    if weights and not cfg.DATALOADER.SAMPLER_TRAIN.startswith("Weighted"):
        names = ", ".join(n for n in TRAINING_SAMPLERS if n.startswith("Weighted"))
        raise ValueError(
            "DATASETS.TRAIN_REPEAT_FACTOR is set and DATALOADER.SAMPLER_TRAIN "
            f"{cfg.DATALOADER.SAMPLER_TRAIN} would not use it; must be one of {names}."
        )


def _wide(records: Sequence[dict[str, Any]]) -> list[bool]:
    size = objects_of(records).size
    if size is None:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING needs the height and width of every image; set it "
            "False, or add them to the dataset"
        )
    return (size[:, 1] > size[:, 0]).tolist()


def _repeating(cfg: CfgNode) -> tuple[float, str, float]:
    node = cfg.DATALOADER
    return node.REPEAT_THRESHOLD, node.REPEAT_FORM, node.REPEAT_ALPHA


def _loader_parts(cfg: CfgNode) -> dict:
    """Return the arguments of Detectron2's loader, with our sampler if the config names one."""
    name, mapper = cfg.DATALOADER.SAMPLER_TRAIN, BalancedMapper(cfg, True)
    records = training_records(cfg)
    if isinstance(records, list | Records):
        add_copy_paste(mapper, cfg, records)
    elif cfg.DATALOADER.COPY_PASTE.ENABLED:
        raise ValueError(
            "DATALOADER.COPY_PASTE.ENABLED True needs datasets that are lists of dicts; set it "
            "False."
        )
    if name == "RepeatFactorTrainingSampler" and isinstance(records, list | Records):
        factors = repeat_factors(records, *_repeating(cfg))
        sampler = RepeatFactorTrainingSampler(factors)
        return build_detection_train_loader.from_config(
            cfg, mapper=mapper, dataset=records, sampler=sampler
        )
    if name not in SAMPLERS:
        return build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=records)
    stock = changed(cfg, {"DATALOADER.SAMPLER_TRAIN": "TrainingSampler"})
    parts = build_detection_train_loader.from_config(stock, mapper=mapper, dataset=records)
    records = parts["dataset"]
    if not isinstance(records, list | Records):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN {name} needs datasets that are lists of dicts; "
            "TrainingSampler works with others."
        )
    if name != WEIGHTED:
        return parts | {"sampler": ClassAwareTrainingSampler(records)}
    factors = weighted_repeat_factors(
        records,
        sources(records),
        dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR),
        *_repeating(cfg),
    )
    return parts | {"sampler": RepeatFactorTrainingSampler(factors)}
