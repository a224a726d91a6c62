"""One process per GPU: start the ranks, watch over them, end them together, say what went wrong."""

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import arch, checkpoint_store, hardware
from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import exit_report, hooks
from fsdp_qlora.distributed import supervise as processes
from fsdp_qlora.distributed.env import LISTENER, child_env, is_supervised, open_listener, plan_ranks
from fsdp_qlora.distributed.exit_report import LINK, LOGS, MEMORY, ExitReport
from fsdp_qlora.distributed.hooks import Watch
from fsdp_qlora.distributed.supervise import Rank, RankSpec
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import count_gpus
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.run import RunPlan

if TYPE_CHECKING:
    from fsdp_qlora.distributed.world import World

LAST_WORDS = ("summary.json", f"{LOGS}/rank*.error")  # of a run that goes on, to be said anew
NO_P2P = {"NCCL_P2P_DISABLE": "1"}
PROGRAM = (sys.executable, "-P", "-m", "fsdp_qlora", "train")  # -P: nothing of the user's directory


@dataclass(frozen=True)
class Attempt:
    """What the ranks are started with.

    Attributes:
        argv: arguments of every rank.
        plan: of the run.
        env: what they find in their environment besides.
        num_restarts: how often they were started again after a crash.
    """

    argv: Sequence[str]
    plan: RunPlan | None
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    num_restarts: int = 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Watcher:
    """Who follows a run from the process that has started its ranks.

    Attributes:
        tell: is told why a run failed, in a few lines.
        poll: called some twenty times a second while the ranks run; what it raises ends them.
    """

    tell: Callable[[str], Any] = _to_stderr
    poll: Callable[[], None] = lambda: None


def claim_output_dir(cfg: TrainConfig) -> Path:
    """Make the output directory ready for a run; one process does this, before any writes.

    It is this process's until it ends.

    Args:
        cfg: the run.

    Returns:
        The directory, with `logs` in it. The record and the checkpoints of an earlier run are
        removed only with `overwrite`; after `--resume auto` without a checkpoint, the record of
        what could not save one is set aside.

    Raises:
        UserError: another run is at work there; it holds files, and neither `overwrite` nor
            `resume` is given; it cannot be written to.
    """
    path = cfg.resolved_output_dir
    try:
        if (path / checkpoint_store.LOCK).exists():
            checkpoint_store.lock(path)
        is_new = cfg.resume in (None, checkpoint_store.AUTO)
        _refuse_files(path, cfg)
        is_known = path.is_dir() and checkpoint_store.is_run(path)
        checkpoint_store.lock(path)
        _refuse_files(path, cfg)  # those of a run that was faster
        if is_new and cfg.overwrite and is_known:
            checkpoint_store.clear(path)
        elif is_new and (cfg.overwrite or (path / checkpoint_store.METRICS).exists()):
            checkpoint_store.set_record_aside(path)
        (path / LOGS).mkdir(exist_ok=True)
        for old in [found for pattern in LAST_WORDS for found in path.glob(pattern)]:
            old.unlink()
        tempfile.TemporaryFile(dir=path / LOGS).close()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise UserError(f"--output_dir {path}", reason, "give another", ENVIRONMENT) from error
    return path


def _refuse_files(path: Path, cfg: TrainConfig) -> None:
    if cfg.resume in (None, checkpoint_store.AUTO):
        checkpoint_store.refuse_files(path, cfg.overwrite, cfg.resume == checkpoint_store.AUTO)


def agree_output_dir(cfg: TrainConfig, world: "World") -> TrainConfig:
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
    cfg: TrainConfig,
    argv: Sequence[str],
    program: Sequence[str] = PROGRAM,
    plan: RunPlan | None = None,
    start: Callable[[RankSpec], Rank] = processes.start,
    watcher: Watcher = Watcher(),
) -> int:
    """Run a program once per rank and wait for all of them.

    Rank 0 keeps this terminal; the others write to `logs/rankN.log`. When a rank fails or hangs,
    the others are ended within 5 seconds, and all are started again where that can help: with the
    next fallback when memory ran out before the training had begun, without peer-to-peer copies
    when the GPUs cannot exchange a megabyte, and `max_restarts` times from the last checkpoint.
    SIGINT and SIGTERM are passed on once; a second one ends all ranks,
    and so do 10 seconds after the first rank has obeyed: the others may wait for it on the GPU.
    Ranks do not outlive this process, however it dies.

    Args:
        cfg: the run.
        argv: arguments of every rank.
        program: what every rank runs, in front of `argv`.
        plan: of the run.
        start: starts a rank.
        watcher: follows the run.

    Returns:
        Exit code of the command: 0 when all ranks came to their end; the code a failed rank left
        with `write_error`; 4 when a rank was killed or hung; 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: the ranks cannot be started.
    """
    open_listener(cfg.master_port).close()  # if it is not free, nothing is written
    is_new = not os.path.lexists(cfg.resolved_output_dir)
    output_dir = claim_output_dir(cfg)
    attempt = Attempt([*argv, f"--output_dir={output_dir}"], plan)
    go = functools.partial(_run, cfg, program, start, watcher)
    with processes.caught_signals() as stops:
        found = go(attempt, stops)
        while not stops and (again := _again(found, attempt, cfg)) is not None:
            attempt = again
            exit_report.clear_errors(output_dir)
            found = go(attempt, stops)
    is_own = found.code in exit_report.OWN_FAULTS and not found.has_begun
    if is_new and is_own and not any(f"{output_dir}/" in line for line in found.lines):
        _leave(output_dir)
    for line in found.lines:
        watcher.tell(line)
    return found.code


