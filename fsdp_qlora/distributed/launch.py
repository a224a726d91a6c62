"""One process per GPU: start the ranks, watch over them, end them together, say what went wrong."""

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fsdp_qlora import arch, checkpoint_store, cli, errors, hardware
from fsdp_qlora.arch.targets import find_targets
from fsdp_qlora.config import PROJECT_DIR, STRATEGIES, TrainConfig
from fsdp_qlora.distributed import exit_report, hooks
from fsdp_qlora.distributed.exit_report import LINK, LOGS, MEMORY, ExitReport, RanksExit
from fsdp_qlora.distributed.hooks import BOARD, LISTENER, RESTARTS, Heartbeat, Watch
from fsdp_qlora.distributed.meeting import IDENTITY, Meeting
from fsdp_qlora.errors import DONE, ENVIRONMENT, RUN_FAILED, SIGNALED, UserError, one_line_of
from fsdp_qlora.planning import run as plans
from fsdp_qlora.planning.sizes import adopt_format, check_context

if TYPE_CHECKING:
    from fsdp_qlora.distributed.world import World

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MASTER = ("MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS")  # of them --world_size may be wrong
NO_P2P = {"NCCL_P2P_DISABLE": "1"}
PROGRAM = (sys.executable, "-P", "-m", "fsdp_qlora", "train")  # -P: nothing of the user's directory
GRACE_S, STOP_GRACE_S, DUMP_S, POLL_S = 4.0, 10.0, 1.0, 0.05
Rank = subprocess.Popen  # or what has its pid, returncode, poll, wait and send_signal


def plan_ranks(cfg: TrainConfig, num_gpus: int | None = None) -> int:
    """Return how many ranks this machine starts: one per GPU, or `world_size` on the CPU.

    Args:
        cfg: the run; `world_size` -1 means all GPUs, or one rank without a GPU.
        num_gpus: as counted before; None: to be counted.

    Raises:
        UserError: more ranks than GPUs.
    """
    num_gpus = hardware.count_gpus(os.environ) if num_gpus is None else num_gpus
    if cfg.world_size == -1:
        return max(num_gpus, 1)
    if num_gpus and cfg.world_size > num_gpus:
        rule = f"this machine has {num_gpus} GPU(s), a rank needs one"
        remedy = f"use --world_size {num_gpus}, or CUDA_VISIBLE_DEVICES= for the CPU"
        raise UserError(f"--world_size {cfg.world_size}", rule, remedy, ENVIRONMENT)
    return cfg.world_size


def is_rank(env: Mapping[str, str], world_size: int = -1) -> bool:
    """Return whether torchrun, or srun with several tasks, has started this process as a rank.

    In the batch script of a Slurm job SLURM_PROCID and SLURM_NTASKS are set although no other task
    runs; only a step of srun sets SLURM_STEP_NUM_TASKS.

    Args:
        env: the environment.
        world_size: ranks that the user asked for; -1: did not say.

    Raises:
        UserError: a variable is no number, or RANK and WORLD_SIZE are left from something else.
    """
    for name in (*NUMBERS, "MASTER_PORT", *cli.TABLE["slurm"]):
        if not env.get(name, "0").isdecimal():
            remedy = "unset it, or start the ranks with torchrun or srun"
            raise UserError(f"{name}={env[name]}", "must be a whole number", remedy, ENVIRONMENT)
    if "RANK" in env and "WORLD_SIZE" in env:
        sizes = {int(env[name]) for name in NUMBERS if name in env and name.endswith("SIZE")}
        if world_size not in {-1, *sizes} and not any(name in env for name in LAUNCHERS):
            rule = f"RANK and WORLD_SIZE={env['WORLD_SIZE']} in the environment say otherwise"
            remedy = "unset RANK WORLD_SIZE, or leave --world_size out"
            raise UserError(f"--world_size {world_size}", rule, remedy, ENVIRONMENT)
        return True
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank_env(env: Mapping[str, str], cfg: TrainConfig) -> dict[str, str]:
    """Return what a process that `is_rank` shall have in its environment.

    Args:
        env: the environment that torchrun, srun or `supervise` made.
        cfg: gives the port when the environment has none.

    Returns:
        The place of the rank: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
        MASTER_PORT; under srun the first host of the step is the master. What the run is called,
        and the settings of libraries that the user has not made.
    """
    if "RANK" in env:
        rank, size, local = env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", env["RANK"])
        local_size, host, port = env.get("LOCAL_WORLD_SIZE", size), "127.0.0.1", 29500
        run = env.get(IDENTITY) or f"torchrun {env.get('TORCHELASTIC_RUN_ID', 'without id')}"
    else:
        rank, size, local_size = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], _tasks_here(env)
        local = env.get("SLURM_LOCALID", rank)
        host = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        job, step = (int(env.get(f"SLURM_{name}_ID", "0")) for name in ("JOB", "STEP"))
        port = 20000 + (job + 7919 * step) % 12000  # below those that the system gives away
        run = f"step {job}.{step} of Slurm"
    address = env.get("MASTER_ADDR", host), env.get("MASTER_PORT", str(cfg.master_port or port))
    own = (rank, local, size, local_size, *address, run)
    return dict(zip((*NUMBERS, *MASTER, IDENTITY), own, strict=True)) | wishes(env, int(local_size))


