"""The plan of a run: what is chosen, refused and told to its ranks; and the command itself."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.__main__ import main
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.planning import fit, rows, run
from fsdp_qlora.planning.sizes import setting_of
from tests import fake_nvml, timing

SHAPE = ["--model_name=llama-2-7b", "--context_length=2048", "--lora_rank=16", "--lora_dropout=0"]
GIVEN = {
    "--batch_size=4": {"batch_size", "gradient_accumulation_steps"},
    "--use_cpu_offload=true": fit.PLACING,
    "--selective_layers=3": fit.KEEPING,
}


LAYER_GIB = 0.41128  # of 70B


def plan_of(*argv: str, names: str = "2x24", host_gib: float | None = 64, **more) -> run.RunPlan:
    """Plan a 7B on imagined GPUs."""
    words = [*SHAPE, *argv, "--output_dir=o"]
    cfg = config.parse(words)
    info = arch.read(cfg.model_name, need_weights=False)
    machine = hardware.Machine(tuple(hardware.parse_gpus(names)), host_gib, 2)
    return run.make(info, cfg, config.given(words), machine, **more)


def said(plan: run.RunPlan) -> tuple[list[str], UserError | None]:
    """What a plan says, and the error it ends with."""
    lines: list[str] = []
    try:
        run.announce(plan, lines.append)
    except UserError as fault:
        return lines, fault
    return lines, None


def test_what_is_chosen_is_faster_and_takes_the_same_global_batch():
    """7B, a row a rank: fewer layers recomputed, and one line says so."""
    plan = plan_of("--gradient_accumulation_steps=4", "--batch_size=1", "--fit=off")
    left_open = plan_of("--use_cpu_offload=false")
    assert left_open.found is not None and left_open.found.fits_safely
    assert left_open.cfg.batch_size * left_open.cfg.gradient_accumulation_steps == 1
    assert left_open.cfg.selective_layers + left_open.cfg.uncheckpointed_layers > 0
    lines, fault = said(left_open)
    fit_lines = [line for line in lines if line.startswith("fit ")]
    assert fault is None and len(fit_lines) == 1 and "fastest that fits" in fit_lines[0]
    assert max(map(len, lines)) <= 100
    assert plan.cfg == plan.asked and "off: everything as asked for" in said(plan)[0][-1]
    own = setting_of(left_open.cfg, 32, 2)
    assert own == left_open.found.setting  # the options say what was planned


@pytest.mark.parametrize("number", range(8))
def test_what_the_user_gave_stays(number: int):
    """All sets of the three groups; with all of them given nothing is chosen."""
    flags = [flag for i, flag in enumerate(GIVEN) if number >> i & 1]
    plan = plan_of(*flags)
    asked, chosen = config.to_dict(plan.asked), config.to_dict(plan.cfg)
    changed = {name for name in asked if asked[name] != chosen[name]}
    kept = {name for flag in flags for name in GIVEN[flag]}
    assert not changed & kept
    assert changed <= fit.BATCHING | fit.KEEPING | fit.PLACING
    product = plan.cfg.batch_size * plan.cfg.gradient_accumulation_steps
    assert product == plan.asked.batch_size * plan.asked.gradient_accumulation_steps
    assert plan.found is not None
    assert plan.found.setting == setting_of(plan.cfg, 32, 2)
    if number == 7:
        assert changed == set()
        assert plan.note == "as asked for: batch size, checkpointing, offload are given"
        assert plan.lower is None


def test_cpu_ranks_run_as_asked_for():
    """What tests and the quick start compute does not depend on a plan."""
    plan = plan_of(names="none")
    assert plan.cfg == plan.asked and plan.lower is None
    assert plan.found is not None and plan.machine.kind == "cpu"
    assert said(plan)[0][-1] == "fit       CPU ranks run as asked for"


def test_rows_shorter_than_the_context_are_planned_as_they_are():
    """Once the data is read; what is done, and what would be done instead, stays."""
    plan = plan_of("--batch_size=4", names="none")
    asked = plan_of("--batch_size=4", "--context_length=300", names="none")
    found = plan.for_rows(4 * 300)
    assert found.to_dict()["host"] == asked.to_dict()["host"]
    assert found.cfg == plan.cfg and found.env == plan.env
    assert "1,200 tokens" in found.to_dict()["note"]
    assert plan.for_rows(4 * 2048) is plan
    lower = plan_of("--batch_size=4").lower
    assert lower is not None and lower.found is not None
    short = lower.for_rows(4 * 300)
    assert short.fallback == 1 and short.candidates[0] == lower.candidates[0]
    assert short.found is not None and short.found.setting == lower.found.setting
    assert short.found.device.peak_gib < lower.found.device.peak_gib


def test_the_speed_of_a_processor_that_doctor_measured_is_planned_with(tmp_path, monkeypatch):
    """Twice the table's products and memory: half its seconds; the ranks are told the same."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    argv = ["--model_name=smollm2-135m", "--world_size=2", "--output_dir=o"]
    cfg = config.parse(argv)
    info = arch.read(cfg.model_name, need_weights=False)

    def planned() -> run.RunPlan:
        return run.make(info, cfg, config.given(argv), run.find_machine({}, 2, 0))

    table = planned()
    fast = {key: 2 * getattr(hardware.CPU, name) for key, name in hardware.SPEEDS.items()}
    hardware.machine_file().write_text(json.dumps({"cards": {"CPU": fast}}))
    measured = planned()
    assert measured.machine.cpu.is_measured and not table.machine.cpu.is_measured
    assert measured.found.speed.step_s == pytest.approx(table.found.speed.step_s / 2)
    hardware.machine_file().unlink()
    assert run.find_machine(measured.env, 2, 0) == measured.machine


