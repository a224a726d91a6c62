"""Packed sequences: every row once, ranks in step, and the loss and gradients of the rows alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from fsdp_qlora.data.batches import Batches, PackedBatches, SamplerConfig, collate, flatten
from fsdp_qlora.data.row_formats import NOT_TRAINED
from fsdp_qlora.data.tokens import Sample, of_samples
from fsdp_qlora.errors import UserError
from fsdp_qlora.training import losses
from tests import tiny, tiny_models
from tests.ranks import run_ranks

CONTEXT = 40


def make_samples(num, vocab_size=256, seed=0):
    """Rows of different length, about half of each trained, ids from 3."""
    random = np.random.default_rng(seed)
    return [
        Sample(
            random.integers(3, vocab_size, length).astype(np.int32),
            np.arange(length) >= length // 2,
        )
        for length in random.integers(3, CONTEXT, num)
    ]


def numbered(num):
    """Rows whose ids all equal 1 + their index, so that they can be told."""
    lengths = np.random.default_rng(0).integers(3, CONTEXT, num)
    rows = [np.full(length, i, np.int32) for i, length in enumerate(lengths, 1)]
    return of_samples([Sample(row, np.ones(len(row), bool)) for row in rows], "x")


def rows_of(batch):
    starts = np.cumsum([0, *batch.row_lengths])[:-1]
    return [int(batch.input_ids[0, start]) for start in starts if batch.input_ids[0, start] > 0]


@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize(("num", "batch", "accumulation"), [(1, 1, 1), (50, 2, 2), (301, 1, 3)])
def test_every_epoch_shows_every_row_once_and_ranks_stay_in_step(num, batch, accumulation, world):
    samples = numbered(num)
    ranks = [
        PackedBatches(samples, CONTEXT, SamplerConfig(batch, accumulation, world, rank, 42, 2, -1))
        for rank in range(world)
    ]
    per_epoch = ranks[0].steps_per_epoch
    assert {b.num_steps for b in ranks} == {2 * per_epoch}
    orders = []
    for epoch in range(2):
        micro = [b.step(epoch * per_epoch + s) for b in ranks for s in range(per_epoch)]
        assert len({len(m) for m in micro[::per_epoch]}) == 1
        seen = [row for m in micro for each in m for row in rows_of(each)]
        assert Counter(seen) == Counter(range(1, num + 1))
        orders.append(seen)
    assert num == 1 or orders[0] != orders[1]
    assert all(b.input_ids.shape[0] == 1 for m in micro for b in m)
    tokens = [
        sum(each.num_tokens for m in micro[r * per_epoch :][:per_epoch] for each in m)
        for r in range(world)
    ]
    assert max(tokens) - min(tokens) <= 2 * CONTEXT
    assert sum(tokens) == samples.lengths.sum()


def test_no_row_is_trained_to_predict_the_next():
    samples = [
        Sample(np.array(ids, np.int32), np.array(t, bool))
        for ids, t in [([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 1]), ([4, 3, 2], [1, 1, 0])]
    ]
    batch = flatten(samples, 4)
    assert batch.row_lengths == (3, 2, 3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    N = NOT_TRAINED
    assert batch.labels.tolist() == [[N, 6, 7, N, 9, N, 3, N]]
    assert batch.num_trained_tokens == 4 == collate(samples).num_trained_tokens
    assert flatten(samples, 16).row_lengths == (3, 2, 3, 8)
    assert flatten([], 8).num_trained_tokens == 0


def _loss_and_gradients(world, path, flags, batches):
    model, _, _ = tiny.build(path, world, "--lora_rank=4", "--lora_dropout=0", *flags)
    tiny.fill_lora(model)
    loss = sum(losses.token_loss_sum(model, batch, world.device) for batch in batches)
    loss.backward()
    return loss.item(), [grad.cpu().numpy() for grad in tiny.lora_grads(model)]


def _compare(world, path, cases, samples):
    padded = [collate(samples[i : i + 4]) for i in range(0, len(samples), 4)]
    flat = [flatten(samples[i : i + 6], 8) for i in range(0, len(samples), 6)]
    results = []
    for flags in cases:
        want = _loss_and_gradients(world, path, flags, padded)
        results.append((want, _loss_and_gradients(world, path, flags, flat)))
    return results


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("mistral", {"sliding_window": 7})]
)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(tmp_path, model_type, changes):
    """Reference: the same rows padded, one beside the other; every level of checkpointing."""
    from tests.model.test_shard import CHECKPOINTING

    on_cuda = tiny.DEVICE == "cuda"
    precision = "bf16" if on_cuda else "fp32"
    path = tiny.save_model(tmp_path / "model", model_type, **changes)
    cases = [(f"--precision={precision}", *flags) for flags in CHECKPOINTING.values()]
    rtol, atol = (0.05, 0.05) if on_cuda else (1e-3, 1e-5)
    for (loss, grads), (packed_loss, packed_grads) in run_ranks(
        _compare, 1, path, cases, make_samples(12)
    )[0]:
        assert packed_loss == pytest.approx(loss, rel=0.01 if on_cuda else 1e-5)
        for grad, packed_grad in zip(grads, packed_grads, strict=True):
            np.testing.assert_allclose(packed_grad, grad, rtol=rtol, atol=atol * abs(grad).max())


def test_flat_batches_show_the_rows_of_padded_ones():
    samples = of_samples(make_samples(40), "x")
    dealing = SamplerConfig(3, 2, 2, 1, 42, 1, -1)
    flat, padded = Batches(samples, dealing, is_flat=True), Batches(samples, dealing)
    for step in range(flat.num_steps):
        for one, other in zip(flat.step(step), padded.step(step), strict=True):
            assert one.num_trained_tokens == other.num_trained_tokens
            starts = np.cumsum([0, *one.row_lengths])
            rows = [one.input_ids[0, a:b].tolist() for a, b in itertools.pairwise(starts)]
            for row, ids in zip(rows, other.input_ids.tolist(), strict=False):
                assert ids[: len(row)] == row
    assert torch.equal(flat.step(0)[0].labels, flat.step(0)[0].labels)


SEEING = ("opt", "falcon", "biogpt")  # their masks are made without the places of tokens in rows
ROWS = numbered(8)


def _keep_apart(world, cases):
    dealing, results = SamplerConfig(2, 1, 1, 0, 42, 1, -1), []
    for path, *flags in cases:
        model, info, _ = tiny.build(path, world, "--lora_rank=4", *flags)
        flat, packed = Batches(ROWS, dealing, is_flat=True), PackedBatches(ROWS, 40, dealing)
        lines = [losses.keep_rows_apart(model, flat, info, world)]
        try:
            lines.append(losses.keep_rows_apart(model, packed, info, world))
        except UserError as error:
            lines.append(str(error))
        lines.append(losses.keep_rows_apart(model, Batches(ROWS, dealing), info, world))
        results.append((*lines, flat.is_flat, model.training))
    return results


def test_rows_that_would_see_each_other_are_not_packed(tmp_path):
    """16 bit round the rows of the others by up to 2 %, which is no reason."""
    names, cases = [*SEEING, "llama", "diffllama", "qwen2_moe"], []
    for name in names:
        tiny_models.save(tmp_path / name, name)
        attention = "--attn=eager" if name == "falcon" else "--attn=auto"
        cases.append((tmp_path / name, "--precision=bf16", attention))
    cases.append((*cases[0][:1], "--precision=fp32"))
    for results in run_ranks(_keep_apart, 2, cases):
        for name, found in zip([*names, SEEING[0]], results, strict=True):
            rule = f"rows of a {name} model that lie one after the other see each other"
            lines = f"packing   off: {rule}", f"--packing on: {rule}; use --packing off"
            is_on = name not in SEEING
            assert found == (*(("", "") if is_on else lines), "", is_on, True)
