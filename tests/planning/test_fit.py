"""The plan's seconds against measured steps; the setting that fit chooses on imagined machines."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.data import batches
from fsdp_qlora.data.tokens import Sample, of_samples
from fsdp_qlora.hardware import GPUS, Device, Machine
from fsdp_qlora.planning import fit, rows
from fsdp_qlora.planning.sizes import Setting, Sizes, applied, place, setting_for, setting_of
from tests.planning.test_memory import plan

SIZES = {"7b": ("llama-2-7b", 4), "70b": ("llama-2-70b", 2)}


def run_of(size: str, *argv: str) -> tuple[arch.ModelInfo, config.TrainConfig]:
    """A 7B at 4 x 2048 or a 70B at 2 x 2048 a rank, LoRA r 16."""
    name, batch = SIZES[size]
    flags = [f"--model_name={name}", f"--batch_size={batch}", "--context_length=2048"]
    cfg = config.parse([*flags, "--lora_rank=16", "--lora_dropout=0", *argv])
    return arch.read(name, need_weights=False), cfg


def machine_of(names: str, host_gib: float | None) -> Machine:
    """GPUs of the table."""
    return Machine(tuple(hardware.parse_gpus(names)), host_gib)


def chosen(size: str, names: str, host_gib: float) -> fit.Outcome | None:
    """What fit takes."""
    return fit.choose(fit.explore(*run_of(size), machine_of(names, host_gib)))


# (model, GPUs, host GiB, where the base lies, least layers not fully recomputed, why)
TABLE = [
    ("7b", "2x3090", 64, "sharded", 32, "1.7 GiB of base a GPU: all recomputation can go"),
    ("7b", "2x4090", 64, "sharded", 32, "the same memory"),
    ("7b", "4090", 64, "sharded", 32, "3.3 GiB of base leave room beside 16 of activations"),
    ("7b", "3090+4060Ti-16G", 64, "any", 32, "16 GB count; base shared or streamed, both hide"),
    ("7b", "2x12", 32, "any", 24, "one row at a time keeps 8 GiB of activations"),
    ("7b", "T4", 16, "any", 24, "14.6 GiB; 16 GiB of host hold the base or nothing"),
    ("7b", "A100-80", 128, "sharded", 32, "everything fits, nothing to stream"),
    ("7b", "4x3090", 64, "sharded", 32, "0.8 GiB of base a GPU"),
    ("7b", "8", 32, "streamed", 8, "one GPU of 7.8 GiB: the base must go to the host"),
    ("7b", "none", 64, "sharded", 0, "CPU ranks have one memory, so nothing is streamed"),
    ("70b", "2x3090", 64, "streamed", 30, "35 GB do not fit two GPUs; copies hide at T = 2048"),
    ("70b", "2x4090", 64, "streamed", 30, "the same memory"),
    ("70b", "4090", 64, "streamed", 30, "the host has one copy whatever the number of GPUs"),
    ("70b", "3090+4060Ti-16G", 64, "streamed", 0, "16 GB leave little for activations"),
    ("70b", "2x12", 64, "streamed", 0, "8.6 GiB a GPU at one row"),
    (
        "70b",
        "2x24",
        32,
        "partly",
        0,
        "33 GiB of base fit neither place alone: a part of it on each GPU",
    ),
    ("70b", "A100-80", 128, "any", 80, "33 GiB of base and 50 of activations: either way"),
    ("70b", "2xA100-80", 256, "any", 80, "the same with half the base"),
    ("70b", "4x3090", 64, "any", 30, "8 GiB of base a GPU or none"),
    ("70b", "2x12", 32, "disk", 0, "33 GiB fit neither in the host nor in 23 GiB of GPUs"),
    ("70b", "T4", 16, "disk", 0, "no other place for 33 GiB"),
    ("70b", "8", 32, None, 0, "no place for 33 GiB"),
]


@pytest.mark.parametrize(("size", "names", "host_gib", "where", "least_kept", "why"), TABLE)
def test_fit_chooses_sensibly(size, names, host_gib, where, least_kept, why):
    """On thirteen machines: what fits, with a margin, as fast as that allows."""
    found = chosen(size, names, host_gib)
    if where is None:
        assert found is None, why
        return
    assert found is not None, why
    setting, num_layers = found.setting, len(found.setting.levels)
    assert found.fits_safely
    assert setting.batch_size * setting.accumulation == SIZES[size][1]
    assert setting.count("selective", "none") >= least_kept, why
    if where in ("sharded", "streamed"):
        assert setting.count(where) == num_layers, why
    if where == "disk":
        assert setting.count("disk") > 0, why
    if where == "partly":
        assert 0 < setting.count("streamed") < num_layers, why
    base = fit.evaluate(*run_of(size), own_setting(size, names), machine_of(names, host_gib))
    if base.fits_safely:
        assert found.speed.tokens_per_s >= 0.99 * base.speed.tokens_per_s, why


def own_setting(size: str, names: str) -> Setting:
    """What the command line alone would do: everything streamed and recomputed."""
    info, cfg = run_of(size)
    return setting_of(cfg, info.num_layers, machine_of(names, None).num_ranks)


def test_fit_turns_free_memory_into_the_speed_that_the_issue_asks_for():
    """At least 1.12 times all-checkpointed at 7B, 4 x 2048, under 24 GiB of two H200."""
    info, cfg = run_of("7b", "--gpu_budget_gib=24")
    machine = machine_of("2xH200", 256)
    best = fit.choose(fit.explore(info, cfg, machine))
    assert best is not None and best.device.reserved_gib <= 24 * (1 - fit.MARGIN)
    plain = Setting(2, 4, 1, ("sharded",) * 32, ("full",) * 32)
    start = fit.evaluate(info, cfg, plain, machine)
    assert best.speed.tokens_per_s / start.speed.tokens_per_s >= 1.12


def test_slow_links_keep_layers_on_the_gpu():
    """70B, one row of 512 tokens: copies rule, so layers go to the GPU as long as they fit."""
    info, cfg = run_of("70b", "--context_length=512", "--batch_size=1", "--dataset=dummy")
    slow = dataclasses.replace(hardware.GPUS["3090"], host_link_gbs=4)
    best = fit.choose(fit.explore(info, cfg, Machine((slow, slow), 64)))
    assert best is not None
    assert best.setting.count("resident") >= 30
    assert best.speed.bound == "host link"


def test_fallbacks_go_down_and_stay_fast():
    """Each needs clearly less of the GPU; the last is about the least there is."""
    outcomes = fit.explore(*run_of("7b"), machine_of("2x3090", 64))
    best = fit.choose(outcomes)
    assert best is not None
    steps = [best, *fit.fallbacks(outcomes, best)]
    peaks = [item.device.peak_gib for item in steps]
    assert len(steps) > 4
    assert all(low <= fit.FALLBACK_SHARE * high for high, low in itertools.pairwise(peaks))
    assert peaks[-1] < fit.least(outcomes).device.peak_gib / fit.FALLBACK_SHARE
    for high, low in itertools.pairwise(steps):
        assert low.speed.tokens_per_s <= high.speed.tokens_per_s * (1 + fit.TIE)


def test_a_chosen_setting_is_what_its_options_set():
    """`applied` and `setting_of` are inverse, for every setting tried, from any start."""
    for argv in ([], ["--use_gradient_checkpointing=false"], ["--sharding_strategy=shard_grad_op"]):
        info, cfg = run_of("7b", *argv)
        outcomes = fit.explore(info, cfg, machine_of("2x3090", 64))
        assert len(outcomes) > 50
        for item in outcomes:
            assert setting_of(applied(cfg, item.setting), 32, 2) == item.setting
    offloaded = Setting(2, 1, 1, place(32, "offloaded", 5), ("full",) * 32)
    assert setting_of(applied(cfg, offloaded), 32, 2) == offloaded


def test_changes_make_it_fit_and_lose_least_first():
    """Each one is planned again; a lossless one stands before a loss."""
    info, cfg = run_of("7b", "--use_gradient_checkpointing=false", "--use_cpu_offload=false")
    machine = machine_of("2x12", 64)
    assert not fit.evaluate(info, cfg, setting_of(cfg, 32, 2), machine).fits
    found = fit.changes(info, cfg, machine)
    assert [item.words for item in found][:1] == ["recompute every layer"]
    losses = [bool(item.lost) for item in found]
    assert losses == sorted(losses)
    for item in found:
        again = fit.evaluate(info, item.cfg, setting_of(item.cfg, 32, 2), machine)
        assert again.fits_safely and again.device.peak_gib == item.outcome.device.peak_gib


def test_pairs_are_tried_where_no_single_change_keeps_everything():
    """ddp of a 70B: the base must leave the GPU, and then the rows still are too many."""
    info, cfg = run_of("70b", "--sharding_strategy=ddp", "--batch_size=4")
    found = fit.changes(info, cfg, machine_of("3090+4060Ti-16G", 64))
    assert found and not found[0].lost
    first = found[0].cfg
    assert first.sharding_strategy == "full_shard"
    assert first.batch_size < 4 or first.use_activation_cpu_offload


def test_inputs_of_layers_go_to_the_host_before_rows_are_cut():
    """16,384 tokens of a 70B: chosen by the plan, and advised where the user has chosen."""
    argv = ["--model_name=llama-2-70b", "--context_length=16384", "--batch_size=1"]
    cfg, info = config.parse(argv), arch.read("llama-2-70b", need_weights=False)
    machine = machine_of("2x24", 256)
    own = fit.evaluate(info, cfg, setting_of(cfg, 80, 2), machine)
    found = fit.choose(fit.explore(info, cfg, machine))
    assert not own.fits and found and found.setting.hosts_inputs
    assert applied(cfg, found.setting).use_activation_cpu_offload
    assert any("inputs on the host" in item.words for item in fit.changes(info, cfg, machine))
    lengths = [fit.longest(info, cfg, machine, is_lean) for is_lean in (False, True)]
    assert lengths[0] < 16384


def test_the_longest_row_is_the_longest_that_fits():
    argv = ["--model_name=llama-3.1-8b", "--use_activation_cpu_offload=true"]
    cfg, info = config.parse(argv), arch.read("llama-3.1-8b", need_weights=False)
    machine = machine_of("12", 256)
    length = fit.longest(info, cfg, machine, is_lean=False)
    for tokens, fits in ((length, True), (length + fit.LENGTH_STEP, False)):
        long = dataclasses.replace(cfg, context_length=tokens)
        assert fit.evaluate(info, long, setting_of(long, 32, 1), machine).fits == fits
    assert 16384 < length == fit.longest(info, cfg, machine)


def test_budgets_of_the_user_stand_above_the_machine():
    """--gpu_budget_gib caps what the allocator reserves, context not counted."""
    info, cfg = run_of("7b", "--gpu_budget_gib=10", "--host_budget_gib=6")
    found = fit.evaluate(info, cfg, setting_of(cfg, 32, 2), machine_of("2xA100-80", 256))
    outside_gib = found.device.gib(found.device.peak_phase, rows.CONTEXT)
    assert found.device.limit_gib == pytest.approx(10 + outside_gib)
    others_gib = found.host.gib("load", rows.SYSTEM)
    assert found.host.limit_gib == pytest.approx(6 + others_gib)
    # The streamed base is 3.1 GiB, and processes need 4.
    assert found.fits and 16 < found.setting.count("disk") < 32


H200 = GPUS["H200"]
# As with NCCL_P2P_DISABLE=1: facts.md measured 50 GB/s from GPU to GPU through the host.
NO_PEER = dataclasses.replace(H200, peer_gbs=50)


def seconds(run: str, placement: str, gpu: Device, levels: tuple[str, ...] = ()) -> fit.Speed:
    """Estimate of one of test_memory's runs on two GPUs."""
    return fit.estimate(*plan(run, placement, levels), [gpu] * 2)


