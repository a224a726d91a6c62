"""A run that goes on is the unbroken run, bit for bit (training/checkpoint.py, loop.fit).

The runs are those of train.py on two gloo ranks, without its supervisor; test_resume_run.py has it.
"""

import contextlib
import datetime
import io
import json
import shutil
import types
from pathlib import Path

import pytest

from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import RUN_FAILED, UserError
from tests import faults, tiny
from tests.ranks import run_ranks

NUM_ROWS = 26  # of 4 a step: 6 steps an epoch, the last ones of 5 rows
NUM_STEPS = 8
COMMON = (
    "--lora_rank=4",
    "--lr=0.01",
    "--lr_scheduler=cosine",
    "--apply_gradient_clipping=true",
    f"--max_steps={NUM_STEPS}",
    "--batch_size=2",
    "--context_length=128",
    "--save_every=1",
    "--keep_checkpoints=100",
    "--token_cache=off",
    "--sample_tokens=2",
    "--log_to=stdout",
)
PART = ("--max_steps=-1", "--num_epochs=1.25")  # of 6 steps: NUM_STEPS
EDGES = (1, 5, 6, 7)  # around the end of an epoch
# What it is -> flags, steps after which it is broken off.
RUNS = {
    "nf4 streamed, dropout": (("--offload_impl=stream",), EDGES),
    "nf4 by fsdp, accumulation": (
        ("--offload_impl=fsdp", "--batch_size=1", "--gradient_accumulation_steps=3"),
        (4,),
    ),
    "hqq on the cards, reentrant": (
        ("--train_type=hqq_lora", "--use_cpu_offload=false", "--reentrant_checkpointing=true"),
        (3,),
    ),
    "dora, from files": (
        ("--train_type=bnb_dora", "--optimizer=adadelta", "--offload_impl=file"),
        (3,),
    ),
    "some layers, a part of an epoch": (
        ("--layers_to_transform=1", '--rank_pattern={"v_proj": 2}', *PART),
        (7,),
    ),
    "experts": (("--expert_lora_rank", "--selective_layers=1"), (3,)),
    "everything trained": (("--train_type=full", "--lr=0.001", "--optimizer=sgd"), (3,)),
    "selective, rest kept": (("--selective_layers=1", "--uncheckpointed_layers=1"), (6,)),
    "nothing recomputed, packed": (
        ("--use_gradient_checkpointing=false", "--packing=on", "--context_length=192"),
        (2,),
    ),
    "kto, dropout": (("--objective=kto", "--dataset=PAIRS", "--lora_dropout=0.2"), (3,)),
    "dpo, everything trained": (  # its reference lies beside the record
        ("--objective=dpo", "--dataset=PAIRS", "--train_type=full", "--lr=0.001", "--wd=0"),
        (5,),
    ),
}


def make_place(directory: Path) -> Path:
    """Write `model` and `data.jsonl`."""
    rows = [
        {"instruction": f"Say {i}", "input": "", "output": f"{'so ' * (i % 5)}{i}"}
        for i in range(NUM_ROWS)
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": row["instruction"], "chosen": f" {i}", "rejected": row["output"] + "!"}
        for i, row in enumerate(rows)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    model = tiny.save_model(directory / "model", vocab_size=384, num_hidden_layers=2)

    from tests import small_tokenizers

    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    moe |= {"vocab_size": 384, "num_hidden_layers": 2}
    for path in (model, tiny.save_model(directory / "mixture", "qwen3_moe", **moe)):
        tiny.save_tokenizer(path, [text for row in rows for text in small_tokenizers.pair(row)])
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("resume"))


def run(world, place: Path, out: Path, *flags: str) -> None:
    """Train as a rank of train.py does."""
    from fsdp_qlora import arch, config, hardware
    from fsdp_qlora import run as train
    from fsdp_qlora.planning import run as plans
    from fsdp_qlora.training import preflight

    argv = [
        f"--model_name={place / ('mixture' if '--expert_lora_rank' in flags else 'model')}",
        f"--dataset={place / 'data.jsonl'}",
        f"--quant_cache={place / 'cache'}",
        "--save_model=false",
        f"--output_dir={out}",
        *(flag.replace("PAIRS", str(place / "pairs.jsonl")) for flag in flags),
    ]
    argv, saved = preflight.expand_resume(argv)
    cfg = config.parse(argv)
    out.mkdir(exist_ok=True)
    info = arch.read(cfg.model_name, need_weights=True)
    plan = plans.RunPlan(cfg, cfg, info, hardware.Machine(()))
    train.run(plan, world, config.given(argv), saved)


