"""Batches: every row once an epoch, ranks in step, counts exact."""

from collections import Counter

import numpy as np
import pytest
import torch

from fsdp_qlora.data.batches import NOT_TRAINED, Batches, collate, held_out
from fsdp_qlora.data.tokens import Sample


def make_samples(num, seed=0):
    """Rows of different length whose ids all equal 1 + their index, so that they can be told."""
    lengths = np.random.default_rng(seed).integers(3, 20, size=num)
    return [
        Sample(np.full(length, index + 1, dtype=np.int32), int(length) // 2)
        for index, length in enumerate(lengths)
    ]


def rows_of(batch):
    return [int(row[0]) for row in batch.input_ids if row[0] > 0]


SHAPES = [(7, 2, 3, 2), (1, 2, 1, 2), (5, 1, 1, 4), (24, 2, 2, 2), (23, 4, 1, 3), (2, 3, 2, 1)]


@pytest.mark.parametrize(("num", "batch", "accumulation", "world"), SHAPES)
def test_every_epoch_shows_every_row_once_over_all_ranks(num, batch, accumulation, world):
    samples = make_samples(num)
    ranks = [Batches(samples, batch, accumulation, world, r, 42, 3, -1) for r in range(world)]
    per_epoch = ranks[0].steps_per_epoch
    assert ranks[0].num_steps == 3 * per_epoch == 3 * -(-num // (batch * accumulation * world))
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = Counter(
            row for b in ranks for s in steps for micro in b.step(s) for row in rows_of(micro)
        )
        assert seen == Counter(range(1, num + 1))


@pytest.mark.parametrize(("num", "batch", "accumulation", "world"), SHAPES)
def test_all_ranks_have_as_many_micro_batches_at_every_step(num, batch, accumulation, world):
    samples = make_samples(num)
    ranks = [Batches(samples, batch, accumulation, world, r, 42, 1, -1) for r in range(world)]
    for step in range(ranks[0].num_steps):
        micro = [b.step(step) for b in ranks]
        assert len({len(m) for m in micro}) == 1 and 1 <= len(micro[0]) <= accumulation
        assert all(1 <= len(b.input_ids) <= batch for m in micro for b in m)


def test_epochs_differ_and_a_step_is_a_function_of_seed_and_step():
    samples = make_samples(16)
    batches = Batches(samples, 2, 1, 2, 0, 42, 2, -1)
    assert batches.rows(0) != batches.rows(4)
    later = batches.step(5)
    again = Batches(samples, 2, 1, 2, 0, 42, 2, -1).step(5)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(later, again, strict=True))
    assert Batches(samples, 2, 1, 2, 0, 43, 2, -1).rows(0) != batches.rows(0)


@pytest.mark.parametrize("max_steps", [1, 3, 11])
def test_max_steps_is_the_number_of_steps_even_past_the_epochs(max_steps):
    batches = Batches(make_samples(8), 2, 1, 2, 0, 42, 1, max_steps)
    assert batches.num_steps == max_steps
    assert batches.step(max_steps - 1)[0].num_tokens > 0


def test_the_epoch_of_a_step_is_the_share_of_rows_seen():
    batches = Batches(make_samples(10), 2, 1, 2, 0, 42, 2, -1)
    assert [batches.epoch(step) for step in range(6)] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


def test_a_rank_left_without_a_row_gets_one_row_in_which_nothing_is_trained():
    batch = Batches(make_samples(1), 2, 1, 2, 1, 42, 1, -1).step(0)[0]
    assert batch.input_ids.shape == (1, 8) and (batch.labels == NOT_TRAINED).all()
    assert batch.num_trained_tokens == batch.num_tokens == 0


def test_labels_are_the_ids_after_the_prompt_and_the_end_is_kept_when_it_is_also_the_padding():
    eos = 0
    samples = [
        Sample(np.array([5, 6, 7, eos], np.int32), 2),
        Sample(np.array([8, eos], np.int32), 1),
    ]
    batch = collate(samples, pad_multiple=8)
    assert batch.input_ids.tolist() == [[5, 6, 7, eos, 0, 0, 0, 0], [8, eos, 0, 0, 0, 0, 0, 0]]
    x = NOT_TRAINED
    assert batch.labels.tolist() == [[x, x, 7, eos, x, x, x, x], [x, eos, x, x, x, x, x, x]]
    assert (batch.num_trained_tokens, batch.num_tokens) == (3, 6)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_trained_tokens_are_the_labels_that_a_shift_leaves(prompt):
    batch = collate([Sample(np.arange(1, 12, dtype=np.int32), prompt)])
    assert batch.num_trained_tokens == int((batch.labels[:, 1:] != NOT_TRAINED).sum())


@pytest.mark.parametrize(("length", "width"), [(1, 8), (8, 8), (9, 16), (511, 512)])
def test_rows_are_padded_to_a_multiple_and_not_to_the_context(length, width):
    assert collate([Sample(np.ones(length, np.int32), 0)]).input_ids.shape == (1, width)


def test_rows_of_like_length_share_a_micro_batch_and_the_longest_come_first():
    samples = make_samples(64)
    micro = Batches(samples, 4, 4, 2, 0, 42, 1, -1).step(0)
    widths = [batch.input_ids.shape[1] for batch in micro]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


def test_held_out_rows_come_once_over_all_ranks_in_as_many_batches_on_each():
    samples = make_samples(7)
    ranks = [held_out(samples, 2, 3, rank) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(row for batches in ranks for batch in batches for row in rows_of(batch))
    assert seen == Counter(range(1, 8))
    total = sum(batch.num_trained_tokens for batches in ranks for batch in batches)
    assert total == sum(sample.num_trained_tokens for sample in samples)
    assert held_out([], 2, 3, 0) == []
