"""One process per GPU: start the ranks, watch over them, end them together, say what went wrong."""

import ctypes
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fsdp_qlora import host_memory
from fsdp_qlora.config import PROJECT_DIR, Config
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, INTEGRITY, RUN_FAILED, UserError
from fsdp_qlora.plan import run as plans
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.train import failure
from fsdp_qlora.train.failure import LOGS
from fsdp_qlora.train.ranks import child_env, find_port, plan_ranks
from fsdp_qlora.train.ranks import is_rank as is_rank
from fsdp_qlora.train.ranks import is_supervised as is_supervised
from fsdp_qlora.train.ranks import rank_env as rank_env

if TYPE_CHECKING:
    from fsdp_qlora.train.world import World

GRACE_S = 4.0
STOP_GRACE_S = 10.0
POLL_S = 0.05
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTERMATH = (signal.SIGABRT, signal.SIGTERM)
OWN_FAULTS = (INPUT, ENVIRONMENT, INTEGRITY)
RUN_FILES = ("run_config.json", "metrics.jsonl", "summary.json", "report.svg", f"{LOGS}/rank*.*")


def claim_output_dir(cfg: Config) -> Path:
    """Make the output directory ready for a new run; one process does this, before any writes.

    Args:
        cfg: the run.

    Returns:
        The directory, with an empty `logs` in it and no records of an earlier run.

    Raises:
        UserError: it holds files and `overwrite` is false, or it cannot be written to.
    """
    path = cfg.resolved_output_dir
    try:
        if path.is_dir() and any(path.iterdir()) and not cfg.overwrite:
            remedy = "give another --output_dir, or --overwrite true"
            raise UserError(f"--output_dir {path}", "holds files already", remedy)
        (path / LOGS).mkdir(parents=True, exist_ok=True)
        for old in [found for pattern in RUN_FILES for found in path.glob(pattern)]:
            old.unlink()
        probe = path / LOGS / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise UserError(f"--output_dir {path}", reason, "give another", ENVIRONMENT) from error
    return path


def agree(cfg: Config, world: "World") -> Config:
    """Settle on one output directory among the ranks of torchrun or srun, and claim it.

    Each of them has read the command line by itself, so their default directories may bear
    different times: that of rank 0 counts. Under `supervise` this is done already.

    Args:
        cfg: the run as this rank has read it.
        world: the ranks; all of them must call.

    Returns:
        The run as all ranks see it; its output directory exists, with `logs` in it.

    Raises:
        UserError: rank 0 could not claim the directory; raised on every rank.
    """
    if is_supervised(os.environ):
        return cfg
    word: str | UserError | None = cfg.output_dir
    if world.rank == 0:
        try:
            claim_output_dir(cfg)
        except UserError as fault:
            word = fault
    first = world.gather_objects(word)[0]
    if isinstance(first, UserError):
        raise first
    agreed = dataclasses.replace(cfg, output_dir=first)
    (agreed.resolved_output_dir / LOGS).mkdir(parents=True, exist_ok=True)  # on other machines
    return agreed


def supervise(
    cfg: Config,
    argv: Sequence[str],
    script: str | os.PathLike[str] = PROJECT_DIR / "train.py",
    plan: RunPlan | None = None,
) -> int:
    """Run a script once per rank and wait for all of them.

    Rank 0 keeps this terminal; the others write to `logs/rankN.log`. When a rank fails, the others
    are ended within 5 seconds. When one runs out of memory before the training has begun and the
    plan knows a setting that needs less, all of them are started again with that.
    SIGINT and SIGTERM are passed on once; a second one ends all ranks,
    and so do 10 seconds after the first rank has obeyed: the others may wait for it on the card.
    Ranks do not outlive this process, however it dies.

    Args:
        cfg: the run.
        argv: arguments of every rank.
        script: Python file that every rank runs.
        plan: of the run.

    Returns:
        Exit code of the command: 0 when all ranks ended with 0; the code a failed rank left with
        `write_error`; 4 when a rank was killed; 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: the ranks cannot be started.
    """
    num_ranks = plan_ranks(cfg) if plan is None else plan.machine.num_ranks
    port = find_port(cfg.master_port)
    output_dir = claim_output_dir(cfg)
    command = [sys.executable, os.fspath(script), *argv, f"--output_dir={output_dir}"]
    cgroup = host_memory.find_cgroup()
    num_kills = host_memory.oom_kills(cgroup)
    while True:
        told = {**os.environ, **(plan.env if plan is not None else {})}
        envs = [child_env(told, rank, num_ranks, port) for rank in range(num_ranks)]
        codes, ended, stop = _run(command, envs, output_dir)
        lower = _step_down(plan, output_dir, stop) if any(codes) else None
        if lower is None:
            num_kills = host_memory.oom_kills(cgroup) - num_kills
            return _conclude(codes, ended, stop, output_dir, num_kills, plan)
        plan, port = lower, find_port(cfg.master_port)


