"""Whatever kills a run, and wherever: it ends with one line, nobody is left, nothing is lost.

Real ranks, a real model, forked (warm.py). Every kill is followed by `--resume`, and every chain of
kills ends in what the unbroken run has made: losses, weights, moments, adapter, bit for bit.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fsdp_qlora import checkpoint_store, config, run
from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import DONE, RUN_FAILED, SIGINT, SIGTERM
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.training.evaluate import Evaluator
from tests import faults, warm

NUM_STEPS = 6
FAULT = faults.VARIABLE
WHO = ("0", "1", "all")
SIGNED = {"term": (SIGTERM, "SIGTERM"), "int": (SIGINT, "SIGINT")}


def argv_of(place: Path, out: Path, *more: str) -> list[str]:
    """Six steps on two ranks, with dropout and accumulation; a checkpoint after every step."""
    return [
        *(f"--model_name={place / 'model'}", f"--dataset={place / 'data.jsonl'}"),
        *(f"--quant_cache={place / 'cache'}", f"--token_cache={place / 'tokens'}"),
        *("--world_size=2", f"--max_steps={NUM_STEPS}", "--context_length=64", "--lora_rank=4"),
        *("--batch_size=1", "--gradient_accumulation_steps=2", "--lr=0.01", "--save_every=1"),
        *("--eval_samples=4", "--sample_tokens=2", "--lora_dropout=0.1"),
        *(f"--output_dir={out}", *more),
    ]


def go(place: Path, out: Path, *more: str, main=None, **env: str) -> tuple[int, str, str]:
    """Run to the end; exit code, stdout, stderr. Nothing of it is alive then."""
    run = warm.start(argv_of(place, out, *more), place, main, **env)
    code = run.wait()
    assert run.orphans() == []
    return code, run.out, run.err


def digest(path: Path) -> str:
    """Hash of a safetensors file; safetensors writes the metadata in any order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True)
    return hashlib.sha256(header.encode() + content[end:]).hexdigest()


