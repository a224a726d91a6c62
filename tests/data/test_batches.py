"""Batches: every row once an epoch, ranks in step, counts exact."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fsdp_qlora.data import batches as batches_of
from fsdp_qlora.data.batches import Batches, SamplerConfig, collate
from fsdp_qlora.data.row_formats import NOT_TRAINED
from fsdp_qlora.data.tokens import Sample, of_samples
from tests import tiny


def sample(ids, num_given=0):
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= num_given)


def make_samples(num, seed=0):
    """Rows of different length whose ids all equal 1 + their index, so that they can be told."""
    lengths = np.random.default_rng(seed).integers(3, 20, size=num)
    rows = [sample([number] * length, length // 2) for number, length in enumerate(lengths, 1)]
    return of_samples(rows, "x")


def rows_of(batch):
    return [int(row[0]) for row in batch.input_ids if row[0] > 0]


SHAPES = [(7, 2, 3, 2), (1, 2, 1, 2), (5, 1, 1, 4), (24, 2, 2, 2), (23, 4, 1, 3), (2, 3, 2, 1)]
SHAPES += [(101, 2, 2, world) for world in range(1, 6)] + [(300, 3, 1, world) for world in (1, 5)]


@pytest.mark.parametrize(("num", "batch", "accumulation", "world"), SHAPES)
def test_every_epoch_shows_every_row_once_over_all_ranks(num, batch, accumulation, world):
    samples = make_samples(num)
    ranks = [
        Batches(samples, SamplerConfig(batch, accumulation, world, r, 42, 3, -1))
        for r in range(world)
    ]
    per_epoch = ranks[0].steps_per_epoch
    assert ranks[0].num_steps == 3 * per_epoch == 3 * max(num // (batch * accumulation * world), 1)
    for epoch in range(3):
        seen, sizes = Counter(), []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            micros = [b.step(step) for b in ranks]
            assert len({len(micro) for micro in micros}) == 1, "as many on every rank"
            assert all(1 <= len(b.input_ids) <= batch for micro in micros for b in micro)
            rows = [row for micro in micros for b in micro for row in rows_of(b)]
            seen.update(rows)
            sizes.append(len(rows))
        assert seen == Counter(range(1, num + 1)) and max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_a_step_is_a_function_of_seed_and_step():
    samples = make_samples(16)
    batches = Batches(samples, SamplerConfig(2, 1, 2, 0, 42, 2, -1))
    assert batches.rows(0).tolist() != batches.rows(4).tolist()
    later = batches.step(5)
    again = Batches(samples, SamplerConfig(2, 1, 2, 0, 42, 2, -1)).step(5)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(later, again, strict=True))
    other = Batches(samples, SamplerConfig(2, 1, 2, 0, 43, 2, -1))
    assert other.rows(0).tolist() != batches.rows(0).tolist()


@pytest.mark.parametrize("shape", [(1, 12, 1), (3, 1, 4), (2, 3, 2), (12, 1, 1), (2, 2, 3)])
def test_a_step_has_the_same_rows_however_ranks_and_micro_batches_share_it(shape):
    batch, accumulation, world = shape
    samples = make_samples(100)
    reference = Batches(samples, SamplerConfig(4, 3, 1, 0, 42, 2, -1))
    batches = Batches(samples, SamplerConfig(batch, accumulation, world, 0, 42, 2, -1))
    assert batches.num_steps == reference.num_steps == 16
    for step in range(16):
        assert batches.rows(step).tolist() == reference.rows(step).tolist()


def test_steps_of_an_epoch_are_those_of_the_users_example():
    """10,748 rows, 8 on each card, 3 epochs: floor, and the rest joins the steps."""
    assert [3 * batches_of.steps_per_epoch(10_748, 8 * cards) for cards in (1, 2)] == [4029, 2013]
    assert batches_of.steps_per_epoch(3, 8) == 1
    sizes = Counter(len(rows) for rows in batches_of.epoch_order(np.full(10_748, 5), 16, 0, 0))
    assert sizes == {16: 659, 17: 12}


@pytest.mark.parametrize("max_steps", [1, 3, 11])
def test_max_steps_is_the_number_of_steps_even_past_the_epochs(max_steps):
    batches = Batches(make_samples(8), SamplerConfig(2, 1, 2, 0, 42, 1, max_steps))
    assert batches.num_steps == max_steps
    assert batches.step(max_steps - 1)[0].num_tokens > 0


def test_parts_of_an_epoch_end_at_the_step_at_which_transformers_ends():
    from transformers import Trainer, TrainingArguments

    for epochs in (0.5, 1.5, 1.1, 0.01, 2):
        batches = Batches(make_samples(20), SamplerConfig(2, 1, 1, 0, 42, epochs, -1))
        args = TrainingArguments(num_train_epochs=epochs, report_to=[])
        own = {"get_total_train_batch_size": lambda _: 2, "get_sp_size": lambda: 1}
        trainer = SimpleNamespace(**own, num_examples=len)
        loader = range(batches.steps_per_epoch)
        found = Trainer.set_initial_training_values(trainer, args, loader)
        assert batches.num_steps == found[-1] == len(batches_of_run(batches)), epochs


def batches_of_run(batches):
    return [batches.step(step) for step in range(batches.num_steps)]


def test_the_epoch_of_a_step_is_the_share_of_rows_seen():
    batches = Batches(make_samples(10), SamplerConfig(2, 1, 2, 0, 42, 2, -1))
    assert [batches.epoch(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    batches = Batches(make_samples(11), SamplerConfig(4, 1, 1, 0, 42, 2, -1))
    assert batches.epoch(0) == 5 / 11 and batches.epoch(1) == 1


def test_a_rank_left_without_a_row_gets_one_row_in_which_nothing_is_trained():
    batch = Batches(make_samples(1), SamplerConfig(2, 1, 2, 1, 42, 1, -1)).step(0)[0]
    assert batch.input_ids.shape == (1, 8) and (batch.labels == NOT_TRAINED).all()
    assert batch.num_trained_tokens == batch.num_tokens == 0


def test_labels_are_the_learned_ids_and_the_end_is_kept_when_it_is_also_the_padding():
    end = 0
    turns = Sample(np.array([3, 4, 5, end, 6, end], np.int32), np.array([0, 0, 1, 1, 0, 1], bool))
    batch = collate([turns, sample([8, end], 1)], pad_multiple=8)
    assert batch.input_ids.tolist() == [[3, 4, 5, end, 6, end, 0, 0], [8, end, 0, 0, 0, 0, 0, 0]]
    x = NOT_TRAINED
    assert batch.labels.tolist() == [[x, x, 5, end, x, end, x, x], [x, end, x, x, x, x, x, x]]
    assert (batch.num_trained_tokens, batch.num_tokens) == (4, 8)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_trained_tokens_are_the_labels_that_a_shift_leaves(prompt):
    batch = collate([sample(range(1, 12), prompt)])
    assert batch.num_trained_tokens == int((batch.labels[:, 1:] != NOT_TRAINED).sum())


@pytest.mark.parametrize(
    ("length", "multiple", "longest", "width"),
    [
        (1, 8, None, 8),
        (8, 8, None, 8),
        (9, 8, None, 16),
        (511, 8, None, 512),
        (9, 64, None, 64),
        (65, 64, 200, 128),
        (190, 64, 190, 192),
        (130, 64, 150, 152),  # 192 would be wider than any row needs
    ],
)
def test_rows_are_padded_to_a_multiple_and_not_to_the_context(length, multiple, longest, width):
    batch = collate([sample([1] * length)], multiple, longest)
    assert batch.input_ids.shape == (1, width)


def test_rows_of_like_length_meet_and_little_is_padded():
    """Lengths as real data have them (log-normal, median 200, cut at 2048)."""
    lengths = np.random.default_rng(0).lognormal(np.log(200), 0.9, 6000).astype(int).clip(4, 2048)
    shuffled = np.random.default_rng(1).permutation(6000)
    chance, ours = np.split(shuffled, 375), batches_of.epoch_order(lengths, 16, 42, 0)
    assert sorted(np.concatenate(ours).tolist()) == list(range(6000))
    assert all((np.diff(lengths[rows]) <= 0).all() for rows in ours)
    padded = [
        sum(len(rows) * int(lengths[rows].max()) for rows in steps) for steps in (ours, chance)
    ]
    assert 1 - lengths.sum() / padded[0] < 0.1 and 1 - lengths.sum() / padded[1] > 0.5
    firsts = [lengths[rows].max() for rows in batches_of.epoch_order(lengths, 16, 42, 0)[:64]]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_ranks_get_about_as_many_tokens_in_every_step():
    samples = make_samples(400)
    ranks = [Batches(samples, SamplerConfig(4, 2, 2, rank, 42, 1, -1)) for rank in range(2)]
    for step in range(ranks[0].num_steps):
        counts = [sum(batch.num_tokens for batch in b.step(step)) for b in ranks]
        assert max(counts) <= 1.3 * min(counts)


def test_the_padding_that_is_foretold_is_what_batches_have():
    samples = make_samples(103)
    for batch, accumulation, world, multiple in ((2, 2, 2, 8), (4, 1, 3, 16), (1, 1, 1, 8)):
        ranks = [
            Batches(samples, SamplerConfig(batch, accumulation, world, rank, 42, 1, -1, multiple))
            for rank in range(world)
        ]
        steps = range(ranks[0].num_steps)
        made = [m.input_ids.numel() for b in ranks for step in steps for m in b.step(step)]
        told = batches_of.padded_tokens(samples.lengths, ranks[0].sampler)
        assert sum(made) == sum(told) and max(made) == max(told) == ranks[0].most_tokens
    one, whole = (Batches(samples, SamplerConfig(4, 2, 2, 0, 1, 1, steps)) for steps in (1, -1))
    assert max(m.input_ids.numel() for m in one.step(0)) == one.most_tokens < whole.most_tokens


def test_held_out_rows_come_once_over_all_ranks_in_as_many_batches_on_each():
    samples = make_samples(7)
    ranks = [tiny.held_out(samples, 2, 3, rank) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(row for batches in ranks for batch in batches for row in rows_of(batch))
    assert seen == Counter(range(1, 8))
    total = sum(batch.num_trained_tokens for batches in ranks for batch in batches)
    assert total == int(samples.num_trained.sum()) == sum(s.num_trained_tokens for s in samples)
    assert tiny.held_out(of_samples([], "x"), 2, 3, 0) == []


def spread(num, seed=0, longest=2048):
    """Lengths as real data have them: median about 200, cut."""
    lengths = np.random.default_rng(seed).lognormal(np.log(200), 0.9, num)
    return lengths.astype(int).clip(1, longest)


def test_every_row_is_packed_once_and_all_ranks_have_as_many_sequences():
    random = np.random.default_rng(1)
    for _ in range(200):
        capacity = int(random.integers(1, 60))
        lengths = random.integers(1, capacity + 1, size=int(random.integers(1, 80)))
        num_ranks = int(random.integers(1, 6))
        bins = batches_of.pack(lengths, capacity, num_ranks, seed=7, epoch=0)
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert len(bins) % num_ranks == 0
        assert max(int(lengths[rows].sum()) for rows in bins) <= capacity
        num_empty = sum(not rows for rows in bins)
        assert num_empty < num_ranks


def test_hardly_anything_is_padded_and_ranks_are_equally_busy():
    lengths = spread(20_000)
    bins = batches_of.pack(lengths, 2048, 4, seed=42, epoch=0)
    fills = np.array([lengths[rows].sum() for rows in bins]).reshape(-1, 4)
    assert sorted(row for rows in bins for row in rows) == list(range(20_000))
    assert fills.sum() / (len(bins) * 2048) > 0.99 and fills.max() <= 2048
    assert ((fills.max(1) - fills.min(1)) > 2048 * 0.02).sum() <= 2  # what is left over at the end
    by_rank = fills.sum(0)
    assert by_rank.max() / by_rank.min() < 1.002


def test_a_packing_is_a_function_of_seed_and_epoch():
    lengths = spread(500)

    def pack(seed, epoch):
        return batches_of.pack(lengths, 2048, 2, seed, epoch)

    assert pack(1, 2) == pack(1, 2)
    assert pack(1, 2) != pack(1, 3) and pack(1, 2) != pack(2, 2)
    assert {frozenset(rows) for rows in pack(1, 2)} != {frozenset(rows) for rows in pack(1, 3)}