def _tasks_here(env: Mapping[str, str]) -> str:
    """How many tasks of the step are on this node; Slurm writes "2(x2),1" for 2, 2 and 1."""
    words = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", words)
    counts = [count for count, num_nodes in pairs for _ in range(int(num_nodes or 1))]
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def wishes(env: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the settings of libraries that suit ranks, less those that `env` has already.

    Args:
        env: environment of the user.
        num_ranks: ranks on this machine.
    """
    num_threads = max(len(os.sched_getaffinity(0)) // num_ranks, 1)
    wanted = {"OMP_NUM_THREADS": str(num_threads)} | hardware.RANK_ENV
    if "PYTORCH_ALLOC_CONF" not in env:
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {name: text for name, text in wanted.items() if name not in env}


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: "node[03-05,7],gpu1" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^\[,]*))?", hosts)
    return "".join(part for part in match.groups() if part) if match else hosts


def find_port(wanted: int | None) -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, see `open_listener`."""
    with open_listener(wanted) as probe:
        return probe.getsockname()[1]


def open_listener(wanted: int | None) -> socket.socket:
    """Return a socket that listens on 127.0.0.1 only: where ranks meet, from the start to the end.

    Args:
        wanted: the port the user asked for; None or 0 for any.

    Raises:
        UserError: the wanted port is taken.
    """
    try:
        return socket.create_server(("127.0.0.1", wanted or 0))
    except OSError as error:
        rule = f"is not free ({os.strerror(error.errno or 0)})"
        remedy = "leave it out for a free one"
        raise UserError(f"--master_port {wanted}", rule, remedy, ENVIRONMENT) from error


def child_env(env: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of one rank; what the user has set stays.

    A rank imports the package from where this process has it, installed or not.

    Args:
        env: environment of the supervisor.
        rank: global and local rank.
        num_ranks: number of ranks.
        port: where the ranks meet on 127.0.0.1.
    """
    values = map(str, (rank, rank, num_ranks, num_ranks, "127.0.0.1", port, os.getpid()))
    place = dict(zip((*NUMBERS, *MASTER, hooks.SUPERVISOR), values, strict=True))
    # Without PYTHONOPTIMIZE: transformers reads docstrings.
    place |= {"PYTHONOPTIMIZE": "", IDENTITY: f"process {os.getpid()}"}
    if PROJECT_DIR.name not in ("site-packages", "dist-packages"):
        paths = [str(PROJECT_DIR), env.get("PYTHONPATH", "")]
        place["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    links = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")  # not the network
    return links | dict(env) | wishes(env, num_ranks) | place


class RankSpec(NamedTuple):
    """What a rank is started with.

    Attributes:
        rank: its number.
        command: the program and its arguments.
        env: the whole environment.
        log: file for what it prints; None: the streams of the supervisor.
        files: numbers of open files that it inherits.
    """

    rank: int
    command: Sequence[str]
    env: dict[str, str]
    log: Path | None
    files: Sequence[int]


Start = Callable[[RankSpec], Rank]
Poll = Callable[[], object]  # called again and again while ranks run


def start(spec: RankSpec) -> Rank:
    """Start one rank in a session of its own, so that Ctrl-C reaches only the supervisor.

    Args:
        spec: the rank.
    """
    with spec.log.open("ab") if spec.log is not None else contextlib.nullcontext() as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        how = streams | {"pass_fds": spec.files, "preexec_fn": tied_to_parent()}
        return subprocess.Popen(spec.command, env=spec.env, start_new_session=True, **how)


def tied_to_parent(number: int = 0) -> Callable[[], None]:
    """Return what a child runs before its program, so that it is killed when we die.

    Args:
        number: of the process that is its parent; 0: this one.
    """
    libc, parent = ctypes.CDLL(None), number or os.getpid()

    def tie() -> None:
        libc.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(RUN_FAILED)

    return tie


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a terminal that goes away (SIGHUP) stops nothing.

    Outside the main thread Python hands no signals over: the list stays empty.
    """
    stops: list[int] = []
    before, burst = {}, hooks.Burst()

    def catch(number: int, frame: object) -> None:
        stops.extend([number] * burst.is_new())

    if threading.current_thread() is threading.main_thread():
        for number in hooks.STOP_SIGNALS:
            before[number] = signal.signal(number, catch)
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # ranks inherit it
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ranks(
    specs: Sequence[RankSpec], start: Start, stops: Sequence[int], watch: Watch, poll: Poll = int
) -> RanksExit:
    """Start all ranks and wait until none is left.

    Args:
        specs: by rank.
        start: starts one.
        stops: signals that this process has caught, as they come.
        watch: tells which ranks hang.
        poll: called again and again meanwhile; what it raises ends the ranks.
    """
    ranks: list[Rank] = []
    try:
        for spec in specs:
            ranks.append(start(spec))
        return _Supervisor(ranks, stops, watch).wait(poll)
    finally:
        _send(ranks, signal.SIGKILL)
        for rank in ranks:
            rank.wait()


def _send(ranks: Sequence[Rank], number: int) -> None:
    """Signal every running rank; SIGKILL also reaches the processes it has started."""
    for rank in ranks:
        if rank.poll() is None and number == signal.SIGKILL:
            os.killpg(rank.pid, number)
        elif rank.returncode is None:
            rank.send_signal(number)


class _Supervisor:
    """Waits for ranks, and ends them when one fails, when one hangs, or when told to stop."""

    def __init__(self, ranks: Sequence[Rank], stops: Sequence[int], watch: Watch) -> None:
        self._ranks, self._stops, self._watch = ranks, stops, watch
        self._num_passed, self._deadline_s, self._was_killed = 0, math.inf, False
        self._ended: frozenset[int] = frozenset()
        self._stop: int | None = None
        self._hung: list[int] = []
        self._signs: Sequence[Heartbeat] = ()

    def wait(self, poll: Poll) -> RanksExit:
        while None in [rank.poll() for rank in self._ranks]:
            poll()
            self._obey()
            if not self._ended and any(map(self._has_failed, range(len(self._ranks)))):
                self._end(GRACE_S, signal.SIGTERM)
            elif self._num_passed and any(rank.returncode is not None for rank in self._ranks):
                self._deadline_s = min(self._deadline_s, time.monotonic() + STOP_GRACE_S)
            self._look_for_the_hung()
            if time.monotonic() > self._deadline_s:
                self._kill()
            time.sleep(POLL_S)
        codes = [rank.returncode or DONE for rank in self._ranks]
        if not self._was_killed:  # then one was killed before, and was long in dying
            self._ended -= {i for i, code in enumerate(codes) if code == -signal.SIGKILL}
        return RanksExit(codes, self._signs or self._read(), self._ended, self._stop, self._hung)

    def _kill(self) -> None:
        self._was_killed = True
        _send(self._ranks, signal.SIGKILL)

    def _read(self) -> list[Heartbeat]:
        return [hooks.read(self._watch.board, rank) for rank in range(len(self._ranks))]

    def _obey(self) -> None:
        """Pass the first signal on; the second ends all."""
        if self._num_passed == len(self._stops):
            return
        if self._num_passed:
            self._kill()
        else:
            _send(self._ranks, self._stops[0])
        self._num_passed = len(self._stops)
        self._stop = self._stop if self._ended else self._stops[0]

    def _has_failed(self, number: int) -> bool:
        """Whether a rank has left otherwise than it should; 0 is right at the end only."""
        code = self._ranks[number].returncode
        if code == DONE and self._stop is None:
            return not hooks.read(self._watch.board, number).is_last
        return code not in {None, DONE, *(SIGNALED + stop for stop in self._stops)}

    def _look_for_the_hung(self) -> None:
        """Let ranks that hang, and their peers, write down where they are, and end them."""
        if self._ended:
            return
        runs = {i: rank.pid for i, rank in enumerate(self._ranks) if rank.returncode is None}
        self._hung = self._watch.find_hung(runs)
        if self._hung:
            self._signs = self._read()  # before a stopped one goes on
            self._end(DUMP_S, hooks.DUMP)
            _send(self._ranks, signal.SIGCONT)  # a stopped one hears nothing else

    def _end(self, grace_s: float, number: int) -> None:
        self._ended = frozenset(i for i, rank in enumerate(self._ranks) if rank.poll() is None)
        self._deadline_s = time.monotonic() + grace_s
        _send(self._ranks, number)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the ranks are started with, and who follows them.

    Attributes:
        cfg: the run.
        argv: arguments of every rank.
        plan: of the run, if it was made.
        start: starts a rank.
        tell: is told why a run failed, in a few lines.
        poll: called some twenty times a second while the ranks run; what it raises ends them.
        env: what the ranks find in their environment besides.
        num_restarts: how often they were started again after a crash.
    """

    cfg: TrainConfig
    argv: Sequence[str]
    plan: plans.RunPlan | None = None
    start: Start = start
    tell: Callable[[str], Any] = lambda line: print(line, file=sys.stderr)
    poll: Poll = int
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    num_restarts: int = 0


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
    path, is_auto = cfg.resolved_output_dir, cfg.resume == checkpoint_store.AUTO
    is_new = is_auto or cfg.resume is None
    place, rule = f"--output_dir {path}", "cannot be written to ({})"
    with one_line_of(place, "give another", ENVIRONMENT, rule):
        if (path / checkpoint_store.LOCK).exists():
            checkpoint_store.lock(path)
        if is_new:
            checkpoint_store.refuse_files(path, cfg.overwrite, is_auto)
        is_known = path.is_dir() and checkpoint_store.is_run(path)
        checkpoint_store.lock(path)
        if is_new:  # once more, for those of a run that was faster
            checkpoint_store.refuse_files(path, cfg.overwrite, is_auto)
        if is_new and cfg.overwrite and is_known:
            checkpoint_store.clear(path)
        elif is_new and (cfg.overwrite or (path / checkpoint_store.METRICS).exists()):
            checkpoint_store.set_record_aside(path)
        (path / LOGS).mkdir(exist_ok=True)
        exit_report.clear_errors(path)
        for name in (checkpoint_store.SUMMARY, checkpoint_store.REPORTS[0]):
            (path / name).unlink(missing_ok=True)  # a run that goes on has none
        tempfile.TemporaryFile(dir=path / LOGS).close()
    return path


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
    if hooks.is_supervised():
        return cfg
    path = str(world.first(lambda: claim_output_dir(cfg)))
    if world.meeting is not None and world.rank == 0:
        world.meeting.store.set("output_dir", path)  # torchrun starts the ranks again
    agreed = dataclasses.replace(cfg, output_dir=path)
    (agreed.resolved_output_dir / LOGS).mkdir(parents=True, exist_ok=True)  # on other machines
    return agreed


def watch_peers(cfg: TrainConfig, place: Meeting) -> hooks.Peers | None:
    """Watch over the ranks of all hosts, as a supervisor would: from now on whether one is gone.

    Args:
        cfg: the run, as far as it is known.
        place: where all have met.

    Returns:
        What does it, begun; None where a supervisor does.
    """
    if hooks.is_supervised():
        return None
    rank, hosts = int(os.environ["RANK"]), [words[0] for words in place.places]
    end = functools.partial(exit_report.end_without, rank=rank, hosts=hosts)
    keys = [f"{place.round}/beat {i}" for i in range(len(hosts))]
    for key in keys:  # who asks for what nobody has set yet is kept waiting
        place.store.compare_set(key, "", "")
    peers = hooks.Peers(place.store.clone(), keys, rank, cfg.hang_timeout, end)
    peers.start()
    return peers


def supervise(attempt: Attempt) -> int:
    """Run `train` once per rank and wait for all of them.

    Rank 0 keeps this terminal; the others write to `logs/rankN.log`. When a rank fails or hangs,
    the others are ended within 5 seconds, and all are started again where that can help: with the
    next fallback when memory ran out before the training had begun, without peer-to-peer copies
    when the GPUs cannot exchange a megabyte, and `max_restarts` times from the last checkpoint.
    SIGINT and SIGTERM are passed on once; a second one ends all ranks,
    and so do 10 seconds after the first rank has obeyed: the others may wait for it on the GPU.
    Ranks do not outlive this process, however it dies.

    Args:
        attempt: the first.

    Returns:
        Exit code of the command: 0 when all ranks came to their end; the code a failed rank left
        with `write_error`; 4 when a rank was killed or hung; 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: the ranks cannot be started.
    """
    cfg = attempt.cfg
    open_listener(cfg.master_port).close()  # if it is not free, nothing is written
    is_new, output_dir = not os.path.lexists(cfg.resolved_output_dir), claim_output_dir(cfg)
    argv = [*attempt.argv, f"--output_dir={output_dir}"]
    following: Attempt | None = dataclasses.replace(attempt, argv=argv)
    with caught_signals() as stops:
        while following is not None:
            exit_report.clear_errors(output_dir)
            found = _run(following, stops)
            following = None if stops or found.is_final else _again(found, following)
    is_own = found.code in exit_report.OWN_FAULTS and not found.has_begun
    if is_new and is_own and not any(f"{output_dir}/" in line for line in found.lines):
        _leave(output_dir)
    for line in found.lines:
        attempt.tell(line)
    return found.code


def _leave(output_dir: Path) -> None:
    """Remove a directory of which nothing came, unless somebody else has put something there."""
    checkpoint_store.clear(output_dir)
    (output_dir / checkpoint_store.LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (output_dir / LOGS).rmdir()
        output_dir.rmdir()


def _run(attempt: Attempt, stops: Sequence[int]) -> ExitReport:
    """Start all ranks, wait for their end, and say what it was."""
    cfg, plan, output_dir = attempt.cfg, attempt.plan, attempt.cfg.resolved_output_dir
    num_ranks = plan_ranks(cfg) if plan is None else plan.machine.num_ranks
    cgroup = hardware.find_cgroup()
    num_kills = hardware.oom_kills(cgroup)
    with open_listener(cfg.master_port) as listener, hooks.open_board() as board:
        files, port = (listener.fileno(), board.fileno()), listener.getsockname()[1]
        env = os.environ | (plan.env if plan is not None else {}) | attempt.env
        env |= {LISTENER: str(files[0]), BOARD: str(files[1]), RESTARTS: str(attempt.num_restarts)}
        specs = []
        for i in range(num_ranks):
            log = output_dir / LOGS / f"rank{i}.log" if i else None
            own_env, command = child_env(env, i, num_ranks, port), [*PROGRAM, *attempt.argv]
            specs.append(RankSpec(i, command, own_env, log, files))
        watch = Watch(board.fileno(), cfg.hang_timeout)
        ended = run_ranks(specs, attempt.start, stops, watch, attempt.poll)
    saved = None if ended.is_done else checkpoint_store.latest(output_dir)
    can_resume = saved is not None and saved.is_finite
    how_to_resume = f"continue with {errors.resume_of(output_dir)}" * can_resume
    num_kills = hardware.oom_kills(cgroup) - num_kills
    return exit_report.diagnose_exit(ended, output_dir, how_to_resume, num_kills, plan)


def _again(found: ExitReport, attempt: Attempt) -> Attempt | None:
    """What to start after a failure; says so. None: nothing that could help."""
    cfg, plan, output_dir = attempt.cfg, attempt.plan, attempt.cfg.resolved_output_dir
    cause = found.lines[0].removeprefix("error: ").partition("; ")[0]
    if found.kind == LINK and not NO_P2P.items() <= {**os.environ, **attempt.env}.items():
        print(f"links     {cause}; again with NCCL_P2P_DISABLE=1, which is slower", flush=True)
        return dataclasses.replace(attempt, env=attempt.env | NO_P2P)
    words = ""
    if found.kind == MEMORY:
        lower = plan.lower if plan is not None else None
        if plan is None or lower is None:
            return None
        words, plan = f", a lower setting: {plans.flags_of(plan.cfg, lower.cfg)}", lower
        if not found.has_begun:
            print(f"memory    {cause.partition(' (')[0]}; nothing is lost{words}", flush=True)
            return dataclasses.replace(attempt, plan=plan)
    if attempt.num_restarts >= cfg.max_restarts:
        return None
    number, saved = attempt.num_restarts + 1, checkpoint_store.latest(output_dir)
    last_step = checkpoint_store.last_step(output_dir, unknown=0)
    if last_step is not None and not (saved and saved.is_finite):
        return None  # a new start would write over what cannot be read now, or is NaN
    where = "from the beginning" if saved is None else f"after step {saved.step}"
    print(f"restart   {number}/{cfg.max_restarts} {where}{words}: {cause}", flush=True)
    argv = [*attempt.argv, f"--resume={saved.path if saved else 'none'}"]
    return dataclasses.replace(attempt, argv=argv, plan=plan, num_restarts=number)


def plan_run(cfg: TrainConfig, given: frozenset[str]) -> plans.RunPlan:
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
    num_gpus = hardware.count_gpus(os.environ)
    machine = plans.find_machine(os.environ, plan_ranks(cfg, num_gpus), num_gpus)
    return plans.make(info, cfg, given, machine)


def _read(cfg: TrainConfig, given: frozenset[str]) -> tuple[arch.ModelInfo, TrainConfig]:
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    find_targets(info, cfg)
    return info, adopt_format(cfg, info.stored.whole, given)


def broadcast_plan(cfg: TrainConfig, given: frozenset[str], world: "World") -> plans.RunPlan:
    """Make the plan of a run on one of its ranks: that of the supervisor, or of rank 0.

    Args:
        cfg: the run as the user gave it, its output directory agreed on.
        given: names of the options that the user wrote.
        world: the ranks; all of them must call.

    Returns:
        The plan, of one configuration on all ranks: what fits the machine with the least.

    Raises:
        UserError: it does not fit, or there is no such model; raised on every rank.
    """
    info, cfg = world.each(lambda: _read(cfg, given))
    check_context(info, cfg, world.size)
    num_gpus = world.local_size if world.device.type == "cuda" else 0
    machine = plans.find_machine(os.environ, world.local_size, num_gpus)
    every = world.gather_objects((world.local_size, machine))  # they have looked one by one
    sizes, machine = {size for size, _ in every}, every[world.peers[0]][1]
    machine = hardware.least_of([other for _, other in every]) if num_gpus else machine
    if len(sizes) > 1:
        if STRATEGIES[cfg.sharding_strategy].is_hybrid:
            numbers = " and ".join(map(str, sorted(sizes)))
            rule = f"every machine must have as many ranks; these have {numbers}"
            remedy = "use full_shard, or as many ranks on each"
            raise UserError(f"--sharding_strategy {cfg.sharding_strategy}", rule, remedy)
        own, why = plans.settle(info, cfg, given, machine)
        found = plans.RunPlan(own, own, info, machine, note=f"off: unequal numbers of ranks{why}")
    else:
        machine = dataclasses.replace(machine, num_machines=world.size // world.local_size)
        found = plans.make(info, cfg, given, machine, plans.fallback_of(os.environ))
    if not hooks.is_supervised():
        say = functools.partial(print, flush=True) if world.rank == 0 else lambda line: None
        world.each(lambda: plans.announce(found, say))
    chosen = {name: v for name, v in vars(found.cfg).items() if v != getattr(cfg, name)}
    chosen = world.gather_objects(chosen)[0]  # paths stay those of each host
    return dataclasses.replace(found, cfg=dataclasses.replace(cfg, **chosen))
