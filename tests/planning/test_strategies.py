"""What strategies, precisions, optimizers and offloaded activations need, by the plan."""

import dataclasses
import json

import pytest

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning import fit, rows, run
from fsdp_qlora.planning.sizes import setting_for
from fsdp_qlora.training import preflight

SHAPE = ["--model_name=llama-2-7b", "--context_length=1024", "--batch_size=2", "--output_dir=o"]
TOKENS, WIDTH = 2 * 1024, 4096


def plan_of(*argv, names="2x24"):
    words = [*SHAPE, *argv]
    cfg = config.parse(words)
    machine = hardware.Machine(tuple(hardware.parse_gpus(names)), 256.0, 2)
    info = arch.read(cfg.model_name, need_weights=False)
    return run.make(info, cfg, config.given(words), machine)


def found(*argv):
    outcome = plan_of("--fit=off", *argv).found
    assert outcome is not None
    return outcome


def test_hybrid_strategies_need_on_one_machine_what_plain_ones_do():
    sharded = ("--use_cpu_offload=false",)
    for name in ("full_shard", "shard_grad_op"):
        plain, hybrid = (
            found(f"--sharding_strategy={strategy}", *sharded)
            for strategy in (name, f"hybrid_{name}")
        )
        assert plain.device == hybrid.device and plain.host == hybrid.host
    kept = found("--sharding_strategy=hybrid_shard_grad_op", *sharded).device
    freed = found("--sharding_strategy=hybrid_full_shard", *sharded).device
    assert kept.gib("backward", rows.BUFFERS) > 2 * freed.gib("backward", rows.BUFFERS)


def on_two_machines(*flags):
    """(one machine of two 3090, two of them joined by 10 Gbit/s), by `plan`'s command line."""
    words = [*SHAPE, "--gpus=2x3090", "--lora_rank=64", *flags]
    runs = [run.parse(words), run.parse([*words, "--machines=2", "--link_gbps=10"])]
    info = arch.read("llama-2-7b", need_weights=False)
    found = [(cfg, machine) for _, cfg, _, machines in runs for machine in machines.values()]
    return [fit.evaluate(info, cfg, setting_for(info, cfg, m), m) for cfg, m in found]


def test_several_machines_need_their_copies_and_a_link():
    """What each machine holds, and what crosses 10 Gbit/s a step at 80 %, counted here anew."""
    gbs, trained = 0.8 * 10 / 8, num_trained(64)
    for strategy in ("hybrid_full_shard", "ddp"):  # a ring sums the gradients of two copies
        one, two = on_two_machines(f"--sharding_strategy={strategy}")
        assert one.device == two.device and one.host.phases == two.host.phases
        assert one.speed.parts_s[fit.NETWORK] == 0
        assert two.speed.parts_s[fit.NETWORK] == pytest.approx(4 * trained / 1e9 / gbs)
        assert two.speed.tokens_per_s * two.speed.step_s == pytest.approx(4 * TOKENS)
    hosted = [item.host.gib("forward", rows.HOSTED) for item in on_two_machines()]
    assert hosted[0] == hosted[1] > 3  # streamed: one copy a machine
    one, two = on_two_machines("--offload_impl=fsdp")
    slices = [item.host.gib("forward", rows.HOSTED) for item in (one, two)]
    assert slices == pytest.approx([hosted[0], hosted[0] / 2])
    base, ends = hosted[0] * 2**30, 32000 * WIDTH * 2
    crossing = 3 / 4 * (2 * base + (2 + 6) * trained + 3 * ends)  # twice gathered, once reduced
    assert two.speed.parts_s[fit.NETWORK] == pytest.approx(crossing / 1e9 / gbs, rel=1e-3)


