"""Run lengths of random masks are those of pycocotools, and corrupt ones are named."""

import numpy as np
import pycocotools.mask as mask_util
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from d2_balance.data.rle import all_fill, rle_problem, run_lengths

masks = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1)
)


def runs_of(mask):
    """Background first, column by column: a loop over the pixels."""
    runs, value = [0], 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@given(masks)
def test_text_and_numbers_give_the_runs_of_the_pixels(mask):
    text = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    assert run_lengths(text).tolist() == run_lengths(runs_of(mask)).tolist() == runs_of(mask)
    assert rle_problem(text, mask.shape) == "" and all_fill([text], [mask.size])


@given(masks, st.integers(1, 5))
def test_another_size_is_a_problem(mask, more):
    text = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    height, width = mask.shape
    assert "pixels" in rle_problem(text, (height + more, width))
    assert not all_fill([text], [(height + more) * width])


@given(st.lists(masks, min_size=1, max_size=5))
def test_many_masks_fill_together_as_they_do_alone(several):
    texts = [mask_util.encode(np.asfortranarray(mask))["counts"].decode() for mask in several]
    pixels = [mask.size for mask in several]
    assert all_fill(texts, pixels)
    assert not all_fill(texts, [pixels[0] + 1, *pixels[1:]])


@given(st.text(max_size=12))
def test_any_text_is_a_mask_or_has_a_problem(text):
    problem = rle_problem(text, (3, 4))
    assert bool(problem) != (text.isascii() and bool(text) and all_fill([text], [12]))
    if not problem:
        runs = run_lengths(text)
        assert (runs >= 0).all() and runs.sum() == 12
