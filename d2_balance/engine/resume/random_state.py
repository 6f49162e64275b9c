"""Random generators as a function of where a run is, so that nothing of them need be saved."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm


def seed_everything(*key: int) -> None:
    """Seed Python, numpy and torch from a few numbers of at least 0, for example (seed, rank)."""
    torch.manual_seed(_seed_python(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed from `key` inside of the block; afterwards the generators are as they were before.

    Generators of accelerators are left alone: only data loading uses this.
    """
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(_seed_python(key))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def _seed_python(key: tuple[int, ...]) -> int:
    """Seed Python and numpy; return the seed for torch."""
    # SeedSequence mixes the numbers, so that neighbouring keys give unrelated streams.
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    return seed


class SeedSteps(HookBase):
    """Seeds the random generators before each step from the run's seed, the rank and the iteration.

    What a step draws (Detectron2 samples anchors and proposals) is then the same in a resumed run,
    with nothing to save.

    Args:
        seed: at least 0.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self) -> None:
        seed_everything(self._seed, comm.get_rank(), self.trainer.iter)
