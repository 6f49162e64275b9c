"""The best scores of each class over a test set, in bounded memory.

K: classes, D: detections.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_CHUNK = 1 << 18  # scores that wait before they are sorted in
_BITS = 31  # of a float32 that is at least 0: its bits, as an integer, are in its order


class BestScores:
    """The best scores of each class of one process; at most K * `limit`, and a chunk.

    Args:
        num_classes: K.
        limit: scores of a class that are kept, at least 1.
        floors: (K,) float32 to begin with; None: 0.

    Attributes:
        floors: (K,) float32, the least that a score must be to be among them; 0 while there are
            fewer. Another array whenever it has changed.
    """

    def __init__(self, num_classes: int, limit: int, floors: np.ndarray | None = None) -> None:
        self.limit = limit
        self.floors = np.zeros(num_classes, np.float32) if floors is None else floors
        self._category, self._score = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, category: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Take scores in.

        Args:
            category: (D,) in [0, K).
            score: (D,) float32, at least 0.

        Returns:
            (D,) bool: those that may be among the best.
        """
        kept = score >= self.floors[category]
        self._waiting.append((category[kept].astype(np.int32), score[kept].astype(np.float32)))
        self._count += len(self._waiting[-1][0])
        if self._count > max(_CHUNK, len(self._score) // 4):
            self.sort_in()
        return kept

    def sort_in(self) -> None:
        """Sort in what waits, and raise `floors`."""
        category = np.concatenate([self._category, *(c for c, _ in self._waiting)])
        score = np.concatenate([self._score, *(s for _, s in self._waiting)])
        self._waiting, self._count = [], 0
        order = np.lexsort((-score, category))
        category, score = category[order], score[order]
        rank = np.arange(len(category)) - np.searchsorted(category, category)
        last = rank == self.limit - 1
        floors = self.floors.copy()
        floors[category[last]] = np.maximum(floors[category[last]], score[last])
        self.floors = floors
        kept = rank < self.limit
        self._category, self._score = category[kept], score[kept]

    def join(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """Raise `floors` to those of all ranks together, by bisection; scores stay where they are.

        Args:
            total: sums an (K,) int64 array across ranks. Every rank must call this.
        """
        self.sort_in()
        # ascending keys of class and score
        classes = np.arange(len(self.floors), dtype=np.int64) << _BITS
        keys = (self._category.astype(np.int64) << _BITS) + self._score.view(np.int32)
        keys.sort()
        ends = np.searchsorted(keys, classes + (1 << _BITS))
        low, high = np.zeros_like(classes), np.full_like(classes, (1 << _BITS) - 1)
        for _ in range(_BITS):
            middle = (low + high + 1) // 2
            enough = total(ends - np.searchsorted(keys, classes + middle)) >= self.limit
            low, high = np.where(enough, middle, low), np.where(enough, high, middle - 1)
        self.floors = np.maximum(self.floors, low.astype(np.int32).view(np.float32))
