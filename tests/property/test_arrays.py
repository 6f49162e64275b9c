"""`unique` is numpy's, on arrays joined in any number."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2_balance.utils.arrays import unique

integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)


@given(st.lists(st.lists(integers), min_size=1, max_size=3))
def test_unique_is_that_of_numpy(lists):
    found = unique(*(np.array(values, dtype=np.int64) for values in lists))
    assert found.dtype == np.int64
    assert found.tolist() == sorted({value for values in lists for value in values})
