"""One rank of `doctor`: python -m fsdp_qlora.train.doctor.probe JOB (see jobs.py, which starts it).

A rank writes a JSON line before each task and one for each finding, so that what was found before a
crash or a hang counts.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from fsdp_qlora.distributed.supervise import PR_SET_PDEATHSIG
from fsdp_qlora.errors import DONE, ENVIRONMENT
from fsdp_qlora.model import host
from fsdp_qlora.train.doctor import device as one
from fsdp_qlora.train.doctor import together
from fsdp_qlora.train.doctor.findings import Finding, problem, softly, warning
from fsdp_qlora.train.doctor.together import NO_P2P, Rank
from fsdp_qlora.training.memory import GIB, machine_memory


@dataclass(frozen=True)
class Task:
    """A row of TASKS.

    Attributes:
        look: gives findings.
        code: exit code when it cannot be done.
        remedy: what to do then.
        is_common: all ranks take part; others look at the rank's own device.
    """

    look: Callable[[Rank], Iterator[Finding]]
    code: int = DONE
    remedy: str = "see the message; other checks go on"
    is_common: bool = False


def four_bit(rank: Rank) -> Iterator[Finding]:
    """Every 4-bit format that can be had, on this rank's device.

    Args:
        rank: this one.
    """
    for name in ("nf4_dq", "fp4", "hqq4"):
        code = DONE if name == "hqq4" else ENVIRONMENT
        title, remedy = f"{one.label(rank.device)} {name}", "reinstall bitsandbytes, or hqq"
        yield from softly(title, partial(one.four_bit, rank.device, name), remedy, code)


def kernels(rank: Rank) -> Iterator[Finding]:
    """flash-attn and Liger, where they are installed; both are used on cards only.

    Args:
        rank: this one.
    """
    if rank.device.type == "cuda":
        yield from one.flash_attention(rank.device)
        yield from one.liger(rank.device)


def speed(rank: Rank) -> Iterator[Finding]:
    """Products and memory of this rank's device; a CPU with all its cores.

    Args:
        rank: this one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, look in (("product", one.products), ("memory", one.bandwidth)):
        title = f"{one.label(rank.device)} {name}"
        yield from softly(title, partial(look, rank.device), "end other programs")
    torch.set_num_threads(num_threads)


def pin(rank: Rank) -> Iterator[Finding]:
    """Pin 1 GiB, measure the links to the host, then copies between the cards.

    Args:
        rank: this one; without a world it measures alone.
    """
    if rank.device.type == "cpu":
        return
    name = f"{one.label(rank.device)} pinning"
    free_gib = machine_memory()["host_available_gib"] or 0.0
    taken: list[tuple[host.HostBytes, float]] = []

    def take() -> Iterator[Finding]:
        if free_gib < 2 * rank.size * one.PIN_BYTES / GIB:
            yield warning(name, f"not tried: {free_gib:.1f} GiB are free", "end other programs")
            return
        began_s = time.perf_counter()
        memory = host.private(one.PIN_BYTES, pin=True)
        taken.append((memory, time.perf_counter() - began_s))

    yield from softly(name, take, "raise the limit (ulimit -l unlimited)", ENVIRONMENT)
    is_done = bool(taken)
    if all(rank.world.gather_objects(is_done) if rank.world else [is_done]):
        in_step = rank.world.barrier if rank.world else lambda: None
        yield from one.host_links(rank.device, *taken[0], in_step)


TASKS: dict[str, Task] = {
    "card": Task(lambda rank: one.describe(rank.device), ENVIRONMENT, "repair the driver"),
    "four_bit": Task(four_bit),
    "kernels": Task(kernels),
    "speed": Task(speed),
    "join": Task(together.join, ENVIRONMENT, NO_P2P, is_common=True),
    "pin": Task(pin),
    "shared": Task(together.shared, is_common=True),
    "gather": Task(together.gather, remedy=NO_P2P, is_common=True),
    "bytes": Task(together.exact_bytes, ENVIRONMENT, NO_P2P, is_common=True),
    "peers": Task(lambda rank: one.peer_copies(rank.device), remedy=NO_P2P),
}


def perform(rank: Rank, name: str) -> list[Finding]:
    """Do one task; its failure is a finding.

    Args:
        rank: this one.
        name: row of TASKS.
    """
    task = TASKS[name]
    if not task.is_common and rank.device.type == "cpu" and rank.number:
        return []  # the ranks share the CPU: the first one looks at it
    title = f"{rank.title if task.is_common else one.label(rank.device)} {name}"
    if task.is_common and rank.world is None and name != "join":
        return [warning(title, "not checked: the ranks have not met", "see above")]
    return softly(title, lambda: task.look(rank), task.remedy, task.code)


def missing_cards(size: int) -> list[Finding]:
    """What is wrong when torch sees fewer cards than the driver lists.

    Args:
        size: cards the driver lists.
    """
    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num >= size:
        return []
    remedy = f"update the driver: this torch needs one for CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        remedy = "this build of torch is for the CPU: pip install --force-reinstall torch"
    value = f"the driver lists {size}, torch {torch.__version__} sees {num}"
    return [problem("cards", value, remedy, ENVIRONMENT)]


def main(argv: list[str]) -> None:
    """Do all tasks of a job as the rank that the environment names, then leave at once.

    Args:
        argv: the job, as JSON: directory, tasks, device, flip.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    job = json.loads(argv[0])
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    with (Path(job["directory"]) / f"rank{number}.jsonl").open("w") as out:
        if job["device"] == "cuda":
            if absent := missing_cards(size):
                _write(out, *([] if number else absent), {"task": None})
                os._exit(DONE)
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        flip = None if job["flip"] is None else tuple(job["flip"])
        rank = Rank(number, size, device, flip)
        for name in job["tasks"]:
            _write(out, {"task": name})
            _write(out, *perform(rank, name))
        _write(out, {"task": None})
    os._exit(DONE)  # a peer may hold the group


def _write(out: TextIO, *entries: Finding | dict[str, Any]) -> None:
    for entry in entries:
        row = dataclasses.asdict(entry) if isinstance(entry, Finding) else entry
        out.write(json.dumps(row) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