def test_what_cannot_fit_is_refused_with_a_remedy_that_fits():
    """Code 3, one line, and before it the three changes; --plan ignore goes on."""
    words = ["--batch_size=8", "--use_gradient_checkpointing=false", "--use_cpu_offload=false"]
    lines, fault = said(plan_of(*words, names="2x12"))
    assert fault is not None and fault.code == ENVIRONMENT
    assert "GiB on a GPU" in str(fault) and "it does not fit" in str(fault)
    assert "--plan ignore" in str(fault) and len(str(fault)) <= 300
    assert any("NO FIT" in line for line in lines) and any("1. " in line for line in lines)
    flags = str(fault).split("; ")[1].split(" or --plan")[0].split()
    pairs = [f"{name}={value}" for name, value in zip(flags[::2], flags[1::2], strict=True)]
    again, remedied = said(plan_of(*words, *pairs, names="2x12"))
    assert remedied is None and again[0].startswith("fits")
    ignored, fault = said(plan_of(*words, "--plan=ignore", names="2x12"))
    assert fault is None and ignored[0].startswith("NO FIT")


def test_the_host_is_refused_too_and_its_budget_counts():
    """70B on a host of 24 GiB, or with a budget of the user's: what fits is in memory."""
    base = ["--model_name=llama-2-70b", "--use_cpu_offload=true", "--batch_size=1"]
    words = [*base, "--selective_layers=0"]
    for flags, host_gib, budget_gib in (((), 24, 24), (("--host_budget_gib=30",), 256, 30.5)):
        plan = plan_of(*words, *flags, host_gib=host_gib)  # half a GiB is not the ranks'
        assert said(plan)[1] is None and plan.found is not None
        left_gib, counts = plan.found.host.free_gib, plan.found.setting.count
        assert plan.found.host.limit_gib == pytest.approx(budget_gib)
        assert counts("streamed") + counts("disk") == 80 and 0 <= left_gib < 1.4  # 3 %, a layer
        in_memory = (counts("streamed") + 4) * LAYER_GIB
        assert plan.found.host.gib("backward", rows.HOSTED) == pytest.approx(in_memory, 0.01)
    _, fault = said(plan_of(*words, host_gib=5))
    assert fault is not None and "on the host" in str(fault)
    assert plan_of(*words, host_gib=64).found.setting.count("streamed") == 80  # type: ignore


