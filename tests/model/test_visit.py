"""Groups of rows that pass each layer together have the bits of one after the other."""

import dataclasses
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from fsdp_qlora.data import batches, row_formats
from fsdp_qlora.data.batches import collate, flatten
from fsdp_qlora.model import attention, lora, placement, shard, visit
from fsdp_qlora.model.attention import RowBounds
from fsdp_qlora.model.head import Targets
from fsdp_qlora.model.visit import RowGroup
from fsdp_qlora.training import loop, losses, optim
from tests import tiny, tiny_models
from tests.model.test_shard import FLAGS, make_samples
from tests.ranks import run_ranks

NUM_MICRO, NUM_STEPS = 3, 2
STREAM, FULL = "--offload_impl=stream", "--use_gradient_checkpointing=true"
# (ranks, how micro-batches lie, options)
CASES = [
    (1, collate, (STREAM, "--resident_layers=1")),
    (1, flatten, (STREAM, "--selective_layers=1", "--uncheckpointed_layers=1")),
    (1, collate, (STREAM, "--reentrant_checkpointing=true")),
    (1, flatten, (STREAM, "--use_activation_cpu_offload=true", "--train_type=bnb_dora")),
    (1, collate, (STREAM, "--layers_to_transform=1", "--use_gradient_checkpointing=false")),
    (2, collate, ("--use_cpu_offload=false",)),
    (2, flatten, ("--offload_impl=fsdp", "--use_activation_cpu_offload=disk")),
    (2, flatten, ("--sharding_strategy=ddp", "--no_sync=true")),
]
TYPES = {"qwen3_moe": True, "gemma3_text": True, "granite": True, "gemma4_text": False}


def trained_by(world, path, lay, per_visit, flags):
    """What some steps make, bit for bit, and the copies of layers that they took."""
    flags = (*FLAGS, FULL, "--lr=0.01", f"--gradient_accumulation_steps={NUM_MICRO}", *flags)
    model, _, cfg = tiny.build(path, world, *flags, f"--accumulate_by_layer={per_visit}")
    tiny.fill_lora(model)
    trained = optim.prepare(model, cfg, NUM_STEPS, world)
    assert trained.per_visit == per_visit
    trained = dataclasses.replace(trained, is_reduced_once=True)
    rows = make_samples(2 * NUM_MICRO * world.size)[world.rank :: world.size]
    parts = [lay(rows[2 * i : 2 * i + 2]) for i in range(NUM_MICRO)]
    with patch.object(placement, "copy", wraps=placement.copy) as copies:
        steps = [loop.train_step(trained, parts) for _ in range(NUM_STEPS)]
    assert not any(step["skipped"] for step in steps)
    facts = [step[name].item().hex() for step in steps for name in ("loss", "grad_norm")]
    lora = [flat.numpy().tobytes() for flat in shard.whole_lora(model)]
    # Of layers: inputs that wait on the host are of another dtype.
    return facts, lora, sum(call.args[0].dtype == torch.uint8 for call in copies.call_args_list)


def compare(world, path, cases):
    """Options of the cases that differ from plain accumulation."""
    wrong = []
    for lay, flags in cases:
        plain, lora, copies = trained_by(world, path, lay, 1, flags)
        found, own, fewer = trained_by(world, path, lay, NUM_MICRO, flags)
        is_cheaper = copies < 9 or fewer < 0.6 * copies
        if (found, own) != (plain, lora) or not is_cheaper:
            wrong.append((flags, found, plain, copies, fewer))
    return wrong


@pytest.mark.parametrize("size", [1, 2])
def test_layer_major_accumulation_has_the_bits_of_plain_accumulation(tmp_path, size):
    """Of losses, norms and adapters; streamed layers are copied once for all micro-batches."""
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=4)
    cases = [(lay, flags) for num, lay, flags in CASES if num == size]
    assert run_ranks(compare, size, path, cases) == [[]] * size


def test_small_micro_batches_are_joined_in_their_order():
    """As GPUs take them: rows and losses are the same."""
    rows = make_samples(12)
    for lay in (collate, flatten):
        same = [
            replace(row, input_ids=row.input_ids[:5], is_trained=row.is_trained[:5]) for row in rows
        ]
        parts = [lay(same[2 * i : 2 * i + 2]) for i in range(6)]
        first, second = batches.join(parts, 4 * parts[0].input_ids.numel())
        whole = lay(same[:8], 1)
        kept = first.labels[first.labels != row_formats.NOT_TRAINED]
        assert torch.equal(kept, whole.labels[whole.labels != row_formats.NOT_TRAINED])
        assert first.num_trained_tokens == whole.num_trained_tokens
        assert first.num_tokens + second.num_tokens == 12 * 5
        assert sum(first.row_lengths) == first.input_ids.numel() * (lay is flatten)
    assert len(batches.join([collate(rows[:2]), flatten(rows[:2])], 10**6)) == 2


