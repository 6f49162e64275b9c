"""Ranks inside groups, and sums over micro-batches, against slow loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from d2_balance.losses._kernels.ranks import importance, rank_within, rescaled
from d2_balance.utils.distributed import MicroBatches, sum_across_ranks

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.integers(0, 4), max_size=20), st.randoms(use_true_random=False))
def test_rank_within_counts_the_entries_of_the_group_that_come_first(groups, random):
    order = list(range(len(groups)))
    random.shuffle(order)
    expected, seen = [0] * len(groups), {}
    for entry in order:
        expected[entry] = seen.setdefault(groups[entry], 0)
        seen[groups[entry]] += 1
    rank = rank_within(
        torch.tensor(groups, dtype=torch.int64), torch.tensor(order, dtype=torch.int64)
    )
    assert rank.tolist() == expected


@given(st.integers(1, 50), st.floats(0.1, 4), st.floats(0, 1))
def test_importance_falls_from_one_and_never_below_the_bias(most, k, bias):
    weight = importance(torch.arange(most, dtype=torch.float64), most, k, bias)
    assert abs(weight[0] - 1) < 1e-12  # (1 - b) + b, to rounding
    assert (weight.diff() <= 0).all() and (weight >= bias**k - 1e-12).all()


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 10)), max_size=12))
def test_rescaled_weights_keep_the_sum_of_the_losses(pairs):
    weight, loss = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    assert torch.allclose((rescaled(weight, loss) * loss).sum(), loss.sum(), rtol=1e-9)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5))
def test_micro_batches_see_the_sum_of_all_of_them(parts):
    batches = MicroBatches(len(parts))
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    for tensor in tensors:
        with batches.counting():
            sum_across_ranks([tensor, None])
    batches.total()
    for _ in tensors:
        with batches.summed():
            total, nothing = sum_across_ranks([torch.zeros(3), None])
        assert nothing is None
        assert torch.allclose(total, torch.stack(tensors).sum(0), rtol=1e-9, atol=1e-6)