def test_files_are_chosen_with_the_groups_of_rows_that_hide_the_disk():
    """70B, 64 rows a step on one GPU: a step takes what computing takes, or reading its bytes."""
    words = ["--model_name=llama-2-70b", "--offload_impl=file", "--gradient_accumulation_steps=64"]
    words += ["--batch_size=1", "--context_length=512", "--fit=auto"]
    layer_gb, inputs_gb = LAYER_GIB * 1.0737, 79 * 64 * 512 * 8192 * 2 / 1e9
    for extra, least in (((), {0}), (("--host_budget_gib=16",), range(15, 30))):
        plan = plan_of(*words, *extra, names="24", host_gib=32)
        assert plan.found is not None and plan.found.fits_safely
        setting, speed = plan.found.setting, plan.found.speed
        again = run.setting_for(plan.info, plan.cfg, plan.machine)
        assert fit.evaluate(plan.info, plan.cfg, again, plan.machine) == plan.found
        assert setting.count("streamed") in least and setting.count("disk") > 20
        visits = 64 // setting.batch_size // setting.per_visit
        reads_gb = 2 * setting.count("disk") * layer_gb * visits
        reads_s = (reads_gb + 2 * inputs_gb * (setting.hosts_inputs == "disk")) / 1.5
        assert speed.parts_s[fit.READS] == pytest.approx(reads_s, 0.01)
        most = max(speed.parts_s[fit.MATMULS], reads_s)
        assert setting.per_visit > 1 and most <= speed.step_s < 1.35 * most
    slow = dataclasses.replace(plan.machine.gpus[0], disk_gbs=0.2)
    machine = dataclasses.replace(plan.machine, gpus=(slow,))
    slower = run.make(plan.info, plan.asked, frozenset({"offload_impl"}), machine)
    assert slower.found is not None and slower.found.speed.bound == fit.READS
    assert slower.found.setting.per_visit * slower.found.setting.batch_size >= 32


def test_the_smallest_gpu_sets_the_limit():
    mixed = plan_of(names="A100-80+3090")
    assert mixed.found is not None
    assert mixed.found.device.limit_gib == hardware.GPUS["3090"].memory_gib


@pytest.mark.parametrize(("names", "host_gib"), [("2x24", 64), ("24", 64), ("2x24", 40)])
def test_the_recipe_for_70b_fits_the_machines_that_it_is_written_for(names: str, host_gib: float):
    """What it leaves to the plan is chosen: one copy on the host, memory left over into speed."""
    words = ["--recipe=llama-2-70b", "--model_name=llama-2-70b", "--output_dir=o"]
    cfg = config.parse(words)
    info = arch.read("llama-2-70b", need_weights=False)
    machine = hardware.Machine(tuple(hardware.parse_gpus(names)), host_gib)
    plan = run.make(info, cfg, config.given(words), machine)
    assert plan.found is not None and plan.found.fits_safely
    assert (plan.cfg.batch_size, plan.cfg.use_cpu_offload) == (2, True)
    assert plan.found.setting.count("streamed") >= 70
    assert plan.found.setting.count("selective", "none") > 0


def test_ranks_make_the_plan_of_the_supervisor():
    """From what they are told; a fallback down is the next setting of the same candidates."""
    plan = plan_of("--batch_size=4")
    lower = plan.lower
    assert lower is not None and lower.found is not None and plan.found is not None
    assert lower.found.device.peak_gib <= fit.FALLBACK_SHARE * plan.found.device.peak_gib
    for told in (plan, lower):
        machine = run.find_machine(told.env, 99, 99)
        assert machine == told.machine
        same = run.make(told.info, told.asked, frozenset({"batch_size"}), machine, told.fallback)
        assert (same.cfg, same.found, same.candidates) == (told.cfg, told.found, told.candidates)
    assert "fallback 1 from" in lower.note
    assert run.fallback_of(lower.env) == 1 and run.fallback_of({}) == 0


EVERYTHING = ["--batch_size=4", "--use_cpu_offload=false", "--use_gradient_checkpointing=false"]


@pytest.mark.parametrize("words", [EVERYTHING, EVERYTHING[:1]])
def test_advice_after_an_out_of_memory_added_to_the_command_line_gives_what_it_says(words):
    """Also where the user gave everything: then it is what the plan would take instead."""
    plan = plan_of(*words, names="2xA100-40")
    assert plan.found is not None and (plan.lower is None) == (words == EVERYTHING)
    advice = run.next_change(plan)
    flags = advice.partition(" (")[0].split()
    pairs = [f"{name}={value}" for name, value in zip(flags[::2], flags[1::2], strict=True)]
    found = plan_of(*words, *pairs, names="2xA100-40").found
    assert pairs and found is not None
    assert found.device.peak_gib < 0.94 * plan.found.device.peak_gib
    assert f"({found.device.peak_gib:.1f} GiB a GPU" in advice


def test_gpus_of_unknown_memory_are_neither_judged_nor_fitted():
    """Memory shared with the host: the run goes on as asked for, and says why."""
    info = arch.read("llama-2-7b", need_weights=False)
    cfg = config.parse([*SHAPE, "--batch_size=64", "--output_dir=o"])
    machine = hardware.Machine((run.UNKNOWN,) * 2, 64, 2)
    plan = run.make(info, cfg, frozenset(), machine)
    lines, fault = said(plan)
    cfg = dataclasses.replace(cfg, lr=2.9e-4)  # by the width
    assert fault is None and plan.cfg == cfg and "does not report the memory" in lines[-1]
    assert plan.to_dict()["device_limit_gib"] is None
    assert run.find_machine(plan.env, 2, 2) == machine


