"""Rows that are cut over ranks are rows of one rank: attention, gradients, steps, runs."""

import itertools
import json
import re
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fsdp_qlora.data.batches import Batches, PackedBatches, SamplerConfig, all_once
from fsdp_qlora.data.tokens import Sample, of_samples
from fsdp_qlora.distributed import world as worlds
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import attention, shard
from fsdp_qlora.planning import run as plans
from fsdp_qlora.training import evaluate, loop, losses, optim
from tests import tiny, tiny_models, warm
from tests.model.test_shard import FLAGS
from tests.ranks import run_ranks
from tests.training.test_preferences import samples

# A weight moves by its gradient.
STEP = (*FLAGS, "--optimizer=sgd", "--lr=1", "--lr_scheduler=constant")
STEP += ("--apply_gradient_clipping=false",)
STREAM, FSDP, HERE = "--offload_impl=stream", "--offload_impl=fsdp", "--use_cpu_offload=false"
WINDOW = {"sliding_window": 7}
TYPES = {"llama": {}, "mistral": WINDOW, "gemma3_text": WINDOW | {"head_dim": 32}}
TYPES["gpt_oss"] = WINDOW | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
TILES, PACKED = "tiles", "packed"
CASES = [
    ("llama", (STREAM, "--use_activation_cpu_offload=true", TILES)),
    ("llama", (STREAM, "--gradient_accumulation_steps=3", "--accumulate_by_layer=3")),
    ("llama", (HERE, "--selective_layers=1", "--uncheckpointed_layers=1", PACKED)),
    ("mistral", (FSDP, "--reentrant_checkpointing=true", "--train_type=bnb_dora")),
    ("gpt_oss", (HERE, "--expert_lora_rank=2", "--selective_layers=2")),  # sinks; alone: eager
    ("gemma3_text", ("--sharding_strategy=ddp", "--use_activation_cpu_offload=disk", PACKED)),
]
CASES += [
    ("llama", ("--objective=dpo", "--sft_weight=0.5", "--gradient_accumulation_steps=2")),
    ("llama", ("--objective=orpo", PACKED)),
    ("llama", ("--objective=kto", HERE)),
]
SHARED = [("gemma3_text", (HERE,)), ("llama", (STREAM, "--gradient_accumulation_steps=2"))]


def make_rows(num, longest, seed=0):
    """Of 3 tokens and more: some are shorter than a chunk each for the ranks."""
    random = np.random.default_rng(seed)
    rows = [random.integers(3, 256, n).astype(np.int32) for n in random.integers(3, longest, num)]
    return of_samples([Sample(row, np.arange(len(row)) >= len(row) // 3) for row in rows], "x")


def masked(query, key, value, lengths, window):
    """PyTorch's attention, with a mask made of the rows that tokens belong to."""
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ago = torch.arange(len(row))[:, None] - torch.arange(len(row))
    mask = (row[:, None] == row) & (ago >= 0) & (ago < (window or len(row)))
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)


def plain(query, key, value, scale, is_causal=True):
    return attention.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=is_causal, scale=scale
    )


def plain_backward(*tensors, scale, is_causal=True):
    return attention.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, dropout_p=0.0, is_causal=is_causal, scale=scale
    )


ENDS = {  # the way of one row on a Hopper, by a kernel that, as cuDNN, knows no rows
    "_is_for_cudnn": lambda query, lengths, is_causal, window: len(lengths[0]) == 2,
    "_cudnn": plain,
    "_cudnn_backward": plain_backward,
}


def attention_error(ranks):
    """Largest difference of outputs and gradients to `masked`, over ways to lay rows."""
    generator, chunks = torch.Generator().manual_seed(0), (ranks.rank, 2 * ranks.size - 1)
    chunks = chunks[0], chunks[1] - ranks.rank
    at, worst = torch.arange(64).view(2 * ranks.size, -1)[[*chunks]].flatten(), 0.0
    layouts = [64], [1, 2, 3, 50, 8], [9, 7, 16, 32], [40, 24]
    for lengths, window, by_ends in [
        *itertools.product(layouts, (None, 5, 20), [False]),
        *itertools.product(layouts, [None], [True]),
    ]:
        whole = [torch.randn(64, 4, 16, generator=generator) for _ in range(4)]
        cut = attention.Cut.of(lengths, chunks, torch.device("cpu"))._replace(ranks=ranks)
        both = attention._gathered, attention._gathered_backward
        kernel = [partial(part, cut=cut, window=window) for part in both]
        found = []
        for is_cut in (True, False):
            parts = (tensor[at] if is_cut else tensor for tensor in whole)
            grad, *inputs = (tensor.clone().requires_grad_() for tensor in parts)
            run = attention.SavedAttention.apply if is_cut else masked
            rest = (None, kernel, None) if is_cut else (lengths, window)
            with patch.dict(vars(attention), ENDS if by_ends else {}):
                out = run(*inputs, *rest)
                out = out[0] if is_cut else out
                found.append([out, *torch.autograd.grad(out, inputs, grad.detach())])
        worst = max(worst, *((a - b[at]).abs().max().item() for a, b in zip(*found, strict=True)))
    return worst


