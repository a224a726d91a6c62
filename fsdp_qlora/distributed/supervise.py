"""The processes of a run: started, watched and ended together."""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.hooks import STOP_SIGNALS, Heartbeat, Watch
from fsdp_qlora.errors import DONE, RUN_FAILED

GRACE_S = 4.0
STOP_GRACE_S = 10.0
DUMP_S = 1.0
POLL_S = 0.05
PR_SET_PDEATHSIG = 1
Rank = subprocess.Popen  # or what has its pid, returncode, poll, wait and send_signal


@dataclass(frozen=True)
class RankSpec:
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


@dataclass(frozen=True)
class RanksExit:
    """How the ranks ended.

    Attributes:
        codes: as Popen gives them, by rank.
        signs: the last that was heard of each rank, before it was ended for hanging.
        ended: the ranks that had to be ended, and ended by that.
        stop: the signal that stopped the run before any rank failed.
        hung: the ranks that had stopped without leaving.
    """

    codes: Sequence[int]
    signs: Sequence[Heartbeat]
    ended: frozenset[int] = frozenset()
    stop: int | None = None
    hung: Sequence[int] = ()

    @property
    def is_done(self) -> bool:
        """Whether every rank has come to its end."""
        return not any(self.codes) and all(sign.is_last for sign in self.signs)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a terminal that goes away (SIGHUP) stops nothing.

    Outside the main thread Python hands no signals over: the list stays empty.
    """
    stops: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    before = {
        number: signal.signal(number, lambda caught, _: stops.append(caught))
        for number in STOP_SIGNALS
    }
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the ranks inherit it
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(spec: RankSpec) -> Rank:
    """Start one rank in a session of its own, so that Ctrl-C reaches only the supervisor.

    Args:
        spec: the rank.
    """
    with ExitStack() as stack:
        output = stack.enter_context(spec.log.open("ab")) if spec.log is not None else None
        return subprocess.Popen(
            spec.command,
            env=spec.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=spec.files,
            preexec_fn=tied_to_parent(),
        )


def tied_to_parent() -> Callable[[], None] | None:
    """Return what a child runs before its program, so that it is killed when we die."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(RUN_FAILED)

    return tie


def run(
    specs: Sequence[RankSpec],
    start: Callable[[RankSpec], Rank],
    stops: Sequence[int],
    watch: Watch,
    poll: Callable[[], None] = lambda: None,
) -> RanksExit:
    """Start all ranks and wait until none is left.

    Args:
        specs: by rank.
        start: starts one.
        stops: signals that this process has caught, as they come.
        watch: tells which ranks hang.
        poll: called again and again meanwhile; what it raises ends the ranks.
    """
    with ExitStack() as stack:
        ranks: list[Rank] = []
        stack.callback(_kill, ranks)
        for spec in specs:
            ranks.append(start(spec))
        return _Supervisor(ranks, stops, watch).wait(poll)


class _Supervisor:
    """Waits for ranks, and ends them when one fails, when one hangs, or when told to stop."""

    def __init__(self, ranks: Sequence[Rank], stops: Sequence[int], watch: Watch) -> None:
        self._ranks, self._stops, self._watch = ranks, stops, watch
        self._num_passed, self._deadline_s = 0, math.inf
        self._ended: frozenset[int] = frozenset()
        self._sent: set[int] = set()
        self._stop: int | None = None
        self._hung: list[int] = []
        self._signs: Sequence[Heartbeat] = ()

    def wait(self, poll: Callable[[], None]) -> RanksExit:
        while None in [rank.poll() for rank in self._ranks]:
            poll()
            self._obey()
            if not self._ended and any(map(self._has_failed, range(len(self._ranks)))):
                self._end(GRACE_S, signal.SIGTERM)
            elif self._num_passed and any(rank.returncode is not None for rank in self._ranks):
                self._deadline_s = min(self._deadline_s, time.monotonic() + STOP_GRACE_S)
            self._look_for_the_hung()
            if time.monotonic() > self._deadline_s:
                self._send(signal.SIGKILL)
            time.sleep(POLL_S)
        codes = [rank.returncode or DONE for rank in self._ranks]
        if signal.SIGKILL not in self._sent:  # then one was killed before, and was long in dying
            self._ended -= {i for i, code in enumerate(codes) if code == -signal.SIGKILL}
        return RanksExit(codes, self._signs or self._read(), self._ended, self._stop, self._hung)

    def _send(self, number: int) -> None:
        self._sent.add(number)
        _send(self._ranks, number)

    def _read(self) -> list[Heartbeat]:
        return [hooks.read(self._watch.board, rank) for rank in range(len(self._ranks))]

    def _obey(self) -> None:
        """Pass the first signal on; the second ends all."""
        if self._num_passed == len(self._stops):
            return
        self._send(self._stops[0] if self._num_passed == 0 else signal.SIGKILL)
        self._num_passed = len(self._stops)
        self._stop = self._stop if self._ended else self._stops[0]

    def _has_failed(self, number: int) -> bool:
        """Whether a rank has left otherwise than it should; 0 is right at the end only."""
        code = self._ranks[number].returncode
        if code == DONE and self._stop is None:
            return not hooks.read(self._watch.board, number).is_last
        return code not in {None, DONE, *(128 + stop for stop in self._stops)}

    def _look_for_the_hung(self) -> None:
        """Let ranks that hang, and their peers, write down where they are, and end them."""
        if self._ended:
            return
        runs = {i: rank.pid for i, rank in enumerate(self._ranks) if rank.returncode is None}
        self._hung = self._watch.find_hung(runs)
        if self._hung:
            self._signs = self._read()  # before a stopped one goes on
            self._end(DUMP_S, hooks.DUMP)
            self._send(signal.SIGCONT)  # a stopped one hears nothing else

    def _end(self, grace_s: float, number: int) -> None:
        running = [i for i, rank in enumerate(self._ranks) if rank.poll() is None]
        self._ended = frozenset(running)
        self._deadline_s = time.monotonic() + grace_s
        self._send(number)


def _send(ranks: Sequence[Rank], number: int) -> None:
    """Signal every running rank; SIGKILL also reaches the processes it has started."""
    for rank in ranks:
        if rank.poll() is None and number == signal.SIGKILL:
            os.killpg(rank.pid, number)
        elif rank.returncode is None:
            rank.send_signal(number)


def _kill(ranks: Sequence[Rank]) -> None:
    """Leave no rank behind."""
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