def test_the_plan_of_the_record_has_every_row_of_every_phase():
    """As summary.json and the report have it."""
    plan = plan_of()
    table = plan.to_dict()
    assert table["device"].keys() == table["host"].keys() == set(rows.PHASES)
    totals = {
        place: max(sum(r.values()) for r in table[place].values())
        for place in table
        if place in ("device", "host")
    }
    assert math.isclose(totals["device"], table["peak_device_gib"])
    assert math.isclose(totals["host"], table["peak_host_gib"])
    several = run.RunPlan(
        plan.cfg, plan.asked, plan.info, hardware.Machine(()), note="off: several machines"
    )
    assert several.to_dict() == {} and several.lines == ["fit       off: several machines"]


def test_memory_in_use_before_the_run_is_part_of_the_plan():
    """Files in /dev/shm are in use already: they are not counted twice."""
    plan = plan_of(names="none", host_gib=32)
    busy = dataclasses.replace(plan.machine, system_gib=7.0)
    found = fit.evaluate(plan.info, plan.cfg, setting_of(plan.cfg, 32, 2), busy)
    assert found.host.gib("load", rows.SYSTEM) == 7.0
    assert plan.found is not None
    usual_gib = plan.found.host.gib("load", rows.SYSTEM)
    assert found.host.peak_gib - plan.found.host.peak_gib == pytest.approx(7.0 - usual_gib)


def test_nccl_told_to_leave_peer_access_alone_is_planned_without(monkeypatch):
    """It then holds 0.8 GiB of each GPU less."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setenv("FAKE_GPUS", fake_nvml.gpus("NVIDIA H200", gib=140))
    only = {"CUDA_VISIBLE_DEVICES": "0"}
    assert run.find_machine(only, 1, 1).gpus[0].peer_gbs
    assert run.find_machine(only | {"NCCL_P2P_DISABLE": "0"}, 1, 1).gpus[0].peer_gbs
    assert not run.find_machine(only | {"NCCL_P2P_DISABLE": "1"}, 1, 1).gpus[0].peer_gbs


ROOT = Path(__file__).parents[1]
ARGS = ["--model_name=llama-2-70b", "--lora_rank=16", "--batch_size=2", "--context_length=2048"]
CARDS = ["--gpus=2x3090", "--host=64"]


def output(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a plan prints."""
    assert main(["plan", *argv]) == code
    return capsys.readouterr().out


def test_a_plan_answers_in_less_than_a_second_without_torch():
    """The fastest of three, with the search for a better setting and what would make it fit."""
    program = (
        "import sys; from fsdp_qlora.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'transformers', 'numpy'} & set(sys.modules) else code)"
    )
    for GPUs, code in (("2xA100-80", 0), ("2x12", 3)):
        words = ["plan", "--model_name=llama-2-70b", "--batch_size=8", f"--gpus={GPUs}"]
        argv = [sys.executable, "-c", program, *words, "--context_length=2048"]
        done, seconds = timing.fastest(argv, ROOT)
        assert (done.returncode, done.stderr) == (code, "")
        assert seconds < 1.0


def test_json_holds_the_tables_and_survives_a_round_trip(capsys: pytest.CaptureFixture[str]):
    """Rows add up to totals, the largest total is the peak, numbers are those of the text."""
    values = json.loads(output(capsys, *ARGS, *CARDS, "--json"))
    assert values == json.loads(json.dumps(values))
    for place, names in (("card", rows.DEVICE_ROWS), ("host", rows.HOST_ROWS)):
        table = values[place]
        assert table["phases_gib"].keys() == set(rows.PHASES)
        for phase, parts in table["phases_gib"].items():
            assert parts.keys() <= set(names)
            assert sum(parts.values()) == pytest.approx(table["totals_gib"][phase])
        assert table["peak_gib"] == max(table["totals_gib"].values())
    text = output(capsys, *ARGS, *CARDS)
    assert f"{values['card']['peak_gib']:.1f} of 23.6 GiB on a 3090" in text
    assert f"{values['tokens_per_s']:,.0f} tokens/s" in text
    assert values["fits"] and values["num_steps"] == 121
    assert values["eta_s"] == pytest.approx(121 * values["step_s"])


