"""Memory that runs out: said in a few lines, answered by a lower setting (exit_report.py)."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import exit_report, hooks
from fsdp_qlora.distributed.exit_report import RankError, RanksExit
from fsdp_qlora.distributed.hooks import Heartbeat
from fsdp_qlora.errors import BUG, INPUT, RUN_FAILED, UserError, is_memory
from fsdp_qlora.hardware import Machine
from fsdp_qlora.planning import run
from tests.distributed.test_launch import RANK, START

PARENT = f"""{START}
from fsdp_qlora import arch, hardware
from fsdp_qlora.config import given
from fsdp_qlora.planning import run
info = arch.read("llama-2-7b", need_weights=False)
machine = hardware.Machine(tuple(hardware.parse_gpus("2x24")), 64, 2)
plan = run.make(info, parse(argv), given(argv), machine)
sys.exit(launch.supervise(launch.Attempt(parse(argv), argv, plan, start)))
"""
SHORT = """
from fsdp_qlora.planning.run import fallback_of
meet()
notch = fallback_of(os.environ)
(out / f"tried{rank}.{notch}").touch()
if rank == 1 and notch < NOTCHES:
    words = "rank 1: out of memory in the memory probe (no room); see"
    write_error(out, 1, 4, words, ["there  5"], "memory")
    sys.exit(4)
"""


def plan_of(names: str) -> run.RunPlan:
    """A 7B, 4 x 2048."""
    argv = ["--model_name=llama-2-7b", "--batch_size=4", "--context_length=2048"]
    info = arch.read("llama-2-7b", need_weights=False)
    machine = Machine(tuple(hardware.parse_gpus(names)), 64, 2)
    return run.make(info, config.parse(argv), frozenset({"batch_size"}), machine)


def supervised(tmp_path: Path, body: str, *argv: str, enter: str = "") -> tuple[int, str, str]:
    """Run two tiny ranks under a supervisor that has a plan; code and both streams."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(project=str(PROJECT_DIR), body=body))
    command = [sys.executable, "-c", PARENT, str(script), "--world_size=2", "--batch_size=4"]
    command += ["--context_length=2048", f"--output_dir={tmp_path / 'out'}", *argv]
    if enter:
        command = ["sh", "-c", f'{enter} && exec "$@"', "sh", *command]
    env = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=PROJECT_DIR, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_ranks_short_of_memory_before_the_training_start_again_a_notch_lower(tmp_path: Path):
    """One line for each notch, with the options that differ; then all is well."""
    code, out, err = supervised(tmp_path, SHORT.replace("NOTCHES", "2"))
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 2)
    for line in lines:
        start = "memory    rank 1: out of memory in the memory probe; nothing is lost, "
        assert line.startswith(f"{start}a lower setting: --")
    assert len(set(lines)) == 2
    tried = {path.name for path in (tmp_path / "out").glob("tried*")}
    assert tried >= {"tried0.2", *(f"tried1.{notch}" for notch in range(3))}
    assert exit_report.read_errors(tmp_path / "out") == []


def test_without_a_lower_notch_the_lines_of_the_rank_and_advice_end_the_run(tmp_path: Path):
    """Everything was given: no other setting is tried."""
    given = ["--use_cpu_offload=true", "--use_gradient_checkpointing=true"]
    code, out, err = supervised(tmp_path, SHORT.replace("NOTCHES", "99"), *given)
    assert (code, out) == (RUN_FAILED, "")
    first, second, third = err.splitlines()
    assert first == "error: rank 1: out of memory in the memory probe (no room); see"
    assert second == "there  5" and third.startswith("next      --batch_size ")


def test_once_the_training_has_begun_nothing_starts_again(tmp_path: Path):
    """Steps would be lost."""
    body = "hooks.reach('pre-forward', rank, 1)\n" + SHORT.replace("NOTCHES", "1")
    code, out, err = supervised(tmp_path, body)
    assert (code, out) == (RUN_FAILED, "") and err.startswith("error: rank 1: out of memory")


def test_a_rank_that_the_kernel_killed_for_want_of_memory_is_told_apart(
    tmp_path: Path, memory_group: Path
):
    """A real limit, a real kill: exit signal and the group's own count."""
    body = "meet()\nheld = []\nwhile rank == 1: held.append(bytearray(2**22))\ntime.sleep(30)"
    code, out, err = supervised(tmp_path, body, enter=f"echo $$ > {memory_group}/cgroup.procs")
    first, *rest = err.splitlines()
    assert (code, out) == (RUN_FAILED, "")
    assert first.startswith("error: rank 1: was killed by the kernel (SIGKILL): host memory ran ")
    assert "in the load; " in first and len(first) <= 300
    assert rest[0].startswith("predicted ") and "GiB on the host in the load" in rest[0]
    assert rest[1] == "there     0.29 GiB may be used here"
    assert rest[2].startswith("largest   ") and rest[3].startswith("next      ")
    assert len(err.splitlines()) <= exit_report.MAX_LINES


def test_short_of_addresses_the_limit_is_named(tmp_path: Path):
    """ulimit -v, from which no fewer ranks help: an error of the rank, and a sudden end."""
    fail = (
        "import mmap\nfrom fsdp_qlora.config import parse\nmeet()\ntry:\n    mmap.mmap(-1, 2**33)\n"
    )
    fail += "except OSError as error:\n    exit_report.fail(error, parse(sys.argv[1:]))"
    for body in (fail, "os.abort()"):
        code, _, err = supervised(tmp_path, body, "--overwrite=true", enter="ulimit -v 4000000")
        assert code == RUN_FAILED and "ulimit -v leaves a process 3.81 GiB" in err, err
        assert "Cannot allocate memory" in err or "SIGABRT" in err, err


