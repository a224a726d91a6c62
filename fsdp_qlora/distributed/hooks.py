"""Signs of life that ranks give at named points and their supervisor reads; stop signals."""

import faulthandler
import math
import os
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from fsdp_qlora import cli, errors

# What the supervisor puts into the environment of a rank.
SUPERVISOR = "FSDP_QLORA_SUPERVISOR"  # its process, which prints the errors
LISTENER = "FSDP_QLORA_LISTENER"  # number of the open socket at which rank 0 meets the others
BOARD = "FSDP_QLORA_BOARD"  # number of the open file that the ranks write to
RESTARTS = "FSDP_QLORA_RESTARTS"  # how often the supervisor has started the ranks again
STEP_POINTS, SAVE_POINTS = cli.TABLE["points"].values()
POINTS = ("load", *STEP_POINTS, *SAVE_POINTS, "eval", "export")
DUMP = signal.SIGUSR2
DONE = "done"
SLOT = struct.Struct("<qq512s")
End = Callable[[list[int], str, Path], None]  # is told who is lost, how, and of what
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PULSE = struct.Struct("<dd")  # time and seconds of computing of the host
BEAT_S, LOST_S, GONE_S = 1.0, 5.0, 120.0  # a library may hold Python's lock for long
BURST_S = 2.0  # Slurm sends SIGTERM twice in 16 ms, torchrun passes on what its ranks have heard


