"""The plan's seconds against measured steps, and the GPUs they are estimated for."""

import dataclasses
from pathlib import Path

import pytest

from fsdp_qlora import arch, config
from fsdp_qlora.hardware import GPUS, Device
from fsdp_qlora.planning import fit
from fsdp_qlora.planning.sizes import Setting, Sizes, setting_of
from tests.planning.test_memory import plan

H200 = GPUS["H200"]
# As with NCCL_P2P_DISABLE=1: facts.md measured 50 GB/s from GPU to GPU through the host.
NO_PEER = dataclasses.replace(H200, peer_gbs=50)


def seconds(run: str, placement: str, gpu: Device, levels: tuple[str, ...] = ()) -> fit.Speed:
    """Estimate of one of test_memory's runs on two GPUs."""
    return fit.estimate(*plan(run, placement, levels), [gpu] * 2)


@pytest.mark.parametrize(
    ("run", "placement", "gpu", "step_s", "bound"),
    [  # recipes/llama-2-7b.md, recipes/llama-2-70b.md; the streamed one: facts.md, a probe
        ("7B 4x2048", "sharded", H200, 0.674, fit.MATMULS),
        ("7B 4x2048", "offloaded", H200, 0.713, fit.MATMULS),
        ("70B 2x2048", "offloaded", H200, 3.51, fit.MATMULS),
        ("70B 2x2048", "offloaded", NO_PEER, 3.62, fit.MATMULS),
        ("70B 2x2048", "streamed", NO_PEER, 3.26, fit.MATMULS),
        ("70B 2x512", "offloaded", H200, 1.72, None),
        ("70B 2x512", "offloaded", NO_PEER, 2.35, fit.HOST_LINK),
        ("70B 2x512", "streamed", NO_PEER, 1.36, None),
    ],
)
def test_steps_take_what_was_measured_within_20_percent(run, placement, gpu, step_s, bound):
    """And the bottleneck is the same; None where two are about equal."""
    guess = seconds(run, placement, gpu)
    assert abs(guess.step_s / step_s - 1) < 0.2, guess
    assert bound in (None, guess.bound)
    tokens = {"7B 4x2048": 8192, "70B 2x2048": 4096, "70B 2x512": 1024}[run]
    assert guess.tokens_per_s == pytest.approx(2 * tokens / guess.step_s)


def test_unchecked_layers_gain_what_the_probe_gained():
    """facts.md: 14 of 32 layers not checkpointed: 0.72 -> 0.628 s."""
    levels = ("full",) * 18 + ("none",) * 14
    gain = seconds("7B 4x2048", "sharded", H200).step_s
    gain /= seconds("7B 4x2048", "sharded", H200, levels).step_s
    assert gain == pytest.approx(0.72 / 0.628, rel=0.03)


def test_short_rows_wait_for_launches_and_slow_links_for_copies():
    """facts.md: 7B, 1 x 512: 0.41 to 0.435 s, a fifth of it GPU work."""
    cfg = config.parse(["--model_name=llama-2-7b", "--lora_rank=16", "--use_cpu_offload=false"])
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

    assert steps(f"--dataset={path}", "--num_epochs=3") == 9  # 10 rows, 4 a step
    assert steps(f"--dataset={path}", "--eval_samples=2") == 2
    assert steps("--dataset=alpaca") == 12_940
    assert steps("--dataset=rows.parquet") is None
    assert steps("--dataset=rows.parquet", "--max_steps=7") == 7
