"""Frequency groups of classes, by the number of training images that show them."""

from collections.abc import Sequence

GROUPS = {"r": "rare", "c": "common", "f": "frequent"}
"""Frequency groups of LVIS, by training images: up to 10, up to 100, and above."""

LVIS_CUTS = (10, 100)


def groups_from_counts(counts: Sequence[int], cuts: tuple[int, int] = LVIS_CUTS) -> list[str]:
    """Frequency group of each class.

    Args:
        counts: (K,) training images that hold the class.
        cuts: highest count of a rare and of a common class (LVIS paper, 1908.03195).

    Raises:
        ValueError: cut points that fall or are negative.
    """
    rare, common = cuts
    if not 0 <= rare <= common:
        raise ValueError(f"cuts must be (a, b) with 0 <= a <= b, not {tuple(cuts)}")
    return ["r" if n <= rare else "c" if n <= common else "f" for n in counts]
