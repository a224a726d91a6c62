"""Sharded equals unsharded: bytes, gradients, steps, adapters, on two real ranks."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.data.batches import collate
from fsdp_qlora.data.tokens import Sample
from fsdp_qlora.errors import UserError
from fsdp_qlora.export import model_files as export
from fsdp_qlora.model import load, shard, weights
from fsdp_qlora.model.head import Targets
from fsdp_qlora.training import loop, losses, optim
from tests import tiny
from tests.ranks import run_ranks

FLAGS = ("--precision=fp32", "--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0")
CLIPPED = ("--lr=0.01", "--apply_gradient_clipping=true", "--grad_norm=0.3")
CHECKPOINTING = {
    "none": ("--use_gradient_checkpointing=false",),
    "non_reentrant": (),
    "reentrant": ("--reentrant_checkpointing=true",),
    "selective": ("--selective_layers=9",),
    "selective_reentrant": ("--selective_layers=9", "--reentrant_checkpointing=true"),
    "levels": ("--selective_layers=2", "--uncheckpointed_layers=1"),
}
PLACES = {
    "sharded": ("--use_cpu_offload=false",),
    "offloaded": ("--offload_impl=fsdp",),
    "streamed": ("--offload_impl=stream",),
    "sharded_resident": ("--use_cpu_offload=false", "--resident_layers=2"),
    "offloaded_resident": ("--offload_impl=fsdp", "--resident_layers=2"),
    "streamed_resident": ("--offload_impl=stream", "--resident_layers=2"),
}


def make_samples(count, vocab_size=256):
    generator = np.random.default_rng(0)
    return [
        Sample(
            generator.integers(0, vocab_size, length).astype(np.int32),
            np.arange(length) >= length // 3,
        )
        for length in generator.integers(5, 40, count)
    ]


def micro_batches(rank, world_size, accumulation):
    """Two rows per rank and micro-batch."""
    samples = make_samples(2 * world_size * accumulation)
    start = 2 * rank * accumulation
    return [collate(samples[start + 2 * i : start + 2 * i + 2]) for i in range(accumulation)]


def sharded_gradients(world, path, format_flags, cases, extra=()):
    """Whole gradients by peft name for each (place, checkpointing, accumulation)."""
    results = {}
    for (place, checkpointing), alike in itertools.groupby(cases, key=lambda case: case[:2]):
        flags = (*FLAGS, *format_flags, *CHECKPOINTING[checkpointing], *PLACES[place], *extra)
        model, _, _ = tiny.build(path, world, *flags)
        tiny.fill_lora(model)
        for case in alike:
            model.zero_grad()
            batches = micro_batches(world.rank, world.size, case[2])
            num_tokens = world.sum(sum(b.num_trained_tokens for b in batches))
            for batch in batches:
                loss = losses.token_loss_sum(model, batch, world.device)
                (loss * (world.size / num_tokens)).backward()
            named = tiny.lora_dict(model, tiny.lora_grads(model))
            results[case] = {name: tensor.cpu().numpy() for name, tensor in named.items()}
    return results


def reference_gradients(path, format_name, accumulation, lora, cfg):
    model, named = tiny.reference_model(path, format_name, lora, cfg)
    tiny.reference_loss(model, collate(make_samples(4 * accumulation))).backward()
    return {name: param.grad for name, param in named.items()}


def gradients_of_runs(world, runs):
    """Of each (path, flags, cases): the adapter of tiny.fill_lora, and gradients by case."""
    found = []
    for path, flags, cases in runs:
        model, _, _ = tiny.build(path, world, *FLAGS, *flags)
        values = tiny.lora_dict(model, tiny.fill_lora(model))
        grads = sharded_gradients(world, path, flags, cases)
        found.append(({name: value.numpy() for name, value in values.items()}, grads))
    return found


def check_gradients(by_rank, path, flags, format_name):
    """Reference: transformers + peft on one process, unsharded, float32."""
    cfg = config.parse([f"--model_name={path}", *FLAGS, *flags])
    assert cfg.format_name == format_name
    lora = {n: torch.from_numpy(v) for n, v in by_rank[0][0].items()}
    references = {
        accumulation: reference_gradients(path, format_name, accumulation, lora, cfg)
        for accumulation in {case[2] for case in by_rank[0][1]}
    }
    for rank, (_, results) in enumerate(by_rank):
        for case, grads in results.items():
            assert grads.keys() == references[case[2]].keys()
            for name, want in references[case[2]].items():
                torch.testing.assert_close(
                    torch.from_numpy(grads[name]),
                    want,
                    rtol=1e-3,
                    atol=2e-6,
                    msg=lambda text, c=case, n=name, r=rank: f"rank {r} {c} {n}: {text}",
                )


ALL_CASES = [
    *itertools.product(("sharded", "offloaded", "streamed"), CHECKPOINTING, (1, 3)),
    *itertools.product(list(PLACES)[3:], ("non_reentrant", "levels"), (3,)),
]


@pytest.mark.parametrize(
    ("flags", "format_name"),
    [(("--train_type=qlora",), "nf4_dq"), (("--train_type=hqq_lora",), "hqq4")],
)
def test_gradients_equal_peft_on_one_process(tmp_path, flags, format_name):
    """{NF4, HQQ} x {placement} x {checkpointing} x {accumulation}."""
    tiny.require(format_name)
    path = tiny.save_model(tmp_path / "model", num_hidden_layers=5)
    by_rank = run_ranks(gradients_of_runs, 2, [(path, flags, ALL_CASES)])
    check_gradients([results[0] for results in by_rank], path, flags, format_name)


SOME_CASES = [("streamed", "non_reentrant", 3), ("offloaded", "selective", 1)]
STRATEGY_CASES = [("sharded", "non_reentrant", 3), ("sharded", "levels", 1)]
# Qwen2: biases on q, k, v; one embedding for both ends; adapters on two projections only.
SOME_TARGETS = ("--lora_target_modules=q_proj,v_proj", "--use_rslora=true", "--double_quant=false")
EXPERTS = ("--lora_target_modules=q_proj,k_proj,v_proj,o_proj", "--expert_lora_rank=2")
RUNS = [
    ("llama", ("--train_type=qlora", "--quant_type=fp4"), "fp4_dq", SOME_CASES),
    ("llama", ("--train_type=qlora", "--quant_type=int8"), "int8", SOME_CASES),
    ("llama", ("--train_type=hqq_lora", "--n_bits=3", "--hqq_axis=0"), "hqq3_a0", SOME_CASES),
    ("llama", ("--train_type=lora",), "bf16", SOME_CASES),
    ("llama", ("--sharding_strategy=shard_grad_op",), "nf4_dq", STRATEGY_CASES),
    ("llama", ("--sharding_strategy=ddp",), "nf4_dq", STRATEGY_CASES),
    ("qwen2", SOME_TARGETS, "nf4", [("streamed", "selective", 3), ("sharded", "reentrant", 1)]),
    ("mixtral", EXPERTS, "nf4_dq", [("sharded", "selective", 1)]),
    ("qwen3_moe", EXPERTS, "nf4_dq", [("streamed", "non_reentrant", 1)]),
]


def test_other_bases_strategies_and_models_have_the_gradients_of_peft_too(tmp_path):
    """Formats, strategies; biases, tied embeddings and some targets; adapters on experts."""
    tiny.require("hqq3_a0")
    paths = {
        "llama": tiny.save_model(tmp_path / "llama"),
        "qwen2": tiny.save_model(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True),
    }
    for kind, sizes in tiny.MIXTURES.items():
        paths[kind] = tiny.save_model(tmp_path / kind, kind, num_hidden_layers=2, **sizes)
    runs = [(paths[kind], flags, cases) for kind, flags, _, cases in RUNS]
    by_rank = run_ranks(gradients_of_runs, 2, runs)
    for (kind, flags, format_name, _), *results in zip(RUNS, *by_rank, strict=True):
        check_gradients(results, paths[kind], flags, format_name)


def _plant(block, source, words, world):
    """Put words where the bytes of a layer lie: this rank's slice, or the copy of all ranks."""
    if block.quantized is None:
        world.barrier()  # nobody reads the copy any more
        source.copy_(words.view(torch.uint8))
        world.barrier()
        return
    start, stop = shard.local_range(block.quantized)
    old = block.quantized.detach()
    device = getattr(old, "_local_tensor", old).device
    shard.set_local(block, "quantized", words[start:stop].view(torch.float32).clone().to(device))