@pytest.mark.parametrize(
    "words",
    [
        [*ARGS, *CARDS, "--explain"],
        [*ARGS, "--gpus=2x12", "--host=40", "--batch_size=16"],
        ["--model_name=llama-2-7b", "--gpus=none", "--world_size=2", "--train_type=lora"],
        ["--model_name=gemma-2-9b", "--gpus=3090+T4", "--sharding_strategy=ddp"],
        [*ARGS, "--gpus=2x RTX PRO 6000 Blackwell,12,none,2x24"],
    ],
)
def test_no_line_is_wider_than_100_columns(capsys: pytest.CaptureFixture[str], words: list[str]):
    """What matters stands first; rows are for --explain; no option is broken in its middle."""
    main(["plan", *words])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("fits  ", "NO FIT", "GPUs"))
    assert ("  adapters" in "\n".join(lines)) == ("--explain" in words)
    assert len(lines) > 20 if "--explain" in words else 7 < len(lines) < 18
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line.endswith("--")]


def test_every_row_is_explained_by_numbers_that_make_it(capsys: pytest.CaptureFixture[str]):
    """The products shown are the row."""
    text = output(capsys, *ARGS, *CARDS, "--explain")
    line = "full: layer's input: 4,096 tokens x 8,192 hidden x 2 bytes x 80 layers = 5.000 GiB"
    assert line in text
    assert "one copy for all ranks: 80 layers x 441,606,144 bytes = 32.902 GiB" in text
    options, cfg, given, machines = run.parse([*ARGS, *CARDS])
    assert not options.explain and "lora_rank" in given
    machine = machines["2x3090"]
    assert (machine.num_ranks, machine.host_gib, cfg.lora_rank) == (2, 64.0, 16)


def test_several_machines_stand_in_one_table(capsys: pytest.CaptureFixture[str]):
    """Each as train.py plans it there; rows of the longest length fit, longer ones do not."""
    words = [*SHAPE, "--lora_dropout=0", "--host=64", "--batch_size=4"]
    table = json.loads(output(capsys, *words, "--gpus", "4,12,2x24", "--json"))
    for name, row in table.items():
        plan = plan_of("--batch_size=4", names=name)
        machine = hardware.Machine(tuple(hardware.parse_gpus(name)), 64, len(name.split("x")))
        plan = run.make(plan.info, plan.asked, frozenset({"batch_size"}), machine)
        assert plan.found is not None and row["fits"] == plan.found.fits == (name != "4")
        assert row["step_s"] == plan.found.speed.step_s
        cfg = dataclasses.replace(plan.asked, batch_size=1, gradient_accumulation_steps=1)
        for more in (0, 256):
            cfg = dataclasses.replace(cfg, context_length=row["longest"] + more or 256)
            outcomes = fit.explore(plan.info, cfg, machine)
            fitting = any(outcome.fits for outcome in outcomes)
            assert fitting == (more == 0 and bool(row["longest"])) or cfg.context_length > 4096
    text = output(capsys, *words, "--gpus", "4,12,2x24")
    assert text.splitlines()[1].startswith("4           NO") and "2x24        yes" in text
    assert run.main([*words, "--gpus=4,4.5"]) == ENVIRONMENT
    with pytest.raises(UserError, match="explains the plan of one machine"):
        run.main([*words, "--gpus=4,12", "--explain"])


def test_what_does_not_fit_says_so_with_a_remedy_that_fits(capsys: pytest.CaptureFixture[str]):
    """Code 3; the flags of the first remedy, added to the command line, give code 0."""
    words = [*ARGS, "--gpus=2x12", "--host=64", "--batch_size=8", "--lora_dropout=0"]
    assert "MISSING" in output(capsys, *words, code=3)
    remedy = json.loads(output(capsys, *words, "--json", code=3))["to_fit"][0]
    again = [f"--{name}={value}" for name, value in remedy["flags"].items()]
    assert again
    values = json.loads(output(capsys, *words, *again, "--json"))
    assert values["card"]["peak_gib"] == pytest.approx(remedy["card_gib"])


def test_a_better_setting_is_what_its_flags_give(capsys: pytest.CaptureFixture[str]):
    """Added to the command line they give the memory and the speed that were promised."""
    first = json.loads(output(capsys, *ARGS, *CARDS, "--json"))
    again = [f"--{name}={value}" for name, value in first["better"]["flags"].items()]
    second = json.loads(output(capsys, *ARGS, *CARDS, *again, "--json"))
    assert second["card"]["peak_gib"] == pytest.approx(first["better"]["card_gib"])
    speed = second["tokens_per_s"] / first["tokens_per_s"]
    assert speed == pytest.approx(first["better"]["speed"])
    assert second["better"] is None