def steps(world, num, paths, cases):
    """Held-out loss, losses and norms of two steps, and how far they move the adapters."""
    world, results = worlds.split(world, num), []
    num_readers = world.size // num
    for kind, flags in cases:
        options = [f"--context_parallel={num}", *(flag for flag in flags if flag.startswith("--"))]
        model, info, cfg = tiny.build(paths[kind], world, *STEP, *options)
        tiny.fill_lora(model)
        for block in shard.blocks(model) if TILES in flags else ():
            block.body.tile_tokens = 4
        trained = optim.prepare(model, cfg, 2, world)
        shape = 4 // num_readers, cfg.gradient_accumulation_steps, num_readers, world.rank // num
        sampler = SamplerConfig(
            *shape, 42, 1, 2, 8, cfg.objective, parts=num, part=world.rank % num
        )
        rows = samples(cfg.objective) if cfg.num_answers else make_rows(27, 40)
        train = PackedBatches(rows, 50, sampler) if PACKED in flags else Batches(rows, sampler)
        losses.keep_rows_apart(model, train, info, world)
        rest = rows if cfg.num_answers else make_rows(5, 9, seed=1)
        held_out = list(all_once(rest, sampler))
        figures = [*evaluate.measure(model, trained.preference, held_out, world).values()]
        before = [flat.clone() for flat in shard.whole_lora(model)]
        for step in range(2):
            mine: list[list[float]] = []

            def note(point, own=mine, mixtures=model.mixtures):
                if point == "post-backward":
                    own[:] = [mixture.loads.tolist() for mixture in mixtures]

            found = loop.train_step(trained, train.step(step), hook=note)
            if model.mixtures:  # of all ranks; padding, which differs, counts
                loads = np.sum(world.gather_objects(mine), 0)
                ratio = (loads.max(1) / loads.mean(1)).mean()
                assert found.pop("expert_load").item() == pytest.approx(ratio, 1e-5)
            figures += [value.item() for _, value in sorted(found.items())]
        batches = [batch for step in range(2) for batch in train.step(step)]
        tokens = world.sum(sum(b.num_tokens for b in batches)) * (not cfg.num_answers)
        moved = [(b - a).numpy() for a, b in zip(before, shard.whole_lora(model), strict=True)]
        lengths = [block.body.num_lora for block in shard.blocks(model)]
        results.append((figures, tokens, [m[:n] for m, n in zip(moved, lengths, strict=True)]))
    return results, attention_error(world.context) if num > 1 else 0.0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Models, and what one rank makes of every case."""
    place = tmp_path_factory.mktemp("models")
    paths = {kind: tiny.save_model(place / kind, kind, **more) for kind, more in TYPES.items()}
    (found, _), *_ = run_ranks(steps, 1, 1, paths, [*CASES, *SHARED])
    return paths, found


@pytest.mark.parametrize(("size", "num", "cases"), [(2, 2, CASES), (4, 4, SHARED), (4, 2, SHARED)])
def test_cut_rows_train_as_whole_ones(alone, size, num, cases):
    """Reference: one rank; of the attention PyTorch's own with masks."""
    paths, wanted = alone
    wanted = wanted[: len(CASES)] if cases is CASES else wanted[len(CASES) :]
    for found, error in run_ranks(steps, size, num, paths, cases):
        assert error < 3e-6
        for case, mine, theirs in zip(cases, found, wanted, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-6, abs=1e-6), case
            assert mine[1] == theirs[1]
            for own, other in zip(mine[2], theirs[2], strict=True):
                np.testing.assert_allclose(own, other, rtol=0, atol=2e-6 * abs(other).max())


