"""Starting ranks that may crash or hang, and collecting what they have found."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed.env import child_env, find_port
from fsdp_qlora.errors import ENVIRONMENT
from fsdp_qlora.train.doctor.findings import Finding, problem

PROGRAM = "fsdp_qlora.train.doctor.probe"
GRACE_S = 10.0  # for the other ranks, once one has crashed
POLL_S = 0.05


@dataclass(frozen=True)
class Job:
    """What ranks are to do.

    Attributes:
        device: "cuda", a card each, or "cpu".
        size: number of ranks.
        tasks: rows of probe.TASKS, in order.
        timeout_s: for all of them.
        flip: see together.Rank.
    """

    device: str
    size: int
    tasks: tuple[str, ...]
    timeout_s: float
    flip: tuple[int, int, int] | None = None


def run(job: Job, env: Mapping[str, str]) -> list[Finding]:
    """Do a job; a rank that crashes or hangs is a finding.

    Args:
        job: what to do.
        env: environment of the ranks, less their places.

    Returns:
        What all ranks found, in the order of the tasks; the same is told once.
    """
    hidden = {} if job.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    found: list[tuple[int, Finding]] = []
    with tempfile.TemporaryDirectory(prefix="fsdp_qlora-doctor-") as place, ExitStack() as stack:
        directory, port = Path(place), find_port(None)
        text = json.dumps(
            {"directory": place, "device": job.device, "tasks": job.tasks, "flip": job.flip}
        )
        ranks: list[subprocess.Popen] = []
        stack.callback(_kill, ranks)
        for number in range(job.size):
            log = stack.enter_context((directory / f"rank{number}.log").open("wb"))
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", PROGRAM, text],
                    cwd=PROJECT_DIR,
                    env=child_env({**env, **hidden}, number, job.size, port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        _wait(ranks, job.timeout_s)
        for number, rank in enumerate(ranks):
            found += _collect(directory, number, rank.poll(), job)
    found.sort(key=lambda entry: entry[0])
    return list({finding.line(): finding for _, finding in found}.values())


def _wait(ranks: list[subprocess.Popen], timeout_s: float) -> None:
    """Until all have ended, the time is over, or the others wait in vain for one that crashed."""
    deadline_s, has_crashed = time.monotonic() + timeout_s, False
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline_s:
        if any(codes) and not has_crashed:
            has_crashed = True
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)


def _kill(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _collect(directory: Path, number: int, code: int | None, job: Job) -> list[tuple[int, Finding]]:
    """(index of the task, finding) of a rank, and what ended it before its time."""
    rows: list[dict[str, Any]] = []
    path = directory / f"rank{number}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # cut off by a crash
            rows.append(json.loads(line))
    found: list[tuple[int, Finding]] = []
    task: str | None = "start"
    index = 0
    for row in rows:
        if "task" in row:
            task = row["task"]
            index = job.tasks.index(task) if task in job.tasks else index
        else:
            found.append((index, Finding(**row)))
    if task is None:
        return found
    log = (directory / f"rank{number}.log").read_text(errors="replace").strip().splitlines()
    value = "no answer in time" if code is None else _ended(code)
    value += f" ({log[-1][:160]})" if log else ""
    rest = job.tasks[job.tasks.index(task) + 1 :] if task in job.tasks else job.tasks
    value += f"; not checked: {', '.join(rest)}" if rest else ""
    who = "card" if job.device == "cuda" else "CPU rank"
    remedy = "see pytorch.org for a build that runs here"
    if task != "start":
        remedy = "export NCCL_P2P_DISABLE=1, or see the driver's log (dmesg)"
    finding = problem(f"{who} {number} {task}", value, remedy, ENVIRONMENT)
    return [*found, (index, finding)]


def _ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