def test_all_faults_are_told_at_once():
    """Those of plan's own options and those of train.py's."""
    words = ["--gpus=2x3091", "--host=-1", "--batch_size=x", "--lora_rnk=3"]
    with pytest.raises(UserError) as caught:
        run.parse(words)
    for part in ("did you mean 3090,", "--host -1: must be > 0", "--batch_size x", "--lora_rank?"):
        assert part in str(caught.value)
    assert str(caught.value).count(" | ") == 3
    with pytest.raises(UserError, match="a rank needs one"):
        run.parse(["--gpus=2x3090", "--world_size=3"])
    mixed = run.parse(["--gpus", "2x3090 + T4"])[3].values()
    assert [*mixed] == [*run.parse(["--cards=2x3090,T4"])[3].values()]


def test_measured_speeds_are_used_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From $FSDP_QLORA_CACHE/machine.json, which doctor writes."""
    monkeypatch.setitem(os.environ, "FSDP_QLORA_CACHE", str(tmp_path))
    assert "speeds from a table)" in " ".join(output(capsys, *ARGS, *CARDS).split())
    row = {"bf16_tflops": 5.0}
    (tmp_path / "machine.json").write_text(json.dumps({"cards": {"RTX 3090": row}}))
    assert "by measured speeds" in " ".join(output(capsys, *ARGS, *CARDS).split())


@pytest.mark.parametrize(
    ("name", "flags", "lr"),
    [  # 5e-4 * (2000 / width) ** 0.781, by hand
        ("llama-2-7b", [], 2.9e-4),  # 4096
        ("llama-2-13b", [], 2.4e-4),  # 5120
        ("llama-2-70b", ["--train_type=hqq_dora"], 1.7e-4),  # 8192
        ("llama-2-7b", ["--lr=3e-3"], 3e-3),
        ("llama-2-7b", ["--train_type=full"], 1e-5),
        ("llama-2-7b", ["--optimizer=sgd"], 1e-5),
        ("llama-2-7b", ["--recipe=reference"], 1e-5),
    ],
)
def test_the_learning_rate_follows_the_width_of_the_model(name, flags, lr):
    info = arch.read(name, need_weights=False)
    cfg = config.parse([f"--model_name={name}", *flags])
    plan = run.make(info, cfg, frozenset(), hardware.Machine((), 64, 2))
    assert plan.cfg.lr == plan.asked.lr == lr
    assert run.learning_rate(cfg, dataclasses.replace(info, hidden_size=576)) in (5e-4, lr)


UNKNOWN = {
    "llama": {"attention_bias": True},
    "gemma2": {"head_dim": 96},  # tied
    "qwen3_moe": {
        **{"head_dim": 96, "num_experts": 6, "moe_intermediate_size": 384, "mlp_only_layers": [0]},
        **{"num_experts_per_tok": 2, "decoder_sparse_step": 1},
    },
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_shape_that_nobody_knows_is_counted_as_transformers_builds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
):
    """From config.json alone; bytes by own arithmetic: half one of a weight, a scale of 64."""
    from torch import device, nn
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 7, "num_key_value_heads": 1, "vocab_size": 5003}
    values = {"model_type": model_type, **sizes, **UNKNOWN[model_type]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    argv = [f"--model_name={tmp_path}", "--gpus=24", "--use_cpu_offload=true", "--lora_rank=8"]
    found = json.loads(output(capsys, *argv, "--json"))
    with device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        params = {name: p.numel() for name, p in model.named_parameters()}
        linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert found["num_params"] == sum(params.values())
    assert found["num_trained"] == sum(8 * (m.in_features + m.out_features) for m in linears)
    num_packed = sum(m.weight.numel() for m in linears)
    num_packed += sum(num for name, num in params.items() if ".experts." in name)
    kept_bytes = (sum(params.values()) - num_packed) * 2
    rows = [found[place]["phases_gib"]["forward"] for place in ("card", "host")]
    assert rows[0]["unquantised weights"] * 2**30 == pytest.approx(kept_bytes, rel=1e-9)
    assert rows[1]["packed layers"] * 2**30 == pytest.approx(
        num_packed * (1 / 2 + 1 / 64), rel=0.01
    )