def result(out: Path, num_steps: int = NUM_STEPS) -> dict[str, object]:
    """All that a finished run has come to: by step its numbers, by file its hash."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate", "num_tokens")
    steps = [[float(line[n]).hex() for n in names] for line in lines if "event" not in line]
    held_out = [(e["when"], float(e["loss"]).hex()) for e in lines if e.get("event") == "eval"]
    last = out / "checkpoints" / f"step-{num_steps}"
    files = sorted([*last.glob("*.safetensors"), out / "adapter_model.safetensors"])
    assert len(files) == 3 and len(steps) == num_steps
    hashes = {path.name: digest(path) for path in files}
    return {"steps": steps, "held_out": held_out, **hashes}


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[str, object]:
    """What the run comes to when nothing happens; made twice, else nothing could be compared."""
    found = []
    for name in ("first", "second"):
        code, _, err = go(place, place / name, **{FAULT: "note:0:any"})
        assert code == DONE, err
        found.append(result(place / name))
        if name == "first":
            reached = set(re.findall(r"^reached (\S+)", err, re.MULTILINE))
            assert reached == set(hooks.POINTS), "a point that is never reached proves nothing"
    assert found[0] == found[1], "the run itself is not deterministic"
    return found[0]


def test_deterministic_kernels_leave_the_bits_of_cpu_ranks(place: Path, unbroken: dict):
    """Their kernels are as they are; and no operation of a run is refused."""
    assert go(place, place / "same", "--deterministic=true")[::2] == (DONE, "")
    assert result(place / "same") == unbroken


def steps_kept(out: Path) -> list[int]:
    """The whole checkpoints of a run; the latest is what `--resume` takes."""
    latest = checkpoint_store.latest(out)
    return [] if latest is None else [latest.step]


def kills_at(point: str) -> list[str]:
    """Faults for one chain: the point at steps 3, 4 and 5; those outside the steps as they come."""
    if point == "eval":  # before the first step, and after the last
        return ["kill:0:eval", "kill:0:post-record:3", "kill:1:eval", "kill:all:eval"]
    return [f"kill:{who}:{point}:{step}" for step, who in enumerate(WHO, 3)]


@pytest.mark.parametrize("point", hooks.POINTS)
def test_a_kill_costs_no_bit(place: Path, unbroken: dict[str, object], point: str):
    """18 points x {rank 0, rank 1, both}: code 4, one line, no orphan, the same result."""
    out, is_begun = place / f"kill-{point}", False
    for fault in kills_at(point):
        who, where = fault.split(":")[1:3]
        code, _, err = go(place, out, "--resume=auto", **{FAULT: fault})
        rank = "[01]" if who == "all" else who
        at = r"( at step \d)? \([a-z-]+\)"
        line = rf"error: rank {rank}: was killed by SIGKILL{at}; dmesg [a-z ]+"
        line += f"; continue with --resume {re.escape(str(out))}\n" if steps_kept(out) else "\n"
        assert code == RUN_FAILED and re.fullmatch(line, err), err
        is_begun = is_begun or where not in ("load", "eval")
        assert bool(steps_kept(out)) == is_begun
    assert go(place, out, "--resume=auto")[::2] == (DONE, "")
    assert result(out) == unbroken
    assert [path.name for path in (out / "checkpoints").glob(".*")] == []


def test_a_signal_is_obeyed_after_saving_in_every_phase(place: Path, unbroken: dict[str, object]):
    """Load, first step, middle of accumulation, a step, save, evaluation, export: one line each."""
    out = place / "signals"
    for kind, where, saved in (
        ("term", "load", []),
        ("int", "pre-forward:1", [1]),
        ("term", "post-forward:2", [2]),
        ("int", "post-record:3", [4]),  # about step 3 the ranks had agreed already
        ("term", "save-manifest:5", [5, 6]),  # beside the training
        ("int", "eval", [6]),
        ("term", "export", [6]),
    ):
        code, name = SIGNED[kind]
        said = go(place, out, "--resume=auto", **{FAULT: f"{kind}:0:{where}"})
        kept = steps_kept(out)
        assert said[0] == code and set(kept) <= set(saved) and bool(kept) == bool(saved)
        assert re.fullmatch(f"stopped by {name}[^\n]*\n", said[2]), said[2]
        assert ("continue with --resume" in said[2]) == bool(saved)
    assert go(place, out, "--resume=auto")[::2] == (DONE, "")
    assert result(out) == unbroken


def test_a_second_signal_does_not_wait_for_the_save(place: Path):
    """The disk is slow, the user is not: at once, and the checkpoint before is whole."""
    out = place / "twice"
    run = warm.start(argv_of(place, out), place, **{FAULT: "hang:0:save-fsync:3"})
    limit_s = time.monotonic() + 60
    while not list((out / "checkpoints").glob(".*step-3")):
        assert time.monotonic() < limit_s
        time.sleep(0.01)
    for pause_s in (0.3, 1.5 * hooks.BURST_S, 0.3):  # as the supervisor hears them
        run.signal(signal.SIGTERM)
        time.sleep(pause_s)
    assert run.wait(30) == SIGTERM  # the save would never end
    assert run.orphans() == [] and steps_kept(out) == [2] and run.err.count("\n") == 1


def test_ranks_die_with_a_killed_supervisor_wherever_they_are(
    place: Path, unbroken: dict[str, object]
):
    """kill -9 of train.py, ten times: nobody is left, and the run goes on."""
    out = place / "parents"
    points = ("load", *hooks.STEP_POINTS, "save-before-file", "save-rename", "export")
    for i, point in enumerate(points):
        fault = f"kill-parent:{i % 2}:{point}:{1 + i // 2}"
        run = warm.start(argv_of(place, out, "--resume=auto"), place, **{FAULT: fault})
        assert run.wait() == -signal.SIGKILL
        assert run.left() == [], point
    assert go(place, out, "--resume=auto")[::2] == (DONE, "")
    assert result(out) == unbroken


def test_a_run_that_restarts_itself_comes_to_the_same(place: Path, unbroken: dict[str, object]):
    """A rank dies, one raises, one hangs: --max_restarts goes on from the last checkpoint."""
    for fault, cause in (
        ("kill:1:post-backward:3", "rank 1: was killed by SIGKILL at step 3 (post-backward)"),
        ("exc:1:pre-optimizer:4", "rank 1 at step 4 (pre-optimizer): RuntimeError: fault made on "),
        ("stop:1:post-forward:5", "rank 1: hung at step 5 (post-forward): no sign of life for "),
    ):
        out = place / fault.partition(":")[0]
        more = ("--max_restarts=1", "--hang_timeout=4")
        code, said, err = go(place, out, *more, **{FAULT: fault})
        assert (code, err) == (DONE, ""), err
        step = "[3-6]" if fault[0] == "s" else "[23]"  # a stopped one goes on to write its stacks
        (line,) = [line for line in said.splitlines() if line.startswith("restart ")]
        assert re.match(f"restart   1/1 after step {step}: {re.escape(cause)}", line)
        assert result(out) == unbroken


def killed_before_the_page(argv: list[str], start) -> int:
    """As run.main, whose rank 0 dies between the summary and the page."""
    run._report = lambda place: os.kill(os.getpid(), signal.SIGKILL)
    return run.main(argv, start=start)


def test_already_done_is_said_of_a_whole_result_only(place: Path, unbroken: dict[str, object]):
    """The page that a kill prevented is made; an adapter that is not whole is exported again."""
    out = place / "done"
    page, adapter, step_6 = out / "report.html", out / "adapter_model.safetensors", "6 of 6 steps"
    assert go(place, out, main=killed_before_the_page)[0] == RUN_FAILED and not page.exists()
    code, said, err = go(place, out, "--resume")
    assert (code, err) == (DONE, "") and said.startswith("already done") and page.exists()
    whole = adapter.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], b"", None):
        adapter.unlink()
        if damaged is not None:
            adapter.write_bytes(damaged)
        assert adapter_files.fault(out, config.parse(argv_of(place, out)))
    (place / "mine.toml").write_text(f'resume = "{out}"\n')
    weights = out / "checkpoints" / "step-6" / "weights.safetensors"
    shutil.copytree(out, place / "rotten")
    (place / "rotten" / weights.relative_to(out)).write_bytes(weights.read_bytes()[:-1] + b"?")
    code, said, _ = go(place, out, f"--recipe={place / 'mine.toml'}")
    assert code == DONE and said.startswith(f"resume    {adapter}") and step_6 in said
    assert result(out) == unbroken and adapter.read_bytes() == whole
    code, said, _ = go(place, place / "rotten", "--resume")
    assert code == DONE and "step 6 is passed over" in said and "5 of 6 steps" in said
    adapter.unlink()
    at_5 = f"--resume={out}/checkpoints/step-5"
    err = go(place, out, at_5, **{FAULT: "oom:1:post-forward"})[2]
    assert err.startswith("error: rank 1: out of memory in the backward of step 6 (")
    code, said, _ = go(place, out, at_5)
    assert code == DONE and "5 of 6 steps" in said and result(out) == unbroken


def on_a_full_disk(argv: list[str], start) -> int:
    """As run.main; the disk is full while the best adapter is saved, and from the export on."""
    keep, reach, filler = Evaluator._keep, hooks.reach, Path(os.environ["FILLER"])

    def fill(rank: int) -> None:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while rank == 0:
                file.write(bytes(512))

    def full_keep(self, values) -> None:
        fill(self.trained.world.rank)
        keep(self, values)
        if self.trained.world.rank == 0:
            os.truncate(filler, 0)

    def full_reach(point: str, rank: int, step: int = 0) -> None:
        reach(point, rank, step)
        if point == "export":
            fill(rank)

    Evaluator._keep, hooks.reach = full_keep, full_reach
    return run.main(argv, start=start)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_costs_no_training_and_is_named_in_the_last_line(place: Path, unbroken: dict):
    """A real one, of 4 MiB: at every new best the run goes on, at the export it says how."""
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        out, filler, every = disk / "out", disk / "filler", "--eval_every=2"
        filler.touch()
        code, said, err = go(place, out, every, main=on_a_full_disk, FILLER=str(filler))
        assert "the best adapter so far could not be saved (No space left on device)" in said
        rule = "takes no more (No space left on device); what was trained is saved up to step 6"
        rule += "; make room, then --resume"
        assert (code, err) == (RUN_FAILED, f"error: the disk of {out}: {rule} {out} goes on\n")
        assert not (out / "best").exists() and not (out / checkpoint_store.BEST_DRAFT).exists()
        filler.unlink()
        assert go(place, out, every, "--resume")[::2] == (DONE, "")
        assert result(out) == unbroken | {"held_out": result(out)["held_out"]}
    finally:
        subprocess.run(["umount", disk], check=True)


def on_a_slow_disk(argv: list[str], start) -> int:
    """As run.main; the last checkpoint is a second late."""
    reach = hooks.reach

    def late(point: str, rank: int, step: int = 0) -> None:
        reach(point, rank, step)
        time.sleep(1.0 * (point == "save-mkdir" and step == NUM_STEPS and rank == 0))

    hooks.reach = late
    return run.main(argv, start=start)


def test_nobody_is_told_to_continue_with_weights_that_are_nan(place: Path):
    """Such a checkpoint is refused, so that no restart and no advice leads to it."""
    fault = {FAULT: f"spoil:0:post-record:{NUM_STEPS}"}
    code, said, err = go(place, place / "nan", "--max_restarts=1", main=on_a_slow_disk, **fault)
    assert code == RUN_FAILED and err.count("\n") == 1 and "NaN" in err, said
    assert "continue" not in err and "restart" not in said


def on_two_cards(argv: list[str], start) -> int:
    """As train.main on two cards of 24 GB, whose ranks compute on the CPU (see test_fitting.py)."""
    from fsdp_qlora import arch, config, hardware
    from fsdp_qlora.distributed import launch
    from fsdp_qlora.planning import fit, run

    fit.FALLBACK_SHARE = 0.9999999
    cfg, given = config.parse(argv), config.given(argv)
    machine = hardware.Machine(tuple(hardware.parse_gpus("2x24")), 64, 2)
    plan = run.make(arch.read(cfg.model_name, need_weights=False), cfg, given, machine)
    return launch.supervise(launch.Attempt(cfg, argv, plan, start))


def test_out_of_memory_in_a_step_is_answered_by_a_lower_notch(place: Path, unbroken: dict):
    """From the last checkpoint, with the same rows in every step: equal to rounding."""
    out, fault = place / "short", {FAULT: "oom:1:post-forward:4"}
    code, said, err = go(place, out, "--max_restarts=1", main=on_two_cards, **fault)
    assert (code, err) == (DONE, "")
    (line,) = [line for line in said.splitlines() if line.startswith("restart ")]
    assert re.match(r"restart   1/1 after step [23], a lower setting: --.*: rank 1: out of ", line)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plan"]["notch"] == 1 and summary["is_complete"]
    for mine, theirs in zip(result(out)["steps"], unbroken["steps"], strict=True):
        found, expected = map(float.fromhex, mine[1:2] + theirs[1:2])
        assert found == pytest.approx(expected, rel=2e-2) and mine[0] == theirs[0]