@pytest.mark.parametrize(
    ("run", "placement", "gpu", "step_s", "bound"),
    [  # recipes/llama-2-70b.md; the streamed one: facts.md, a probe
        ("70B 2x512", "offloaded", NO_PEER, 2.35, fit.HOST_LINK),
        ("70B 2x512", "streamed", NO_PEER, 1.36, None),
    ],
)
def test_steps_take_what_was_measured_within_20_percent(run, placement, gpu, step_s, bound):
    """And the bottleneck is the same; None where two are about equal."""
    guess = seconds(run, placement, gpu)
    assert abs(guess.step_s / step_s - 1) < 0.2, guess
    assert bound in (None, guess.bound)
    assert guess.tokens_per_s == pytest.approx(2 * 1024 / guess.step_s)


OF_7B = "--lora_rank=16 --batch_size=4 --context_length=2048 --use_cpu_offload=false"
STREAMED_7B = "--lora_rank=16 --batch_size=4 --context_length=2048"
SMALL = "--lora_rank=16 --batch_size=1 --context_length=512 --use_cpu_offload=false"
OF_70B = "--lora_rank=16 --batch_size=2 --context_length=2048"
LONG = "--lora_rank=32 --use_activation_cpu_offload=true --context_length"


@pytest.mark.parametrize(
    ("name", "flags", "num_gpus", "num_selective", "step_s"),
    [  # recipes/measured.md, 2026-11-29 and 30
        ("llama-2-7b", OF_7B, 1, 0, 0.598),
        ("llama-2-7b", OF_7B, 2, 0, 0.648),
        ("llama-2-7b", f"{OF_7B} --matmul=fp8", 1, 0, 0.459),
        ("llama-2-7b", f"{OF_7B} --matmul=fp8", 1, 20, 0.418),
        ("llama-2-7b", SMALL, 1, 0, 0.070),  # by CUDA graphs
        ("llama-2-7b", SMALL, 1, 32, 0.064),
        ("llama-2-7b", STREAMED_7B, 2, 28, 0.499),
        ("llama-3.1-70b", f"{LONG}=16384 --lora_rank=16", 2, 0, 13.45),
        ("gpt-oss-120b", f"{STREAMED_7B} --expert_lora_rank=4 --resident_layers=6", 1, 0, 2.012),
        ("llama-2-70b", OF_70B, 1, 0, 2.78),
        ("llama-2-70b", OF_70B, 2, 0, 2.876),
        ("llama-2-70b", f"{OF_70B} --matmul=fp8", 1, 0, 1.885),
        ("llama-2-70b", f"{OF_70B} --matmul=fp8", 2, 20, 1.915),
        ("llama-2-70b", f"{OF_70B} --matmul=int8", 1, 0, 2.69),
        ("llama-3.1-8b", f"{LONG}=8192", 1, 0, 0.77),
        ("llama-3.1-8b", f"{LONG}=65536", 1, 0, 13.84),
        ("llama-3.1-8b", f"{LONG}=131072", 1, 0, 46.52),
        ("llama-3.1-8b", f"{LONG}=131072 --context_parallel=2", 2, 0, 25.0),
        ("llama-3.1-8b", f"{LONG}=262144 --context_parallel=2", 2, 0, 88.4),
        ("llama-3-70b", f"{LONG}=32768 --context_parallel=2", 2, 0, 17.86),
        ("qwen3-30b-a3b", f"{OF_7B} --expert_lora_rank=4 --resident_layers=48", 1, 0, 0.613),
    ],
)
def test_steps_take_what_an_h200_measured_within_10_percent(
    name, flags, num_gpus, num_selective, step_s
):
    cfg = config.parse([f"--model_name={name}", *flags.split()])
    info = arch.read(name, need_weights=False)
    machine = Machine((dataclasses.replace(H200, peer_gbs=0.0),) * num_gpus, 256.0, num_gpus)
    own = setting_for(info, cfg, machine)
    levels = ("selective",) * num_selective + own.levels[num_selective:]
    own = dataclasses.replace(own, levels=levels)
    found = fit.evaluate(info, cfg, own, machine).speed
    assert found.step_s == pytest.approx(step_s, rel=0.1), found


