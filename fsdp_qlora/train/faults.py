"""Named points of a run: a sign of life at each, and faults made on purpose, to see what follows.

    FSDP_QLORA_FAULT="kind:rank:point[:step]" python train.py ...        kill:1:post-backward:3

rank is a number, or `all`; without a step the first time counts. It happens once in a process, and
a run that the supervisor has started again is spared; only numbers are spoilt every time.
"""

import errno
import os
import signal
import time
from typing import NoReturn

from fsdp_qlora.errors import UserError
from fsdp_qlora.train import heartbeat

VARIABLE = "FSDP_QLORA_FAULT"
RESTARTS = "FSDP_QLORA_RESTARTS"  # how often the supervisor has started the ranks again
STEP_POINTS = (
    "pre-forward",
    "post-forward",
    "post-backward",
    "pre-optimizer",
    "post-optimizer",
    "post-record",
)
SAVE_POINTS = (
    "save-mkdir",
    "save-before-file",
    "save-after-file",
    "save-manifest",
    "save-fsync",
    "save-rename",
    "save-dir-fsync",
    "prune-before",
    "prune-after",
)
POINTS = ("load", *STEP_POINTS, *SAVE_POINTS, "eval", "export")
FACTORS = {"nan": float("nan"), "inf": float("inf")}
SLOW_S = 3.0
PASSED_ON_S = 0.3  # by then the supervisor has passed a signal on


def reach(point: str, rank: int, step: int = 0) -> None:
    """Be at a named point of the run: show it, and meet the fault that was asked for, if any.

    A rank that has no part in a point (only one writes files) reaches it all the same, before it
    waits for the others.

    Args:
        point: one of POINTS.
        rank: of the caller.
        step: optimizer step, from 1; 0 where there is none.

    Raises:
        UserError: the variable cannot be read.
    """
    heartbeat.beat(point, rank, step)
    if VARIABLE not in os.environ:
        return
    kind = _due(point, rank, step)
    if kind and kind not in FACTORS:
        if kind != "note":
            os.environ.pop(VARIABLE)  # once is enough
        KINDS[kind](point, step)


def factor(point: str, rank: int, step: int = 0) -> float:
    """Return what a number has to be multiplied with at a named point: 1, or NaN or infinity.

    Args:
        point: one of POINTS.
        rank: of the caller.
        step: optimizer step, from 1.

    Raises:
        UserError: the variable cannot be read.
    """
    return FACTORS.get(_due(point, rank, step), 1.0) if VARIABLE in os.environ else 1.0


def _due(point: str, rank: int, step: int) -> str:
    """The kind of fault that shall happen here; "" for none."""
    text = os.environ[VARIABLE]
    kind, who, where, at = [*text.split(":"), "", "", "", ""][:4]
    is_known = kind in {*KINDS, *FACTORS} and where in {*POINTS, "any"}
    if not is_known or not (who in ("all", "both") or who.isdigit()) or not (at + "0").isdigit():
        rule = f"is not kind:rank:point[:step], kinds {', '.join([*KINDS, *FACTORS])}"
        raise UserError(f"{VARIABLE}={text}", rule, f"points are {', '.join(POINTS)}")
    is_here = where in (point, "any") and who in (str(rank), "all", "both")
    is_now = not at or not step or step == int(at)
    return kind if is_here and is_now and os.environ.get(RESTARTS, "0") == "0" else ""


def _raise(point: str, step: int) -> NoReturn:
    raise RuntimeError(f"fault made on purpose at {point}, step {step}")


def _cuda_error(point: str, step: int) -> NoReturn:
    raise RuntimeError(f"CUDA error: unspecified launch failure (made on purpose at {point})")


def _out_of_memory(point: str, step: int) -> NoReturn:
    import torch

    raise torch.OutOfMemoryError(f"CUDA out of memory (made on purpose at {point})")


def _disk_full(point: str, step: int) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)


def _hang(point: str, step: int) -> NoReturn:
    while True:
        time.sleep(3600)


def _signal_me(number: int) -> None:
    os.kill(os.getpid(), number)


def _signal_parent(number: int) -> None:
    os.kill(os.getppid(), number)
    time.sleep(PASSED_ON_S)


def _note(point: str, step: int) -> None:
    os.write(2, f"reached {point} {step}\n".encode())  # at once: another thread may write too


KINDS = {
    "exc": _raise,
    "cuda": _cuda_error,
    "oom": _out_of_memory,
    "enospc": _disk_full,
    "hang": _hang,
    "slow": lambda point, step: time.sleep(SLOW_S),
    "exit0": lambda point, step: os._exit(0),
    "kill": lambda point, step: _signal_me(signal.SIGKILL),
    "stop": lambda point, step: _signal_me(signal.SIGSTOP),
    "term": lambda point, step: _signal_parent(signal.SIGTERM),  # as a scheduler ends a job
    "int": lambda point, step: _signal_parent(signal.SIGINT),
    "kill-parent": lambda point, step: _signal_parent(signal.SIGKILL),
    "note": _note,
}