@dataclass(frozen=True)
class Heartbeat:
    """The last that was heard of a rank.

    Attributes:
        at_s: when, on the monotonic clock; 0: nothing yet.
        step: optimizer step that is under way, from 1; 0: none.
        point: the last named point that it reached.
    """

    at_s: float = 0.0
    step: int = 0
    point: str = ""

    def __str__(self) -> str:
        """Where the rank was, in words that follow "...was killed"."""
        step = f" at step {self.step}" if self.step else ""
        return f"{step} ({self.point})" if self.point else " before it had begun"

    @property
    def is_last(self) -> bool:
        """Whether the rank has come to its end."""
        return self.point == DONE

    @property
    def silent_s(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at_s


def beat(point: str, rank: int, step: int = 0) -> None:
    """Show the supervisor a sign of life; nothing without one, or from a thread beside the run's.

    Args:
        point: where the run is; or, with spaces, a last word that the disk has not taken.
        rank: of the caller.
        step: optimizer step under way, from 1; 0: as before.
    """
    board = os.environ.get(BOARD)
    if board is not None and threading.current_thread() is threading.main_thread():
        with suppress(OSError):
            step = step or read(int(board), rank).step
            slot = SLOT.pack(time.monotonic_ns(), step, point.encode())
            os.pwrite(int(board), slot, rank * SLOT.size)


def reach(point: str, rank: int, step: int = 0) -> None:
    """Be at a named point of the run; the supervisor sees it, and tests make their faults here.

    A rank that has no part in a point (only one writes files) reaches it all the same, before it
    waits for the others.

    Args:
        point: one of POINTS.
        rank: of the caller.
        step: optimizer step, from 1; 0 where there is none.
    """
    beat(point, rank, step)


def enable_stack_dumps(log: Path) -> None:
    """Write the stacks of all threads into `log` when this process crashes, or when told to.

    Without a supervisor nobody tells it to, and nothing is done.

    Args:
        log: file to append to; its directory exists.
    """
    if BOARD not in os.environ:
        return
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    faulthandler.enable(file)
    faulthandler.register(DUMP, file)


def open_board() -> BinaryIO:
    """Return a file without a name that the supervisor hands to its ranks."""
    return os.fdopen(os.memfd_create("heartbeat"), "r+b", buffering=0)


def read(board: int, rank: int) -> Heartbeat:
    """Return the last sign of a rank.

    Args:
        board: number of the file.
        rank: whose.
    """
    slot = os.pread(board, SLOT.size, rank * SLOT.size)
    if len(slot) < SLOT.size:
        return Heartbeat()
    at_ns, step, point = SLOT.unpack(slot)
    return Heartbeat(at_ns / 1e9, step, point.rstrip(b"\0").decode("utf-8", "replace"))


def own_heartbeat() -> Heartbeat:
    """Return the last sign that this rank itself has given; an empty one without a supervisor."""
    with suppress(OSError, KeyError):
        return read(int(os.environ[BOARD]), int(os.environ["RANK"]))
    return Heartbeat()


def is_supervised() -> bool:
    """Return whether a supervisor has started this process, so that it prints the errors."""
    return SUPERVISOR in os.environ


def _life(pid: int) -> tuple[str, float]:
    """State of a process ("T": stopped) and the seconds of a core it has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Watch:
    """Finds out whether ranks hang.

    In a step a rank is given 10 times as long as the slowest recent step, 60 s at least. Outside
    (loading, the first step, evaluating, saving) 300 s, and as long as the ranks compute: a
    thousandth of the time on some core.

    Attributes:
        board: number of the file the ranks write to.
        limit_s: a limit for both instead, of the user; 0: no rank ever hangs.
        life: state and seconds of computing of a process, by its number.
    """

    board: int
    limit_s: float | None = None
    life: Callable[[int], tuple[str, float]] = _life
    began_s: float = field(default_factory=time.monotonic)
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    last: Heartbeat = Heartbeat()
    used_s: float = 0.0
    asked_s: float = math.inf

    def find_hung(self, pids: Mapping[int, int]) -> list[int]:
        """Return the ranks that hang: the stopped ones, else those that are least far.

        Args:
            pids: rank -> process, of the ranks that run.
        """
        signs = {rank: read(self.board, rank) for rank in pids}
        if not signs or self.limit_s == 0:
            return []
        before_s, self.asked_s = self.asked_s, time.monotonic()
        last = max(signs.values(), key=lambda sign: sign.step)
        if self.asked_s - before_s > LOST_S:  # all were stopped, as a scheduler suspends a job
            self.began_s, self.last = self.asked_s, Heartbeat(self.asked_s, last.step)
        self._learn(last)
        first = min(signs.values(), key=lambda sign: sign.at_s)
        silent_s = self.asked_s - max(first.at_s, self.began_s)
        is_steady = first.point in STEP_POINTS and bool(self.steps_s)
        if silent_s <= self._limit_s(is_steady):
            return []
        stopped = [rank for rank, pid in pids.items() if self.life(pid)[0] == "T"]
        if not is_steady and not stopped and self._is_busy(list(pids.values())):
            return []
        least = min(map(self._place, signs.values()))
        return stopped or [rank for rank, sign in signs.items() if self._place(sign) == least]

    def _place(self, sign: Heartbeat) -> tuple[int, int]:
        """How far a rank is: the step, and the point in it."""
        order = POINTS.index(sign.point) if sign.point in POINTS else len(POINTS)
        return sign.step, order if sign.point else -1

    def _learn(self, sign: Heartbeat) -> None:
        """Note how long a step took."""
        if self.last.step and sign.step == self.last.step + 1:
            self.steps_s.append(sign.at_s - self.last.at_s)
        if sign.step != self.last.step:
            self.last = sign

    def _limit_s(self, is_steady: bool) -> float:
        if self.limit_s is not None:
            return self.limit_s
        return max(60.0 if is_steady else 300.0, 10.0 * max(self.steps_s, default=0.0))

    def _is_busy(self, pids: Sequence[int]) -> bool:
        """Whether the ranks have computed since they were last asked; they are given more time."""
        before_s, began_s = self.used_s, self.began_s
        self.used_s, self.began_s = sum(self.life(pid)[1] for pid in pids), time.monotonic()
        return self.used_s - before_s > 0.001 * (self.began_s - began_s)


class Peers(threading.Thread):
    """Shows the ranks of all hosts this one's signs of life, and watches theirs.

    It does what a supervisor would, where torchrun or srun has started the ranks.
    """

    def __init__(
        self, store: Any, keys: Sequence[str], rank: int, limit_s: float | None, end: End
    ) -> None:
        """Prepare; `start` begins.

        Args:
            store: a torch.distributed.Store of this thread alone.
            keys: by rank, in the store.
            rank: of this process.
            limit_s: see `Watch`.
            end: ends this process, and is told which ranks are lost, in what way, and where the run
                has its files.
        """
        super().__init__(daemon=True)
        self._store, self._keys, self._rank, self._end = store, list(keys), rank, end
        self._board, self._is_over = open_board(), threading.Event()
        os.environ[BOARD] = str(self._board.fileno())
        self._words, self._heard_s = [b""] * len(keys), [time.monotonic()] * len(keys)
        self.follow(limit_s)

    def follow(self, limit_s: float | None, out_dir: Path | None = None) -> None:
        """Know the run: as soon as it has begun, a rank that hangs is lost, too.

        Args:
            limit_s: see `Watch`.
            out_dir: where it has its files; None: it has not begun.
        """
        self._gone_s = math.inf if limit_s == 0 else min(limit_s or GONE_S, GONE_S)
        self._watch = Watch(self._board.fileno(), limit_s if out_dir else 0, self._life)
        self._out = out_dir or Path(os.devnull)

    def run(self) -> None:
        """Beat and watch until `stop`."""
        threading.Thread(target=self._talk, daemon=True).start()
        now_s, here = time.monotonic(), self._board.fileno()
        while not self._is_over.wait(BEAT_S):
            before_s, now_s = now_s, time.monotonic()
            if now_s - before_s > LOST_S:  # see Watch.find_hung
                self._heard_s = [now_s] * len(self._keys)
            on = {i: i for i in range(len(self._keys)) if not read(here, i).is_last}
            gone = [i for i in on if now_s - self._heard_s[i] > self._gone_s]
            hung = [] if gone else self._watch.find_hung(on)
            if self._rank in gone and not self._is_over.is_set():
                self._end([0], "is gone, or the link to it is cut", self._out)
            for lost, how in ((gone, "is gone"), (hung, "hung")):
                if lost and not self._is_over.is_set():
                    sign = read(here, lost[0])
                    silent_s = now_s - (self._heard_s[lost[0]] if gone else sign.at_s)
                    self._end(lost, f"{how}{sign}: no sign of life for {silent_s:.0f} s", self._out)

    def _talk(self) -> None:
        """Show and look; where the link is cut, a call never returns."""
        with suppress(RuntimeError):  # the store is gone, and nothing is heard any more
            while not self._is_over.wait(BEAT_S):
                self._show()
                self._look()
        self._gone_s = min(self._gone_s, LOST_S)  # at the end of a run rank 0 may leave first

    def hurry(self) -> None:
        """Wait a little for what the thread finds: a peer has closed its connection."""
        self._gone_s = min(self._gone_s, LOST_S)
        self.join(2 * LOST_S)

    def stop(self) -> None:
        """Tell the others that this rank has come to its end."""
        self._is_over.set()
        beat(DONE, self._rank)
        os.environ.pop(BOARD)
        with suppress(RuntimeError):
            self._show()

    def _show(self) -> None:
        """Write what this rank has on its board to the store."""
        slot = os.pread(self._board.fileno(), SLOT.size, self._rank * SLOT.size)
        word = PULSE.pack(time.monotonic(), _life(os.getpid())[1]) + slot
        self._store.set(self._keys[self._rank], word)

    def _look(self) -> None:
        """Write what the others have shown onto the board."""
        for i, word in enumerate(self._store.multi_get(self._keys)):
            if word != self._words[i]:
                self._heard_s[i] = time.monotonic()
            slot = word[PULSE.size :]
            if i != self._rank and slot and slot != self._words[i][PULSE.size :]:
                _, step, point = SLOT.unpack(slot)
                slot = SLOT.pack(time.monotonic_ns(), step, point)
                os.pwrite(self._board.fileno(), slot, i * SLOT.size)
            self._words[i] = word

    def _life(self, rank: int) -> tuple[str, float]:
        return "", PULSE.unpack_from(self._words[rank])[1] if self._words[rank] else 0.0


class Burst:
    """Tells a stop signal that is sent again from the first one, sent several times over."""

    _at_s = -math.inf

    def is_new(self) -> bool:
        """Whether a signal that comes now is not of the burst before."""
        before_s, self._at_s = self._at_s, time.monotonic()
        return self._at_s - before_s > BURST_S


class StopFlag:
    """What the handlers of a rank leave for the loop.

    Outside `deferred` a signal raises Stopped at once: nothing would be lost.

    Attributes:
        number: of the first signal; 0 = none came.
    """

    def __init__(self) -> None:
        self.number, self._burst, self._is_deferred = 0, Burst(), False

    def install(self) -> None:
        """Take over both signals; in a thread beside the main one Python allows nobody to."""
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._burst.is_new():
            return
        if self.number and self._is_deferred:
            os._exit(errors.SIGNALED + number)  # asked twice: the checkpoint before stays as it is
        self.number = self.number or number
        if not self._is_deferred:
            raise errors.Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While steps are taken, a signal waits for the end of the step."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