def break_off(world, whole: Path, out: Path, step: int) -> None:
    """Make `out` what a run leaves that was killed some time after the checkpoint of a step."""
    if world.rank == 0:
        shutil.copytree(whole, out)
        for path in (out / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        (out / "checkpoints" / f".tmp-step-{step + 1}").mkdir()
        record = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        done = [i for i, line in enumerate(record) if json.loads(line).get("step", 0) <= step]
        torn = record[done[-1] + 1] + record[done[-1] + 1][:40]  # one step more, and half a line
        (out / "metrics.jsonl").write_bytes(b"".join(record[: done[-1] + 1]) + torn)
    world.barrier()


def _goes_on_the_next_day(world, place: Path) -> None:
    from fsdp_qlora.data import prepare

    template = place / "dated.jinja"
    template.write_text("{{ strftime_now('%F') }}: {{ instruction }} {{ output }}")
    flags = (*COMMON, f"--template={template}", "--max_steps=2", "--eval_split=0.2")
    run(world, place, place / "today", *flags)
    world.barrier()
    tomorrow = datetime.date.today() + datetime.timedelta(1)
    day = types.SimpleNamespace(today=lambda: tomorrow)
    prepare.datetime = types.SimpleNamespace(date=day)
    break_off(world, place / "today", place / "tomorrow", 1)
    run(world, place, place / "tomorrow", *flags, "--resume=latest", "--chat_template_kwargs={}")
    world.barrier()
    assert traces(place / "tomorrow", 2) == traces(place / "today", 2)
    used = [json.loads((place / n / "run_config.json").read_text()) for n in ("today", "tomorrow")]
    assert used[0]["chat_template_kwargs"] == used[1]["chat_template_kwargs"]
    with pytest.raises(UserError, match=r"with another .*tokens"):  # as before it was kept
        kwargs = json.dumps({"strftime_now": str(tomorrow)})
        more = f"--chat_template_kwargs={kwargs}"
        run(world, place, place / "tomorrow", *flags, "--resume=latest", more)


def test_a_run_goes_on_with_the_day_of_its_first_start(place: Path):
    run_ranks(_goes_on_the_next_day, 2, place)


def traces(out: Path, step: int = NUM_STEPS) -> tuple:
    """What must be equal: every step's numbers, and the hashes of weights and moments."""
    names = ("step", "epoch", "learning_rate", "num_tokens", "num_trained_tokens")
    steps = tiny.steps(out)
    numbers = [[line[n] for n in names] for line in steps]
    losses = [(line["loss"].hex(), line["grad_norm"].hex()) for line in steps]
    manifest = json.loads((out / "checkpoints" / f"step-{step}" / "manifest.json").read_text())
    hashes = [manifest["files"][n] for n in ("weights.safetensors", "optimizer.safetensors")]
    return numbers, losses, hashes


def _goes_on(world, place: Path, name: str) -> None:
    number, (flags, points) = list(RUNS).index(name), RUNS[name]
    flags, whole = (*COMMON, *flags), place / f"whole{number}"
    run(world, place, whole, *flags)
    world.barrier()
    expected = traces(whole)
    assert [numbers[0] for numbers in expected[0]] == list(range(1, NUM_STEPS + 1))
    for point in points:
        out = place / f"broken{number}-{point}"
        break_off(world, whole, out, point)
        run(world, place, out, *flags, "--resume=latest")
        world.barrier()
        assert traces(out) == expected, (name, point)
        summary = json.loads((out / "summary.json").read_text())
        reference = json.loads((whole / "summary.json").read_text())
        for key in ("num_steps", "num_tokens", "loss_first", "loss_last"):
            assert summary[key] == reference[key], key


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(place: Path, name: str):
    """Losses, gradient norms, rates, rows, weights and moments; nothing recorded twice."""
    run_ranks(_goes_on, 2, place, name)


def _said(world, place: Path, out: Path, *flags: str) -> str:
    """What rank 0 prints in a run."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(world, place, out, *COMMON, *flags)
    world.barrier()
    return said.getvalue()


def _evaluations(out: Path) -> list[tuple]:
    lines, names = tiny.lines(out), ("when", "step", "loss", "is_best")
    return [tuple(line[n] for n in names) for line in lines if line.get("event") == "eval"]


def _evaluated_again(world, place: Path) -> None:
    from fsdp_qlora.report import page

    page.write = lambda *_: 1 / 0  # whatever goes wrong with the page, the run is whole
    flags = ("--eval_split=4", "--eval_every=2", "--save_model=true")
    whole = place / "evaluated"
    said = _said(world, place, whole, *flags)
    assert world.rank or "warning   no report.html (division by zero): the result" in said
    expected = _evaluations(whole)
    assert [step for _, step, *_ in expected] == [0, 2, 4, 6, 8]
    lowest = [min(loss for _, step, loss, _ in expected[1:n]) for n in range(2, 6)]
    assert [best for *_, best in expected[1:]] == [
        loss == low for (_, _, loss, _), low in zip(expected[1:], lowest, strict=True)
    ]
    best = (whole / "best" / "evaluation.json").read_bytes()
    for number, text in enumerate((best, b"")):
        out = place / f"evaluated{number}"
        break_off(world, whole, out, 3)  # the best that is kept is of a step that is to come
        if world.rank == 0:
            (out / "best" / "evaluation.json").write_bytes(text)
        world.barrier()
        said = _said(world, place, out, *flags, "--resume=latest")
        assert _evaluations(out) == expected
        assert (out / "best" / "evaluation.json").read_bytes() == best
        assert world.rank or said.count("kept in") == (json.loads(best)["step"] != 8)
        adapters = {(p / "best" / "adapter_model.safetensors").read_bytes() for p in (whole, out)}
        assert len(adapters) == 1


def test_what_a_kill_lets_be_evaluated_again_is_the_best_again(place: Path):
    """Also beside a torn evaluation.json, which once ended every --resume."""
    run_ranks(_evaluated_again, 2, place)


def _changed(world, place: Path) -> None:
    whole, out = place / "planned", place / "changed"
    _said(world, place, whole, "--warmup_steps=0")
    break_off(world, whole, out, 5)
    said = _said(world, place, out, "--warmup_steps=0", "--resume=latest")
    assert "--" not in said.partition("step 6/8")[0] and "resume    learning rate" not in said
    shutil.rmtree(out) if world.rank == 0 else None
    world.barrier()
    break_off(world, whole, out, 5)
    options = {"max_steps": (8, 30), "lr": (0.01, 0.002), "warmup_steps": (0, 0.5)}
    options |= {"lr_scheduler": ("cosine", "linear"), "wd": (0.01, 0.0), "grad_norm": (1.0, 2.0)}
    options |= {"loraplus_ratio": (1.0, 16.0), "apply_gradient_clipping": (True, False)}
    flags = [f"--{name}={new}" for name, (_, new) in options.items()]
    said = _said(world, place, out, *flags, "--resume=latest")
    rates = [[row[2] for row in traces(path, 8)[0]] for path in (whole, out)]  # as they were
    if world.rank == 0:
        for name, (old, new) in options.items():
            assert f"resume    --{name} was {old}, now {new}\n" in said
        jump = (
            f"resume    learning rate: {rates[0][4]:.3g} in step 5, {rates[1][5]:.3g} in the next"
        )
        assert f"{jump} ({rates[0][5]:.3g} without these changes)\n" in said
    with pytest.raises(UserError, match="is already after step 30, and this run has 3"):
        _said(world, place, out, "--max_steps=3", "--resume=latest")


def test_a_run_that_goes_on_otherwise_says_what_changes_and_how_the_rate_jumps(place: Path):
    run_ranks(_changed, 2, place)


def _spoilt(world, step: int, *args) -> str:
    """A run whose weights are NaN after a step; no option may be as large as that takes."""
    show = hooks.reach

    def reach(point: str, *place, **more) -> None:
        show(point, *place, **more)
        if (point, *place[1:]) == ("post-record", step):
            faults.spoil_weights(point, step)

    faults.follow_optimizers()
    hooks.reach = reach
    try:
        return _said(world, *args)
    finally:
        hooks.reach = show


def _not_finite(world, place: Path) -> None:
    last, later = place / "nan-last", place / "nan-later"
    with pytest.raises(UserError, match=r"NaN or infinite after step 1: .* a lower --lr") as caught:
        _spoilt(world, 1, place, last, "--max_steps=1", "--save_model=true")
    assert caught.value.code == RUN_FAILED and not (last / "adapter_model.safetensors").exists()
    _said(world, place, later, "--max_steps=1")
    with pytest.raises(UserError, match="NaN or infinite after step 2"):
        _spoilt(world, 2, place, later, "--max_steps=4", "--resume=latest")
    rule = "step-2: holds weights that are NaN .*; a lower --lr and --resume .*step-1"
    with pytest.raises(UserError, match=rule):
        run(world, place, later, "--resume=latest")


def test_weights_that_are_not_finite_are_called_so_and_never_saved_as_a_result(place: Path):
    """After the last step, before it, and in a checkpoint that shall be resumed."""
    run_ranks(_not_finite, 2, place)