def reference_rows(world, paths):
    """(Can groups pass together?, loss and gradients equal the passes alone?) of each model."""
    found = []
    for path in paths:
        model, _, _ = tiny.build(path, world, *FLAGS, "--use_cpu_offload=false")
        tiny.fill_lora(model)
        if not model.can_visit(world.device):
            found.append(False)
            continue
        batch = flatten(make_samples(2))
        rest = Targets.of(batch.labels, world.device), RowBounds.of(batch.row_lengths, world.device)
        groups = [RowGroup(batch.input_ids, *rest, has_adapters=i == 1) for i in range(3)]
        before, loss, after = model(groups)
        loss.backward()
        grads = [block.body.lora.grad.full_tensor() for block in shard.blocks(model)]
        model.zero_grad()
        alone = losses.token_loss_sum(model, batch, world.device)
        assert not before.requires_grad and torch.equal(before, after)
        assert torch.equal(loss, alone) and not torch.equal(loss, before)
        alone.backward()
        for grad, block in zip(grads, shard.blocks(model), strict=True):
            assert torch.equal(grad, block.body.lora.grad.full_tensor())
        fresh, _, _ = tiny.build(path, world, *FLAGS, "--use_cpu_offload=false")  # B is zero
        frozen = losses.token_loss_sum(fresh, batch, world.device)
        assert torch.allclose(before, frozen, rtol=1e-6)
        found.append(True)
    return found


def test_reference_rows_run_without_adapters_beside_those_that_train(tmp_path):
    """Types whose layers hand on more than the residual are told apart."""
    for name in TYPES:
        tiny_models.save(tmp_path / name, name)
    paths = [tmp_path / name for name in TYPES]
    assert run_ranks(reference_rows, 1, paths) == [[*TYPES.values()]]


# Type -> is the end of its layers computed tile by tile?
TILED = {"llama": True, "gemma3_text": True, "olmo2": True, "cohere": False}
TILED_FLAGS = (
    ("--train_type=bnb_dora",),
    ("--lora_dropout=0.1",),
    ("--lora_target_modules=q_proj", "--reentrant_checkpointing=true"),
)


def tiled(world, cases):
    """Whether ends are tiled, and the largest error of a gradient and of the loss, of each case."""
    found, batch = [], collate(make_samples(4))
    for path, flags in cases:
        results = []
        for tile_tokens in (10**6, 4):
            attention.LONG_TOKENS = lora.LONG_TOKENS = tile_tokens
            model, _, _ = tiny.build(path, world, *FLAGS, FULL, "--use_cpu_offload=false", *flags)
            tiny.fill_lora(model)
            for block in shard.blocks(model):
                block.body.tile_tokens = tile_tokens
            calls = []
            mlp = next(shard.blocks(model)).body.layer.mlp
            mlp.down_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            torch.manual_seed(1)
            loss = losses.token_loss_sum(model, batch, world.device)
            loss.backward()
            grads = [block.body.lora.grad.full_tensor() for block in shard.blocks(model)]
            results.append((loss, torch.cat(grads), len(calls)))
        (loss, grad, few), (tiled_loss, tiled_grad, many) = results
        errors = (tiled_loss - loss).abs() / loss, (tiled_grad - grad).norm() / grad.norm()
        if "--lora_dropout=0.1" in flags:  # tiles draw masks of their own
            errors = slope_error(model, tiled_grad, batch, world), 0 * loss
        found.append((many > few, *(error.item() for error in errors)))
    return found


def slope_error(model, grad, batch, world):
    """How far the gradient is from what the loss does along it, by the same draws."""
    params, step, found = shard.local_parameters(model), 1e-2 / grad.norm() ** 2, []
    with torch.no_grad():
        for share in (step, -2 * step):
            for param, own in zip(params, grad.split([len(p) for p in params]), strict=True):
                param += share * own
            shard.settle(model)
            torch.manual_seed(1)
            found.append(losses.token_loss_sum(model, batch, world.device).double())
    return ((found[0] - found[1]) / 2e-2 - 1).abs() * 1e-5  # to some per cent


def test_layers_that_end_tile_by_tile_have_the_gradients_of_whole_ones(tmp_path):
    """Heads of the attention go some after the others too."""
    for name in TILED:
        tiny_models.save(tmp_path / name, name)
    cases = [(tmp_path / name, ()) for name in TILED]
    cases += [(tmp_path / "llama", flags) for flags in TILED_FLAGS]
    found = run_ranks(tiled, 1, cases)[0]
    assert [is_tiled for is_tiled, *_ in found] == [*TILED.values(), True, True, True]
    assert max(max(errors) for _, *errors in found) < 1e-6, found


def test_a_model_may_refuse_inputs_and_lack_of_memory_is_a_fault(tmp_path, world):
    model, _, _ = tiny.build(tiny.save_model(tmp_path / "m"), world, *FLAGS)
    asks = (lambda: model.can_visit(world.device), lambda: losses.can_share_prompts(model, world))
    assert all(ask() for ask in asks)
    for error in (ValueError, RuntimeError, torch.OutOfMemoryError, KeyError):
        is_refusal = error in (ValueError, RuntimeError)
        with (
            patch.object(visit, "take_apart", side_effect=error("x")),
            patch.object(type(model), "forward", side_effect=error("x")),
            nullcontext() if is_refusal else pytest.raises(error),
        ):
            assert not any(ask() for ask in asks)
