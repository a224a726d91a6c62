"""Rows packed into sequences: each once, none too long, ranks equally busy."""

import numpy as np
import pytest

from fsdp_qlora.data import batches


def spread(num, seed=0, longest=2048):
    """Lengths as real data have them: median about 200, cut."""
    lengths = np.random.default_rng(seed).lognormal(np.log(200), 0.9, num)
    return lengths.astype(int).clip(1, longest)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num", [1, 2, 7, 100, 3000])
def test_every_row_is_packed_once_and_all_ranks_have_as_many_sequences(num, num_ranks):
    for seed in range(3):
        lengths = spread(num, seed)
        bins = batches.pack(lengths, 2048, num_ranks, seed, epoch=1)
        assert sorted(row for rows in bins for row in rows) == list(range(num))
        assert len(bins) % num_ranks == 0 and len(bins) > 0
        assert all(int(lengths[rows].sum()) <= 2048 for rows in bins)


def test_random_lengths_and_capacities_hold_too():
    random = np.random.default_rng(1)
    for _ in range(200):
        capacity = int(random.integers(1, 60))
        lengths = random.integers(1, capacity + 1, size=int(random.integers(1, 80)))
        num_ranks = int(random.integers(1, 6))
        bins = batches.pack(lengths, capacity, num_ranks, seed=7, epoch=0)
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert len(bins) % num_ranks == 0
        assert max(int(lengths[rows].sum()) for rows in bins) <= capacity
        num_empty = sum(not rows for rows in bins)
        assert num_empty < num_ranks


def test_hardly_anything_is_padded_and_ranks_are_equally_busy():
    lengths = spread(20_000)
    bins = batches.pack(lengths, 2048, 4, seed=42, epoch=0)
    fills = np.array([lengths[rows].sum() for rows in bins]).reshape(-1, 4)
    assert fills.sum() / (len(bins) * 2048) > 0.99
    assert ((fills.max(1) - fills.min(1)) > 2048 * 0.02).sum() <= 2  # what is left over at the end
    by_rank = fills.sum(0)
    assert by_rank.max() / by_rank.min() < 1.002


def test_a_packing_is_a_function_of_seed_and_epoch():
    lengths = spread(500)

    def pack(seed, epoch):
        return batches.pack(lengths, 2048, 2, seed, epoch)

    assert pack(1, 2) == pack(1, 2)
    assert pack(1, 2) != pack(1, 3) and pack(1, 2) != pack(2, 2)
    assert {frozenset(rows) for rows in pack(1, 2)} != {frozenset(rows) for rows in pack(1, 3)}
