"""Random numbers of a step as a function of the iteration, so that a resumed run repeats them."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..resume.random_state import seed_everything


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
