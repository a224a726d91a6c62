"""Named points of a run: a sign of life at each, and faults made on purpose, to see what follows.

    FSDP_QLORA_FAULT="kind:rank:point[:step]" python -m tests.faults ...    kill:1:post-backward:3

rank is a number, or `all`; without a step the first time counts. It happens once in a process, and
a run that the supervisor has started again is spared; only numbers are spoilt every time.
"""

import contextlib
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import UserError

VARIABLE = "FSDP_QLORA_FAULT"
FACTORS = {"nan": float("nan"), "inf": float("inf")}
OPTIMIZERS: list = []
SLOW_S = 3.0
PASSED_ON_S = 0.3  # by then the supervisor has passed a signal on


def install() -> None:
    """Make the faults that the environment asks for happen in this process and in its ranks."""
    if VARIABLE not in os.environ:
        return
    show = hooks.reach

    def reach(point: str, rank: int, step: int = 0) -> None:
        show(point, rank, step)
        meet(point, rank, step)

    hooks.reach = reach
    if os.environ[VARIABLE].startswith(tuple(FACTORS)):
        _spoil_losses()
    if os.environ[VARIABLE].startswith("spoil"):
        follow_optimizers()


def meet(point: str, rank: int, step: int) -> None:
    """Meet the fault of a point, if one is due."""
    kind = _due(point, rank, step) if VARIABLE in os.environ else ""
    if kind and kind not in FACTORS:
        if kind != "note":
            os.environ.pop(VARIABLE)  # once is enough
        KINDS[kind](point, step)


def _spoil_losses() -> None:
    from fsdp_qlora.training import losses

    whole = losses.token_loss_sum

    def token_loss_sum(*args):
        here = hooks.own_heartbeat()
        is_step = here.point in ("pre-forward", "post-backward")
        kind = _due("post-forward", int(os.environ["RANK"]), here.step) if is_step else ""
        return whole(*args) * FACTORS.get(kind, 1.0)

    losses.token_loss_sum = token_loss_sum


def _due(point: str, rank: int, step: int) -> str:
    """The kind of fault that shall happen here; "" for none."""
    text = os.environ[VARIABLE]
    kind, who, where, at = [*text.split(":"), "", "", "", ""][:4]
    is_known = kind in {*KINDS, *FACTORS} and where in {*hooks.POINTS, "any"}
    if not is_known or not (who in ("all", "both") or who.isdigit()) or not (at + "0").isdigit():
        rule = f"is not kind:rank:point[:step], kinds {', '.join([*KINDS, *FACTORS])}"
        raise UserError(f"{VARIABLE}={text}", rule, f"points are {', '.join(hooks.POINTS)}")
    is_here = where in (point, "any") and who in (str(rank), "all", "both")
    is_now = not at or not step or step == int(at)
    return kind if is_here and is_now and os.environ.get(hooks.RESTARTS, "0") == "0" else ""


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


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let the system refuse what makes a file larger, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def follow_optimizers() -> None:
    """Remember which optimizer has made the last step of this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda optimizer, *_: OPTIMIZERS.append(optimizer))


def spoil_weights(point: str, step: int) -> None:
    """No option may be as large as it takes to make weights of a step NaN and its loss not."""
    OPTIMIZERS[-1].param_groups[0]["params"][0].data.fill_(float("nan"))


KINDS = {
    "exc": _raise,
    "spoil": spoil_weights,
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
    "pause": lambda point, step: (os.write(1, b"pauses\n"), time.sleep(SLOW_S)),
}


if __name__ == "__main__":  # as train.py, its ranks too
    from fsdp_qlora import run
    from fsdp_qlora.distributed import launch

    def start(spec: launch.RankSpec) -> launch.Rank:
        own = (sys.executable, "-m", "tests.faults")
        command = [*own, *spec.command[len(launch.PROGRAM) :]]
        return launch.start(spec._replace(command=command))

    install()
    sys.exit(run.main(sys.argv[1:], start=start))
