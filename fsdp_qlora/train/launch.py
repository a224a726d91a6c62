"""One process per GPU: start the ranks, watch over them, end them together, say what went wrong."""

import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fsdp_qlora.config import PROJECT_DIR, Config
from fsdp_qlora.errors import (
    DONE,
    ENVIRONMENT,
    INPUT,
    INTEGRITY,
    RUN_FAILED,
    UserError,
    classify,
    one_line,
)
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
LOGS = "logs"
RUN_FILES = ("run_config.json", "metrics.jsonl", "summary.json", "report.svg", f"{LOGS}/rank*.*")


@dataclasses.dataclass(frozen=True)
class RankError:
    """What a rank left behind when it failed.

    Args:
        rank: global rank.
        code: exit code of the command.
        line: what the user is told.
    """

    rank: int
    code: int
    line: str


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


def fail(error: Exception, cfg: Config) -> NoReturn:
    """Leave word of what ended this rank, then leave.

    The word goes to the supervisor, or to the terminal without one; the trace of what is no
    UserError goes to the log of the rank, or to the terminal where there is no log.

    Args:
        error: what ended the rank.
        cfg: the run.
    """
    rank, logs = int(os.environ["RANK"]), cfg.resolved_output_dir / LOGS
    if isinstance(error, UserError):
        code, line = error.code, str(error)
    else:
        log = logs / f"rank{rank}.log"
        code, line = classify(error, rank, str(log) if logs.is_dir() else "above")
        with suppress(OSError), ExitStack() as stack:
            file = stack.enter_context(log.open("a")) if logs.is_dir() else None
            traceback.print_exception(error, file=file)
    if is_supervised(os.environ):
        with suppress(OSError):
            write_error(cfg.resolved_output_dir, rank, code, line)
    else:
        print(f"error: {line}", file=sys.stderr)
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process without goodbye: the other ranks may hold it in a collective.

    Args:
        code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_error(output_dir: str | os.PathLike[str], rank: int, code: int, line: str) -> None:
    """Leave word of a failure for the supervisor.

    Args:
        output_dir: directory of the run.
        rank: global rank of the caller.
        code: exit code that the command shall have.
        line: what the user is told, without "error: ".
    """
    path = Path(output_dir) / LOGS / f"rank{rank}.error"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rank": rank, "code": code, "line": one_line(line)}))
    part.replace(path)


def read_errors(output_dir: str | os.PathLike[str]) -> list[RankError]:
    """Return what failed ranks have left, the first failure first.

    Args:
        output_dir: directory of the run.
    """
    paths = (Path(output_dir) / LOGS).glob("rank*.error")
    by_time = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    return [RankError(**json.loads(path.read_text())) for path in by_time]


def supervise(
    cfg: Config, argv: Sequence[str], script: str | os.PathLike[str] = PROJECT_DIR / "train.py"
) -> int:
    """Run a script once per rank and wait for all of them.

    Rank 0 keeps this terminal; the others write to `logs/rankN.log`. When a rank fails, the others
    are ended within 5 seconds. SIGINT and SIGTERM are passed on once; a second one ends all ranks,
    and so do 10 seconds after the first rank has obeyed: the others may wait for it on the card.
    Ranks do not outlive this process, however it dies.

    Args:
        cfg: the run.
        argv: arguments of every rank.
        script: Python file that every rank runs.

    Returns:
        Exit code of the command: 0 when all ranks ended with 0; the code a failed rank left with
        `write_error`; 4 when a rank was killed; 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: the ranks cannot be started.
    """
    num_ranks = plan_ranks(cfg)
    port = find_port(cfg.master_port)
    output_dir = claim_output_dir(cfg)
    command = [sys.executable, os.fspath(script), *argv, f"--output_dir={output_dir}"]
    envs = [child_env(os.environ, rank, num_ranks, port) for rank in range(num_ranks)]
    with ExitStack() as stack:
        stops = stack.enter_context(_caught_signals())
        ranks: list[subprocess.Popen] = []
        stack.callback(_kill, ranks)
        for rank, env in enumerate(envs):
            ranks.append(_start(command, env, output_dir / LOGS / f"rank{rank}.log", rank))
        ended, stop = _watch(ranks, stops)
    return _conclude([rank.returncode for rank in ranks], ended, stop, output_dir)


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
        output = stack.enter_context(log.open("wb")) if rank else None
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
    codes: Sequence[int], ended: frozenset[int], stop: int | None, output_dir: Path
) -> int:
    """Print the one line that says why the run ended, if it failed, and return its exit code."""
    if not any(codes):
        return DONE
    if stop is not None:
        name = signal.Signals(stop).name
        print(f"stopped by {name}; what was recorded is in {output_dir}", file=sys.stderr)
        return 128 + stop
    errors = read_errors(output_dir)
    failed = [rank for rank, code in enumerate(codes) if code and rank not in ended]
    sudden = [rank for rank in failed if codes[rank] < 0 and -codes[rank] not in AFTERMATH]
    causes = [e for e in errors if e.code in OWN_FAULTS] or ([] if sudden else errors)
    if causes:
        print(f"error: {causes[0].line}", file=sys.stderr)
        return causes[0].code
    rank = (sudden or failed)[0]
    print(f"error: {_describe(rank, codes[rank], output_dir)}", file=sys.stderr)
    return max(codes[rank], 0) or RUN_FAILED


def _describe(rank: int, code: int, output_dir: Path) -> UserError:
    """Return what to say of a rank that ended with `code` and left no word."""
    log = "see the lines above" if rank == 0 else f"see {output_dir}/{LOGS}/rank{rank}.log"
    if code > 0:
        return UserError(f"rank {rank}", f"ended with code {code}", log, code)
    name = signal.Signals(-code).name
    is_kill = -code == signal.SIGKILL
    remedy = "dmesg tells whether host memory ran out" if is_kill else log
    return UserError(f"rank {rank}", f"was killed by {name}", remedy, RUN_FAILED)