def test_the_last_record_says_what_was_there(tmp_path: Path):
    """A line that was not written to its end is left out; the rows are those measured."""
    rows = {"packed layers": 3.25, "processes": 4.0, "data": 0.5}
    lines = [{"event": "run"}, {"step": 7, "host": {"host_used_gib": 9.5, "host_rows": rows}}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "ho'
    (tmp_path / "metrics.jsonl").write_text(text)
    ending, plan = RanksExit((0, -9), (Heartbeat(1.0, 7, hooks.DONE),) * 2), plan_of("2x12")
    said = exit_report.diagnose_exit(ending, tmp_path, "", 1, plan).lines
    assert "training; 7 steps are recorded" in said[0]
    assert "9.50 in use at the last record" in said[2]
    assert re.search(r"processes 4\.00 \(predicted \d\.\d\d\), packed layers 3\.25", said[3])
    assert 4 <= len(said) <= exit_report.MAX_LINES
    (only,) = exit_report.diagnose_exit(
        ending, tmp_path, "go on", 0, plan
    ).lines  # nobody counted a kill
    remedy = "dmesg tells whether host memory ran out; go on"
    assert only == f"error: rank 1: was killed by SIGKILL at step 7 (done); {remedy}"


def test_of_a_long_line_the_cause_is_cut_and_the_way_on_stays(tmp_path: Path):
    (tmp_path / exit_report.LOGS).mkdir()
    trace, way_on, more = f"the trace is in {tmp_path}", f"continue with {tmp_path}", ["there  5"]
    line = f"rank 1: {'long ' * 80}; {trace}"
    exit_report.write_error(tmp_path, RankError(1, RUN_FAILED, line, more))
    ending = RanksExit((0, RUN_FAILED), (Heartbeat(1.0, 7, hooks.DONE),) * 2)
    first, *rest = exit_report.diagnose_exit(ending, tmp_path, way_on, 0, None).lines
    assert first.startswith("error: rank 1: long ") and first.endswith(f"; {trace}; {way_on}")
    assert rest == more and len(first) <= 300


def test_errors_for_want_of_memory_are_known_by_type_or_text():
    """Of torch, of Python, of the CPU allocator, of a library; and no others."""
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    text = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    for error in (
        out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(text),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
    ):
        assert is_memory(error), error
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")):
        assert not is_memory(other), other


def test_a_scene_is_a_few_lines_with_the_largest_rows_first():
    """Predicted and measured side by side."""
    predicted = {"forward": {"kept": 3.0, "packed": 2.0}, "backward": {"kept": 9.0, "packed": 2.0}}
    measured = {"packed": 2.0, "kept": 4.0}
    there = "24 GiB on the GPU"
    assert exit_report.compare_memory("a GPU", "forward", predicted, measured, there) == [
        "predicted 5.00 GiB on a GPU in the forward; at the peak (backward) 11.00",
        "there     24 GiB on the GPU",
        "largest   kept 4.00 (predicted 3.00), packed 2.00 (predicted 2.00) GiB",
    ]
    bare = exit_report.compare_memory("the host", "load", {}, {"packed": 1.0}, "no more")
    assert [line.split()[0] for line in bare] == ["there", "largest"]


def test_an_explained_error_is_told_with_its_scene_and_any_other_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a rank leaves behind: as `fail` writes it, without ending this process."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("FSDP_QLORA_SUPERVISOR", "1")
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    (tmp_path / "logs").mkdir()
    cfg = config.parse([f"--output_dir={tmp_path}"])
    short = MemoryError("no room\nfor it")
    for note in ("out of memory in the load", "there     5 GiB"):
        short.add_note(note)
    cuda = RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")
    bad = UserError("x", "is bad", "take y", INPUT)
    for error in (short, LookupError("where?"), bad, cuda, exit_report.LinkError("no answer")):
        exit_report.fail(error, cfg)
        (found,) = exit_report.read_errors(tmp_path)
        exit_report.clear_errors(tmp_path)
        log = tmp_path / "logs" / "rank2.log"
        if error is short:
            line = f"rank 2: out of memory in the load (no room); the trace is in {log}"
            assert (found.line, list(found.more)) == (line, ["there     5 GiB"])
            assert "MemoryError: no room" in log.read_text()
        else:
            kind = exit_report.LINK if isinstance(error, exit_report.LinkError) else ""
            assert (list(found.more), found.kind) == ([], kind)
        if error is cuda:
            line = "rank 2: RuntimeError: CUDA error: unspecified launch failure; the trace is in "
            assert found.line.startswith(line) and "; dmesg (lines with Xid)" in found.line
    assert codes == [RUN_FAILED, BUG, INPUT, RUN_FAILED, RUN_FAILED]


def test_words_of_a_rank_survive_the_file(tmp_path: Path):
    """Lines, not only one; line breaks and terminal codes escaped; the first failure first."""
    exit_report.write_error(tmp_path, RankError(3, 4, "a\nb", ["c\x1b[31m", "d"], "memory"))
    time.sleep(0.02)
    exit_report.write_error(tmp_path, RankError(0, 1, "e"))
    found, second = exit_report.read_errors(tmp_path)
    assert second == RankError(0, 1, "e", [])
    assert (found.rank, found.code, found.line, found.kind) == (3, 4, "a\\nb", "memory")
    assert list(found.more) == ["c\\x1b[31m", "d"]
    lines = exit_report.error_lines(found, plan_of("2x24"))
    assert lines[0] == "error: a\\nb" and lines[-1].startswith("next      --")
    exit_report.clear_errors(tmp_path)
    assert exit_report.read_errors(tmp_path) == exit_report.read_errors(tmp_path / "no") == []