def _run(
    command: list[str], envs: Sequence[dict[str, str]], output_dir: Path
) -> tuple[list[int], frozenset[int], int | None]:
    """Start all ranks and wait; return their exit codes and what `_watch` says."""
    with ExitStack() as stack:
        stops = stack.enter_context(_caught_signals())
        ranks: list[subprocess.Popen] = []
        stack.callback(_kill, ranks)
        for rank, env in enumerate(envs):
            ranks.append(_start(command, env, output_dir / LOGS / f"rank{rank}.log", rank))
        ended, stop = _watch(ranks, stops)
    return [rank.returncode for rank in ranks], ended, stop


def _step_down(plan: RunPlan | None, output_dir: Path, stop: int | None) -> RunPlan | None:
    """The next lower setting, if that is the answer to what ended the ranks; says so."""
    lower = plan.lower if plan is not None else None
    short = [error for error in failure.read_errors(output_dir) if error.is_memory]
    if plan is None or lower is None or stop is not None or not short:
        return None
    if failure.has_begun(output_dir):
        return None
    failure.clear_errors(output_dir)
    place = short[0].line.partition(" (")[0]
    flags = plans.flags_of(plan.cfg, lower.cfg)
    print(f"memory    {place}; nothing is lost, a notch lower: {flags}", flush=True)
    return lower


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them."""
    stops: list[int] = []
    before = {
        number: signal.signal(number, lambda caught, _: stops.append(caught))
        for number in STOP_SIGNALS
    }
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: list[str], env: dict[str, str], log: Path, rank: int) -> subprocess.Popen:
    """Start one rank in a session of its own, so that Ctrl-C reaches only the supervisor."""
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if rank else None
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_tied_to_parent(),
        )


def _tied_to_parent() -> Callable[[], None] | None:
    """Return what a child runs before its program, so that it is killed when we die."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(RUN_FAILED)

    return tie


def _watch(
    ranks: Sequence[subprocess.Popen], stops: Sequence[int]
) -> tuple[frozenset[int], int | None]:
    """Wait for all ranks.

    Returns:
        The numbers of the ranks that had to be ended, and the signal that stopped the run before
        any rank failed.
    """
    ended: frozenset[int] = frozenset()
    stop: int | None = None
    num_passed, deadline_s = 0, math.inf
    while None in [rank.poll() for rank in ranks]:
        if num_passed < len(stops):
            _send(ranks, stops[0] if num_passed == 0 else signal.SIGKILL)
            num_passed = len(stops)
            stop = stop if ended else stops[0]
        orderly = {None, DONE, *(128 + number for number in stops)}
        if not ended and any(rank.returncode not in orderly for rank in ranks):
            ended = frozenset(i for i, rank in enumerate(ranks) if rank.returncode is None)
            deadline_s = time.monotonic() + GRACE_S
            _send(ranks, signal.SIGTERM)
        elif num_passed and any(rank.returncode is not None for rank in ranks):
            deadline_s = min(deadline_s, time.monotonic() + STOP_GRACE_S)
        if time.monotonic() > deadline_s:
            _send(ranks, signal.SIGKILL)
        time.sleep(POLL_S)
    return ended, stop


def _send(ranks: Sequence[subprocess.Popen], number: int) -> None:
    """Signal every running rank; SIGKILL also reaches the processes it has started."""
    for rank in ranks:
        if rank.poll() is None and number == signal.SIGKILL:
            os.killpg(rank.pid, number)
        elif rank.returncode is None:
            rank.send_signal(number)


def _kill(ranks: Sequence[subprocess.Popen]) -> None:
    """Leave no rank behind."""
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _conclude(
    codes: Sequence[int],
    ended: frozenset[int],
    stop: int | None,
    output_dir: Path,
    num_kills: int,
    plan: RunPlan | None,
) -> int:
    """Print the line that says why the run ended, if it failed, and return its exit code.

    Where memory was short, a few lines follow that say where it went.
    """
    if not any(codes):
        return DONE
    if stop is not None:
        name = signal.Signals(stop).name
        print(f"stopped by {name}; what was recorded is in {output_dir}", file=sys.stderr)
        return 128 + stop
    errors = failure.read_errors(output_dir)
    failed = [rank for rank, code in enumerate(codes) if code and rank not in ended]
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    causes = [e for e in errors if e.code in OWN_FAULTS] or ([] if sudden else errors)
    rank = (sudden or failed)[0]
    lines = failure.killed(rank, codes[rank], output_dir, num_kills, plan)
    if causes:
        lines = failure.told(causes[0], plan)
    for line in lines:
        print(line, file=sys.stderr)
    return causes[0].code if causes else max(codes[rank], 0) or RUN_FAILED
