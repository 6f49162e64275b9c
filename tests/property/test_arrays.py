"""`unique` is numpy's, and `positions` what a dict says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2_balance.utils.arrays import positions, unique

integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)


@given(st.lists(st.lists(integers), min_size=1, max_size=3))
def test_unique_is_that_of_numpy(lists):
    found = unique(*(np.array(values, dtype=np.int64) for values in lists))
    assert found.dtype == np.int64
    assert found.tolist() == sorted({value for values in lists for value in values})


@given(st.sets(integers | st.integers(0, 40)), st.lists(integers | st.integers(0, 40)))
def test_positions_are_those_of_a_dict(ids, wanted):
    order = list(ids)
    places = {number: place for place, number in enumerate(order)}
    found = positions(np.array(order, dtype=np.int64), np.array(wanted, dtype=np.int64))
    assert found.tolist() == [places.get(number, -1) for number in wanted]