def test_unchecked_layers_gain_what_the_probe_gained():
    """facts.md: 14 of 32 layers not checkpointed: 0.72 -> 0.628 s."""
    levels = ("full",) * 18 + ("none",) * 14
    gain = seconds("7B 4x2048", "sharded", H200).step_s
    gain /= seconds("7B 4x2048", "sharded", H200, levels).step_s
    assert gain == pytest.approx(0.72 / 0.628, rel=0.03)


def test_short_rows_wait_for_launches_and_slow_links_for_copies():
    """facts.md: 7B, 1 x 512, no graphs: 0.41 to 0.435 s, a fifth of it GPU work."""
    flags = ("--lora_rank=16", "--use_cpu_offload=false", "--cuda_graphs=off")
    cfg = config.parse(["--model_name=llama-2-7b", *flags])
    info = arch.read("llama-2-7b", need_weights=False)
    own, found = setting_of(cfg, 32, 2), Sizes(info, cfg)
    guess = fit.estimate(found, own, [H200] * 2)
    assert guess.bound == fit.LAUNCHES
    assert abs(guess.step_s / 0.42 - 1) < 0.2
    hosted = Setting(2, 1, 1, ("streamed",) * 32, own.levels)
    slow = dataclasses.replace(GPUS["4090"], host_link_gbs=3)
    guess = fit.estimate(found, hosted, [slow] * 2)
    assert guess.bound == fit.HOST_LINK
    # 3.34 GB twice at 95 % of 3 GB/s; half of the adapters (2 + 2 + 4 bytes of 40 M), of the
    # embedding once and of the head twice (262 MB each) at 55 %.
    gathered_gb = (0.040 * 8 + 3 * 0.262) / 2
    copies_s = 2 * 3.34 / (0.95 * 3) + gathered_gb / (0.55 * 3)
    assert guess.step_s == pytest.approx(copies_s, rel=0.01)