def refusals(world, paths):
    """What is wrong with each model, or ""."""
    world, found = worlds.split(world, world.size), []
    for path in paths:
        try:
            model, info, _ = tiny.build(
                path, world, *FLAGS, HERE, f"--context_parallel={world.size}"
            )
            losses.check_cut_rows(model, info, world)
            found.append("")
        except UserError as error:
            found.append(error.rule)
            assert "--context_parallel 1" in error.remedy
    return found


def saved(place, kind):
    tiny_models.save(place / kind, kind)
    return place / kind


def test_what_is_not_exact_is_refused(tmp_path):
    """By trials of the model without weights and with them; what config.json tells, before."""
    kinds = {"bamba": "not known", "deepseek_v3": "", "gemma4_text": "not known"}
    kinds |= dict.fromkeys(("qwen2_moe", "mpt", "bloom"), "not known")
    kinds |= {"flint": "", "falcon": "classes of its own", "nemotron": "another attention"}
    paths = [saved(tmp_path, kind) for kind in kinds]
    for found in run_ranks(refusals, 2, paths):
        for rule, words in zip(found, kinds.values(), strict=True):
            assert words in rule and bool(words) == bool(rule)
    llama, asked = "llama-2-7b", "--context_parallel=2"
    for model, flags, words in [
        (llama, ("--gpus=3x24",), "--world_size 2"),
        (llama, ("--attn=eager",), "leave --attn out"),
        (saved(tmp_path, "qwen3_next"), (), "linear_attention"),
        (saved(tmp_path, "gemma2"), (), "soft-capped"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            plans.main([f"--model_name={model}", "--gpus=2x24", asked, *flags])


def test_a_plan_knows_that_ranks_share_a_row(capsys):
    found = []
    for num in (1, 2):
        flags = ["--model_name=llama-3.1-8b", "--gpus=2x24", "--host=200", "--json"]
        flags += ["--context_length=65536", "--use_activation_cpu_offload=true", "--fit=off"]
        plans.main([*flags, f"--context_parallel={num}", "--lora_rank=32"])
        found.append(json.loads(capsys.readouterr().out))
    flags = ["--model_name=llama-3.1-8b", "--gpus=2x15", "--json", "--context_length=131072"]
    plans.main([*flags, "--use_activation_cpu_offload=true", "--host=200", "--fit=off"])
    remedies = [item["flags"] for item in json.loads(capsys.readouterr().out)["to_fit"]]
    wanted = {"context_parallel": "2", "gradient_accumulation_steps": "2"}
    assert any(wanted.items() <= flags.items() for flags in remedies)
    whole, shared = found
    assert 0.5 < shared["step_s"] / whole["step_s"] < 0.6
    assert shared["num_steps"] == pytest.approx(2 * whole["num_steps"], abs=2)
    assert shared["card"]["peak_gib"] < whole["card"]["peak_gib"] - 1
    at_work = [plan["card"]["phases_gib"]["backward"]["activations of one layer"] for plan in found]
    assert 0.5 < at_work[1] / at_work[0] < 0.8  # keys and values are gathered


def test_a_run_of_cut_rows_is_that_of_one_rank_and_goes_on_as_one(place, tmp_path):
    """Losses held out and of every step; a checkpoint of two ranks that one goes on from."""
    common = [f"--model_name={place / 'model'}", f"--dataset={place / 'data.jsonl'}", *STEP]
    common += ["--lr=0.1", "--batch_size=2", "--save_every=2", "--eval_split=5"]
    on_two = ["--world_size=2", "--context_parallel=2", "--max_steps=2"]
    on_one = ["--world_size=1", "--context_parallel=1", "--max_steps=4"]
    goes_on = [f"--resume={tmp_path / 'two'}", *on_one]
    records = []
    for out, flags in [("one", on_one), ("two", on_two), ("two", goes_on)]:
        run = warm.start([*common, f"--output_dir={tmp_path / out}", *flags], tmp_path)
        assert run.wait() == 0, run.err + run.out
        lines = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        with_loss = (line for line in lines if "loss" in line)
        records.append({(line.get("event"), line["step"]): line["loss"] for line in with_loss})
    assert len(records[0]) == 6 and records[2] == pytest.approx(records[0], rel=1e-5)