def _plant_nan_patterns(world, path):
    """Overwrite the bytes with NaN patterns of every float type; count wrong ones by placement."""
    num_wrong = {}
    for place, place_flags in PLACES.items():
        flags = (*FLAGS, *place_flags)
        built, info, cfg = tiny.shape(path, world, *flags)
        model, placed = built.model, built.placed
        with patch.object(load, "verify_bytes", return_value=0):  # FSDP keeps what it has gathered
            load.fill(built, weights.build(info, cfg), cfg, world)
        planted, streamed = [], placed.layers("streamed")
        for index, block in enumerate(shard.blocks(model)):
            words = torch.arange(model.layouts[0].nbytes // 4, dtype=torch.int32) * 2654435 + index
            patterns = torch.tensor([0x7FC00001, -1, 0x7F817FC1, 0x7C017E01, -0x403F0001]).int()
            words[::3] = patterns[torch.arange(len(words[::3])) % len(patterns)]
            planted.append(words)
            number = streamed.index(index) if index in streamed else None
            source = None if number is None else placed.streamer.sources[number]
            _plant(block, source, words, world)
        fingerprints = {i: load.fingerprint(words) for i, words in enumerate(planted)}
        mine = fingerprints if world.rank == 0 else {}
        load.verify_bytes(model, mine, world)
        losses.token_loss_sum(model, micro_batches(world.rank, world.size, 1)[0], world.device)
        num_wrong[place] = 0
        for block, words in zip(shard.blocks(model), planted, strict=True):
            gathered = shard.gathered(block).cpu()
            num_wrong[place] += int((gathered != words.view(torch.uint8)).sum())
            shard.release(block)
        fingerprints[1] += 1
        with pytest.raises(UserError, match="layer 1 changed on rank 0"):
            load.verify_bytes(model, mine, world)
    return num_wrong


def test_bytes_at_the_product_are_exact_even_where_they_are_nan(tmp_path):
    path = tiny.save_model(tmp_path / "model")
    by_rank = run_ranks(_plant_nan_patterns, 2, path)
    print("wrong bytes by placement:", by_rank)
    assert by_rank == [dict.fromkeys(PLACES, 0)] * 2


def test_fingerprint_sees_every_single_bit():
    words = torch.arange(1000, dtype=torch.int32)
    whole = load.fingerprint(words)
    for index, bit in itertools.product((0, 7, 999), range(32)):
        changed = words.clone()
        changed[index] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        assert load.fingerprint(changed) != whole
    swapped = words.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert load.fingerprint(swapped) != whole


def _train(world, path, out, steps, flags):
    flags = (*FLAGS, *CLIPPED, *flags, f"--output_dir={out}")
    model, info, cfg = tiny.build(path, world, *flags)
    trained = optim.prepare(model, cfg, steps, world)
    losses = [
        loop.train_step(trained, micro_batches(world.rank, world.size, 1)) for _ in range(steps)
    ]
    cfg.resolved_output_dir.mkdir(parents=True, exist_ok=True)
    export.save(model, info, cfg, None, is_writer=world.rank == 0)
    batch = collate(make_samples(4))
    model.eval()
    with torch.no_grad():
        input_ids = batch.input_ids.to(world.device)
        loss = model(input_ids, Targets.of(batch.labels, world.device)).item()
        last = model(input_ids[:1])[0, -1].cpu()
    return [r["loss"].item() for r in losses], losses[0]["grad_norm"].item(), loss, last.numpy()


def _start_and_train(world, path, out):
    return _start_values(world, path), _train(world, path, out, 5, ())


def test_two_ranks_train_as_one_rank_and_peft_reads_the_adapter(tmp_path):
    """Reference: torch AdamW, clip_grad_norm_ and peft on one process, five steps.

    peft then gives the logits of the trained model. Adapters start the same on one rank and on two.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, out = tiny.save_model(tmp_path / "model"), tmp_path / "out"
    (start, (losses, norm, loss, last)), (_, again) = run_ranks(_start_and_train, 2, path, out)
    assert again[0] == losses
    assert losses[-1] < losses[0] - 0.3
    _is_fresh(run_ranks(_start_values, 1, path)[0], start)

    cfg = config.parse([f"--model_name={path}", *FLAGS])
    lora = {n: torch.from_numpy(v) for n, v in start.items()}
    model, named = tiny.reference_model(path, "nf4_dq", lora, cfg)
    optimizer = torch.optim.AdamW(named.values(), lr=0.01, weight_decay=cfg.wd)
    batch, expected, norms = collate(make_samples(4)), [], []
    for _ in range(5):
        step_loss = tiny.reference_loss(model, batch)
        step_loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
        expected.append(step_loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    assert norm == pytest.approx(norms[0], rel=1e-4)

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tiny.round_base(base, "nf4_dq")
    model = PeftModel.from_pretrained(base, out)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(logits[0, -1], torch.from_numpy(last), rtol=1e-4, atol=1e-4)
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    assert flat.item() == pytest.approx(loss, rel=1e-4)


def _start_values(world, path):
    model, _, _ = tiny.build(path, world, *FLAGS)
    return {n: t.numpy() for n, t in tiny.lora_dict(model, shard.whole_lora(model)).items()}


def _is_fresh(one, two):
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])
        bound = 1 / values.shape[1] ** 0.5
        spread = np.abs(values).max() if "lora_A" in name else 0
        assert (values == 0).all() if "lora_B" in name else 0.9 * bound < spread <= bound