def test_the_slowest_gpu_sets_the_pace():
    """Ranks march in step."""
    args = plan("7B 4x2048", "streamed")
    pair = fit.estimate(*args, [GPUS["3090"], GPUS["4060Ti-16G"]])
    assert pair == fit.estimate(*args, [GPUS["4060Ti-16G"]] * 2)


def test_steps_are_known_where_rows_are_counted_cheaply(tmp_path: Path):
    """A .jsonl file's lines, the rows of named sets; nothing for a file that must be parsed."""
    path, info = tmp_path / "rows.jsonl", arch.read("llama-2-7b", need_weights=False)
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n' * 5)

    def steps(*argv: str) -> int | None:
        cfg = config.parse(["--model_name=llama-2-7b", "--batch_size=2", *argv])
        return fit.num_steps(Sizes(info, cfg), setting_of(cfg, 32, 2))

    assert steps(f"--dataset={path}", "--num_epochs=3") == 6  # 10 rows, 4 or 5 a step
    assert steps(f"--dataset={path}", "--num_epochs=1.1") == 3
    assert steps(f"--dataset={path}", "--eval_samples=2") == 2
    for num in (1, 3, 7, 99, 100, 241):  # those of the run's own batches
        path.write_text('{"text": "a"}\n' * num)
        cfg = config.parse([f"--dataset={path}", "--batch_size=2", "--num_epochs=1.7"])
        num_learned = num - cfg.num_held_out(num)
        samples = [Sample(np.arange(9, dtype=np.int32), np.ones(9, bool))] * num_learned
        learned = of_samples(samples, "x")
        made = batches.make(cfg, learned, batches.sampler_config(cfg, 2, 0, 8))
        assert steps(f"--dataset={path}", "--num_epochs=1.7") == made.num_steps
    assert steps("--dataset=alpaca") == 12_915  # 100 rows held out
    assert steps("--dataset=rows.parquet") is None
    assert steps("--dataset=rows.parquet", "--max_steps=7") == 7


