"""Array functions that numpy has in a slower form."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def unique(*arrays: ArrayLike) -> NDArray[np.int64]:
    """Return the different integers of flat arrays, ascending.

    numpy 2.3 and later put integers into a hash table: twenty times slower than sorting for a
    million keys of images and classes.
    """
    values = np.sort(np.concatenate([np.asarray(a, dtype=np.int64).ravel() for a in arrays]))
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values