def num_trained(rank: int) -> int:
    """Of Llama-2 7B: q, k, v, o of 4096 x 4096, gate, up, down of 4096 x 11008."""
    return 32 * rank * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_plan_names_the_machines_and_finds_the_strategy_that_spares_a_slow_link(capsys):
    """Sharded over all ranks a base would cross the link twice a step."""
    words = [*SHAPE, "--gpus=2xA100-80", "--host=256", "--use_cpu_offload=false", "--machines=2"]
    run.main([*words, "--link_gbps=10"])
    text = " ".join(capsys.readouterr().out.split())
    assert "ranks 4 on 2 machines x micro-batches" in text and "GiB on each host" in text
    assert f"bottleneck: {fit.NETWORK}" in text
    assert "--sharding_strategy hybrid_full_shard" in text.partition("best ")[2]
    run.main([*words, "--link_gbps=800", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["num_machines"] == 2 and values["bound"] != fit.NETWORK


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        (("--optimizer=sgd",), 0.0),
        (("--optimizer=adamw_8bit",), 0.25),
        (("--precision=bf16_pure",), 0.5),
        (("--optimizer=paged_adamw_8bit", "--precision=bf16_pure"), 0.25),
    ],
)
def test_optimizer_state_is_as_wide_as_its_row_says(flags, share):
    usual = found().device.gib("optimizer", rows.OPTIMIZER)
    assert found(*flags).device.gib("optimizer", rows.OPTIMIZER) == pytest.approx(share * usual)


def test_gradients_that_are_reduced_once_are_whole_on_every_rank():
    flags = ("--gradient_accumulation_steps=4",)
    usual, whole = found(*flags), found(*flags, "--no_sync=true")
    ratio = whole.device.gib("forward", rows.GRADIENTS) / usual.device.gib(
        "forward", rows.GRADIENTS
    )
    assert ratio == pytest.approx(2)


def test_inputs_of_layers_move_to_the_host():
    usual, moved = found(), found("--use_activation_cpu_offload=true")
    layer_gib = TOKENS * WIDTH * 2 / 2**30
    less = usual.device.gib("backward", rows.KEPT) - moved.device.gib("backward", rows.KEPT)
    assert 29 * layer_gib < less <= 31 * layer_gib
    assert moved.host.gib("backward", rows.WAITING) == pytest.approx(2 * 31 * layer_gib)
    assert moved.host.gib("load", rows.WAITING) == usual.host.gib("backward", rows.WAITING) == 0
    assert moved.speed.step_s >= usual.speed.step_s


def test_processors_without_bfloat16_compute_in_float32_unless_the_user_says_otherwise():
    info = arch.read("llama-2-7b", need_weights=False)
    for words, has_bf16, precision in (
        *(((), True, "bf16"), ((), False, "fp32")),
        (("--precision=bf16",), False, "bf16"),
        (("--attn=flash_attention_2",), False, "bf16"),  # has no fp32
    ):
        cpu = dataclasses.replace(hardware.CPU, has_bf16=has_bf16)
        machine, cfg = hardware.Machine((), 256.0, 2, cpu=cpu), config.parse([*SHAPE, *words])
        plan = run.make(info, cfg, config.given(words), machine)
        assert plan.cfg.precision == precision
        is_said = "precision fp32, as this CPU has no bfloat16" in plan.note
        assert is_said == (precision == "fp32")


def test_gpus_without_bfloat16_get_float16_unless_the_user_says_otherwise():
    plan = plan_of(names="2xT4")
    assert plan.cfg.precision == "fp16_autocast"
    assert "precision fp16_autocast, as a T4 has no bfloat16" in " ".join(
        " ".join(plan.lines).split()
    )
    asked = plan_of("--precision=bf16", names="2xT4")
    assert asked.cfg.precision == "bf16"
    with pytest.raises(UserError, match="fp16"):
        preflight.check(asked)
    assert plan_of("--precision=fp32", names="2xT4").cfg.precision == "fp32"
    assert plan_of(names="3090+T4").cfg.precision == "fp16_autocast"
    assert plan_of().cfg.precision == "bf16"
