"""Bytes of files, read past the page cache ahead of their use, once for all ranks of a machine.

A ring of slots lies in memory that the ranks share. Every rank asks for the same spans in the same
order, reads its part of each, and takes the whole. A slot is filled again when no rank needs what
lies in it. No torch.
"""

import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fsdp_qlora.errors import INTEGRITY, UserError, one_line_of

PAGE = 4096  # direct reads begin and end at multiples of it, in the file and in memory
PIECE_BYTES = 2 * 2**20  # one read of one thread
NUM_READERS = 8
POLL_S = 0.0005
RULE = "quantized layers are read from it all through the run ({})"
REMEDY = "start again, with --resume: what is damaged is made anew"
WORD = 8  # bytes of a count that ranks tell each other


class Span:
    """Bytes of a file, which do not stay in the page cache even if they must be read through it.

    Attributes:
        nbytes: how many they are.
        lead: of the page in which they begin, bytes before them.
        room: of the memory that they are read into, whole pages.
        is_direct: they are read past the page cache.
    """

    def __init__(self, path: Path, offset: int, nbytes: int) -> None:
        """Open the file.

        Args:
            path: of the file, which stays open.
            offset: of the first byte; negative: from the end of the file.
            nbytes: how many.

        Raises:
            UserError: it cannot be opened, or ends too early (code 5).
        """
        self._path, self.nbytes = path, nbytes
        with one_line_of(path, REMEDY, INTEGRITY, RULE):
            self._file = os.open(path, os.O_RDONLY)
        offset += self._stat()[0] * (offset < 0)
        self.lead = offset % PAGE
        self.room, self._first = -(-(self.lead + nbytes) // PAGE) * PAGE, offset - self.lead
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._state = self._stat()
        self.is_direct = self._read_past_cache()
        weakref.finalize(self, os.close, self._file)

    def _read_past_cache(self) -> bool:
        """Open the file once more; some file systems refuse then, some when a page is read."""
        try:
            file = os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            is_good = os.preadv(file, [mmap.mmap(-1, PAGE)], self._first) > 0
        except OSError:
            is_good = False
        self._file, other = (file, self._file) if is_good else (self._file, file)
        os.close(other)
        return is_good

    def _stat(self) -> tuple[int, int]:
        at = os.fstat(self._file)
        return at.st_size, at.st_mtime_ns

    def _fault(self, what: str) -> UserError:
        return UserError(str(self._path), RULE.format(what), REMEDY, INTEGRITY)

    def read(self, view: memoryview, pool: ThreadPoolExecutor, part: int = 0, num: int = 1) -> None:
        """Read one part of the span in pieces.

        Args:
            view: `room` bytes that begin a page; the span lies behind the first `lead` of them.
            pool: of threads that read.
            part: which one.
            num: of parts.

        Raises:
            UserError: the file has changed, ends too early or cannot be read (code 5).
        """
        if self._stat() != self._state:
            raise self._fault("it has changed since it was opened")
        with one_line_of(self._path, REMEDY, INTEGRITY, RULE):
            list(pool.map(partial(self._read, view), range(0, self.room, PIECE_BYTES)[part::num]))

    def _read(self, view: memoryview, start: int) -> None:
        done, stop = start, min(start + PIECE_BYTES, self.room)
        while done < min(stop, self.lead + self.nbytes):
            count = os.preadv(self._file, [view[done:stop]], self._first + done)
            if not count:
                raise self._fault(f"it ends before byte {self._first + self.lead + self.nbytes:,}")
            done += count
        if not self.is_direct:
            os.posix_fadvise(self._file, self._first + start, stop - start, os.POSIX_FADV_DONTNEED)


def slot_bytes(nbytes: int) -> int:
    """Memory for a span of so many bytes, wherever in its file it begins."""
    return (-(-nbytes // PAGE) + 1) * PAGE


def ring_bytes(nbytes: int, num_slots: int, num_ranks: int) -> int:
    """Memory of a ring.

    Args:
        nbytes: of the largest span.
        num_slots: see Ring.
        num_ranks: that share it.
    """
    return slot_bytes(2 * num_slots * num_ranks * WORD) + num_slots * slot_bytes(nbytes)


def worker(owner: object) -> "queue.SimpleQueue[Callable[[], object] | None]":
    """A queue whose calls a thread makes, one after the other, as long as `owner` lives."""
    calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def work() -> None:
        while (call := calls.get()) is not None:
            call()
            del call  # it may hold the owner

    threading.Thread(target=work, daemon=True).start()
    weakref.finalize(owner, calls.put, None)
    return calls


class Ring:
    """Spans that are read ahead.

    Attributes:
        num_slots: spans that it holds at once; each has its slot, its number modulo this.
    """

    def __init__(
        self, spans: Sequence[Span], memory: memoryview, num_slots: int, rank: int, num_ranks: int
    ) -> None:
        """Take over the memory.

        Args:
            spans: that can be asked for, by number.
            memory: `ring_bytes`, shared by the ranks, zeros; it begins a page.
            num_slots: see above.
            rank: of this process among the `num_ranks` that share it.
            num_ranks: how many they are.
        """
        self._spans, self.num_slots, self._rank = spans, num_slots, rank
        self._num_ranks, self._memory = num_ranks, memory
        num = num_slots * num_ranks
        words = memory[: 2 * num * WORD].cast("q")
        # How often each rank has filled a slot, and given it up: [slot][rank].
        self._filled, self._freed = words[:num], words[num:]
        self._base = len(memory) - num_slots * slot_bytes(max(span.nbytes for span in spans))
        self._held = [-1] * num_slots  # which span was asked for last
        self._fills, self._booked, self._done = ([0] * num_slots for _ in range(3))
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(NUM_READERS)
        self._reads = worker(self)

    def _start(self, slot: int) -> int:
        return self._base + slot * (len(self._memory) - self._base) // self.num_slots

    def want(self, numbers: Iterable[int]) -> None:
        """Have spans read that are not there: all ranks the same ones in the same order.

        Args:
            numbers: at most `num_slots`, neighbours, in the order in which they are needed.
        """
        for number in numbers:
            slot = number % self.num_slots
            if self._held[slot] != number:
                self._held[slot] = number
                self._fills[slot] += 1
                self._reads.put(partial(self._fill, number, self._fills[slot], self._booked[slot]))

    def _fill(self, number: int, fill: int, booked: int) -> None:
        """Fill a slot for the `fill`-th time, when those who had `booked` it are done."""
        slot, span = number % self.num_slots, self._spans[number]
        mine, start = slot * self._num_ranks + self._rank, self._start(slot)
        try:
            self._wait(lambda: self._done[slot] >= booked)
            self._freed[mine] = fill
            self._wait(lambda: min(self._of(slot, self._freed)) >= fill)
            view = self._memory[start : start + span.room]
            span.read(view, self._pool, self._rank, self._num_ranks)
            self._filled[mine] = fill
        except BaseException as error:  # whoever takes a span raises it
            self._error = error

    def _of(self, slot: int, words: memoryview) -> memoryview:
        return words[slot * self._num_ranks : (slot + 1) * self._num_ranks]

    def _wait(self, is_due: Callable[[], bool]) -> None:
        while not is_due():
            if self._error is not None:
                raise self._error
            time.sleep(POLL_S)

    def book(self, number: int) -> int:
        """Keep a span that was asked for until it has been taken.

        Args:
            number: of the span.

        Returns:
            What `taken` wants to know.
        """
        slot = number % self.num_slots
        assert self._held[slot] == number, "a span was booked that was not asked for"
        self._booked[slot] += 1
        return self._fills[slot]

    @contextmanager
    def taken(self, number: int, fill: int) -> Iterator[slice]:
        """Wait for a span, and free its slot afterwards.

        Args:
            number: of the span.
            fill: of `book`.

        Yields:
            Where it lies in the memory.

        Raises:
            UserError: see Span.read.
        """
        slot, span = number % self.num_slots, self._spans[number]
        try:
            self._wait(lambda: min(self._of(slot, self._filled)) >= fill)
            start = self._start(slot) + span.lead
            yield slice(start, start + span.nbytes)
        finally:
            self._done[slot] += 1