def _leave(output_dir: Path) -> None:
    """Remove a directory of which nothing came, unless somebody else has put something there."""
    checkpoint_store.clear(output_dir)
    (output_dir / checkpoint_store.LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (output_dir / LOGS).rmdir()
        output_dir.rmdir()


def _run(
    cfg: TrainConfig,
    program: Sequence[str],
    start: Callable[[RankSpec], Rank],
    watcher: Watcher,
    attempt: Attempt,
    stops: Sequence[int],
) -> ExitReport:
    """Start all ranks, wait for their end, and say what it was."""
    output_dir, plan = cfg.resolved_output_dir, attempt.plan
    num_ranks = plan_ranks(cfg) if plan is None else plan.machine.num_ranks
    cgroup = hardware.find_cgroup()
    num_kills = hardware.oom_kills(cgroup)
    with open_listener(cfg.master_port) as listener, hooks.open_board() as board:
        files = {LISTENER: listener.fileno(), hooks.BOARD: board.fileno()}
        numbers = {**files, hooks.RESTARTS: attempt.num_restarts}
        env = os.environ | (plan.env if plan is not None else {}) | attempt.env
        env |= {name: str(number) for name, number in numbers.items()}
        port, command = listener.getsockname()[1], [*program, *attempt.argv]
        logs = [output_dir / LOGS / f"rank{i}.log" if i else None for i in range(num_ranks)]
        specs = [
            RankSpec(i, command, child_env(env, i, num_ranks, port), log, tuple(files.values()))
            for i, log in enumerate(logs)
        ]
        watch = Watch(board.fileno(), hooks.POINTS, hooks.STEP_POINTS, cfg.hang_timeout)
        ended = processes.run(specs, start, stops, watch, watcher.poll)
    saved = None if ended.is_done else checkpoint_store.latest(output_dir)
    how_to_resume = f"continue with --resume {output_dir}" if saved is not None else ""
    num_kills = hardware.oom_kills(cgroup) - num_kills
    return exit_report.diagnose_exit(ended, output_dir, how_to_resume, num_kills, plan)


def _again(found: ExitReport, attempt: Attempt, cfg: TrainConfig) -> Attempt | None:
    """What to start after a failure; says so. None: nothing that could help."""
    output_dir, plan = cfg.resolved_output_dir, attempt.plan
    if found.is_final:
        return None
    cause = found.lines[0].removeprefix("error: ").partition("; ")[0]
    if found.kind == LINK and not NO_P2P.items() <= {**os.environ, **attempt.env}.items():
        print(f"links     {cause}; again with NCCL_P2P_DISABLE=1, which is slower", flush=True)
        return dataclasses.replace(attempt, env=attempt.env | NO_P2P)
    flags = ""
    if found.kind == MEMORY:
        lower = plan.lower if plan is not None else None
        if plan is None or lower is None:
            return None
        flags, plan = plans.flags_of(plan.cfg, lower.cfg), lower
        if not found.has_begun:
            place = cause.partition(" (")[0]
            print(f"memory    {place}; nothing is lost, a lower setting: {flags}", flush=True)
            return dataclasses.replace(attempt, plan=plan)
    if attempt.num_restarts >= cfg.max_restarts:
        return None
    number, saved = attempt.num_restarts + 1, checkpoint_store.latest(output_dir)
    if saved is None and checkpoint_store.may_hold_any(output_dir):
        return None  # a new start would write over what cannot be read now
    where = "from the beginning" if saved is None else f"after step {saved.step}"
    words = f", a lower setting: {flags}" if flags else ""
    print(f"restart   {number}/{cfg.max_restarts} {where}{words}: {cause}", flush=True)
    argv = [*attempt.argv, f"--resume={saved.path if saved else 'none'}"]
    return Attempt(argv, plan, attempt.env, number)


def plan_run(cfg: TrainConfig, given: frozenset[str]) -> RunPlan:
    """Make the plan of a run on this machine; no torch.

    Args:
        cfg: the run as the user gave it.
        given: names of the options that the user wrote.

    Returns:
        The plan, of which the ranks will be told; whether it fits is not looked at.

    Raises:
        UserError: no such model, or more ranks than GPUs (code 3).
    """
    info, cfg = _read(cfg, given)
    num_gpus = count_gpus(os.environ)
    machine = plans.find_machine(os.environ, plan_ranks(cfg, num_gpus), num_gpus)
    return plans.make(info, cfg, given, machine)


def _read(cfg: TrainConfig, given: frozenset[str]) -> tuple[ModelInfo, TrainConfig]:
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    arch.select_linears(info, cfg.lora_target_modules)
    return info, trained.adopt_format(cfg, info.stored_format, given)


def broadcast_plan(cfg: TrainConfig, given: frozenset[str], world: "World") -> RunPlan:
    """Make the plan of a run on one of its ranks: that of the supervisor, or of rank 0.

    Args:
        cfg: the run as the user gave it, its output directory agreed on.
        given: names of the options that the user wrote.
        world: the ranks; all of them must call.

    Returns:
        The plan, the same on every rank.

    Raises:
        UserError: it does not fit, or there is no such model; raised on every rank.
    """
    info, cfg = _read(cfg, given)
    if world.size != world.local_size:
        note = "off: a plan is made for one machine, and these ranks are on several"
        return plans.unplanned(info, cfg, note)
    num_gpus = world.local_size if world.device.type == "cuda" else 0
    machine = plans.find_machine(os.environ, world.size, num_gpus)
    machine = world.gather_objects(machine)[0]  # they have looked one after the other
    found = plans.make(info, cfg, given, machine, plans.fallback_of(os.environ))
    if not is_supervised(os.environ):
        say = functools.partial(print, flush=True) if world.rank == 0 else lambda line: None
        plans.announce(found, say)
    return found