# Llama-3.1-8B r 32, inputs on the host, one H200 (torch 2.11): tokens -> GiB in tensors. That run
# did not fetch the next layer's input ahead.
LONG_ROWS = {16_384: 6.83, 32_768: 6.47, 65_536: 8.94, 131_072: 13.87, 196_608: 18.80}


@pytest.mark.parametrize("tokens", LONG_ROWS)
def test_long_rows_take_what_was_measured(tokens):
    flags = ("--lora_rank=32", "--use_activation_cpu_offload=true", f"--context_length={tokens}")
    cfg = config.parse(["--model_name=llama-3.1-8b", *flags])
    info = arch.read("llama-3.1-8b", need_weights=False)
    found = fit.evaluate(info, cfg, setting_of(cfg, 32, 1), machine_of("24", 128))
    ahead = tokens * 4096 * 2 / 2**30 * (tokens > 16_384)
    assert abs(found.device.allocated_gib / (LONG_ROWS[tokens] + ahead) - 1) < 0.05
    assert found.fits


def test_a_pair_is_two_rows_and_a_live_reference_one_forward_pass_more():
    """Measured on one H200 (recipes/preferences.md): 1.35 times SFT's step, 1.02 cached."""
    machine = Machine((GPUS["H200"],), 200.0)
    info, found = arch.read("llama-2-70b", need_weights=False), {}
    for name, flags in {
        "sft": ("--batch_size=4",),
        "live": ("--objective=dpo", "--batch_size=2"),
        "cached": ("--objective=dpo", "--batch_size=2", "--reference=cached"),
    }.items():
        cfg = config.parse(["--model_name=llama-2-70b", "--context_length=1024", *flags])
        found[name] = fit.evaluate(info, cfg, setting_for(info, cfg, machine), machine)
    seconds = {name: outcome.speed.step_s for name, outcome in found.items()}
    assert seconds["live"] / seconds["sft"] == pytest.approx(1.35, rel=0.05)
    assert seconds["cached"] == seconds["sft"]
    assert found["cached"].device.peak_gib == found["sft"].device.peak_gib
    assert 0 < found["live"].device.peak_gib - found["sft"].device.peak_gib < 2
