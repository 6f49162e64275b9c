"""Run lengths equal those that pycocotools encodes, and broken ones are named.

Each mask here was given to pycocotools 2.0.11 in a process of its own with a time limit: decode,
area, toBbox, merge and iou return or raise. Left out are those that it does not survive: empty
counts (merge crashes), counts whose last number goes on behind the end (merge does not return, or
memory is overwritten), and counts that end in a space (memory is overwritten).
"""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from d2_balance.data.rle import all_fill, rle_problem, run_lengths


def lengths(mask):
    """Runs of a mask, counted one by one."""
    flat, runs, current = mask.flatten(order="F"), [0], 0
    for pixel in flat:
        if pixel != current:
            runs.append(0)
            current = pixel
        runs[-1] += 1
    return runs


def text(mask):
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.5, 1])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (641, 480)])
def test_runs_are_those_of_the_mask(size, share):
    mask = np.random.default_rng(0).random(size) < share
    assert run_lengths(text(mask)).tolist() == lengths(mask)
    assert rle_problem(text(mask), size) == "" == rle_problem(lengths(mask), size)


def test_a_large_object_has_long_numbers():
    mask = np.zeros((3000, 4000), bool)
    mask[10:2900, 100:3900] = True
    assert run_lengths(text(mask)).tolist() == lengths(mask)


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        (text(np.ones((4, 4))), "its runs have 16 pixels, not the 120 of its size"),
        (text(np.eye(40)), "its runs have 1,600 pixels"),
        ([60, 59], "its runs have 119 pixels"),
        ([130, -10], "a run of less than 0 pixels"),
        ([60.0, 60.0], "not integers"),
        ([10**30], "too large"),
        ("P1 3", "a character that no compressed RLE has"),
        ("é", "a character that no compressed RLE has"),
        ("o" * 9 + "0", "more than 40 bits"),
    ],
)
def test_what_does_not_fill_the_image_is_named(counts, problem):
    assert problem in rle_problem(counts, (10, 12))


SIZES = [(1, 1), (7, 300), (300, 7), (20, 30), (641, 480)]
MANY = [
    (text(np.random.default_rng(n).random(size) < share), size[0] * size[1])
    for n, size in enumerate(SIZES)
    for share in (0, 0.01, 0.5, 1)
]


def test_many_masks_are_checked_at_once():
    assert all_fill(*zip(*MANY, strict=True))
    assert all_fill(*zip(*MANY[:1], strict=True))


@pytest.mark.parametrize("place", [0, 7, len(MANY) - 1])
@pytest.mark.parametrize("change", ["pixel", "negative", "é"])
def test_one_bad_mask_among_many_is_found(place, change):
    masks = list(MANY)
    counts, pixels = masks[place]
    negative = "0" + "1" * 3 + "N"  # 0, 1, 1, 1 + 1 and 1 - 2 pixels
    masks[place] = {
        "pixel": (counts, pixels + 1),
        "negative": (negative, 3),
        "é": ("é", pixels),
    }[change]
    assert not all_fill(*zip(*masks, strict=True))
    counts, pixels = masks[place]
    assert rle_problem(counts, (1, pixels))
