"""Saving what is trained while the training goes on, and taking it up again.

Everything is copied to rank 0's host memory (snapshot.py), which is all that the training waits
for; a thread writes it (checkpoint_files.py). No random state is kept: rows and dropout of a step
follow from seed, step and rank, see loop.fit.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fsdp_qlora.config import Config
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.hooks import StopFlag, Stopped
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import shard
from fsdp_qlora.plan.limits import MOST_TOUCHED_BYTES
from fsdp_qlora.plan.memory import moment_bytes
from fsdp_qlora.train import checkpoint_files as files
from fsdp_qlora.train import snapshot
from fsdp_qlora.train.checkpoint_files import CHECKPOINTS
from fsdp_qlora.train.snapshot import HostCopies, Snapshot

if TYPE_CHECKING:
    from fsdp_qlora.training.loop import Trained
    from fsdp_qlora.training.metrics import Recorder

SECONDS = 60.0
SIGN_S = 2.0  # from one sign of life to the next


def period(save_every: str) -> tuple[int, float]:
    """Read --save_every.

    Args:
        save_every: "50" steps, "30m" minutes, "0" for never.

    Returns:
        (steps, seconds) from checkpoint to checkpoint; 0 and infinity for the one not meant.
    """
    if save_every.endswith("m"):
        seconds = int(save_every[:-1]) * SECONDS
        return 0, seconds or math.inf
    return int(save_every), math.inf


class Writer(threading.Thread):
    """Writes one checkpoint beside the training.

    Attributes:
        step: of the checkpoint.
        error: what went wrong, or None.
    """

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step, self.error = step, None
        self._work = work
        self.start()

    error: Exception | None

    def run(self) -> None:
        """Work; an error is left for the training to see."""
        try:
            self._work()
        except Exception as error:
            self.error = error


class Keeper:
    """The checkpoints of a run; every rank has one and calls it in the same order.

    Attributes:
        step: of the latest checkpoint that was begun, or gone on from.
        best: (step, held-out loss) of the best one, or None.
        stop: what signals leave.
    """

    def __init__(
        self,
        trained: "Trained",
        recorder: "Recorder",
        cfg: Config,
        facts: dict[str, Any],
        step: int = 0,
        stop: StopFlag | None = None,
    ) -> None:
        """Prepare; nothing is written before the first checkpoint is due.

        Args:
            trained: what is saved.
            recorder: of the run, which must not lag behind a checkpoint.
            cfg: save_every, keep_checkpoints, save_model (at the end too), the directory.
            facts: goes into every checkpoint, as JSON has it.
            step: of the checkpoint that was gone on from.
            stop: installed already; None: no signal is looked after.
        """
        self.step = self._taken = step
        self.stop = stop or StopFlag()
        self._trained, self._recorder, self._facts, self._cfg = trained, recorder, facts, cfg
        self._output_dir = cfg.resolved_output_dir
        self._num_steps, self._seconds = period(cfg.save_every)
        self._is_on = cfg.saves_checkpoints
        self._is_writer = trained.world.rank == 0
        self._saved_s = time.monotonic()
        self._writer: Writer | None = None
        found = self._marked_best()
        best_step, loss = trained.world.gather([float(found["step"]), float(found["loss"])])[0]
        self.best = (int(best_step), loss) if best_step else None  # as rank 0 has read it
        self._has_new_best = False
        params = shard.trained_parameters(trained.model)
        whole_bytes = sum(p.numel() * (p.element_size() + moment_bytes(cfg)) for p in params)
        room_bytes = whole_bytes * (self._is_on and self._is_writer)
        self._copies = HostCopies(room_bytes)
        if room_bytes <= MOST_TOUCHED_BYTES:
            self._start(self._copies.touch)

    def _marked_best(self) -> dict[str, Any]:
        """The best checkpoint as this rank reads it; step 0: there is none."""
        try:
            return files.best_of(self._output_dir) or {"step": 0, "loss": math.inf}
        except UserError as error:
            self._recorder.say(f"warning   {error}")
            return {"step": 0, "loss": math.inf}

    def mark_best(self, found: tuple[float, int] | None) -> None:
        """Keep the checkpoint of the best evaluation; every rank must call.

        Args:
            found: lowest held-out loss, the same on every rank, and the step it was measured after:
                at the latest the last one taken. If that has no checkpoint yet, it gets one.
        """
        if found is None or not self._is_on or not found[0] < (self.best or (0, math.inf))[1]:
            return
        loss, step = found
        if step != self._taken:
            return  # known from before a resume
        self.best, self._has_new_best = (step, loss), step != self.step
        if step == self.step:
            best = self.best
            self._join()
            self._start(lambda: self._tidy(best))

    def wishes(self, step: int) -> list[float]:
        """What this rank wants after a step, for the ranks to agree on: the most of each counts.

        Args:
            step: that is being recorded, from 1.

        Returns:
            Number of the signal that has come, or 0; whether a checkpoint is due.
        """
        self._taken = step
        is_due = self._num_steps > 0 and step % self._num_steps == 0
        is_late = self._is_writer and time.monotonic() - self._saved_s >= self._seconds
        return [float(self.stop.number), float(is_due or is_late)]

    def wants(self, agreed: Sequence[float]) -> bool:
        """Whether there is something to do after a step; also sees to a write that has ended.

        Args:
            agreed: `wishes` of all ranks.
        """
        if self._is_writer and self._writer is not None and not self._writer.is_alive():
            self._join()
        return any(agreed) or self._has_new_best

    def after_step(self, step: int, agreed: Sequence[float]) -> None:
        """Save; leave, if a signal has come.

        Args:
            step: that is over, from 1.
            agreed: `wishes` of all ranks.

        Raises:
            Stopped: after a signal; what was trained is saved.
        """
        self.save(step)
        if agreed[0]:
            self.wait()
            raise Stopped(int(agreed[0]))

    def finish(self, step: int) -> None:
        """Save what a run has ended with, and see it on the disk; every rank must call.

        Args:
            step: the last one.

        Raises:
            Stopped: a signal came meanwhile.
        """
        with self.stop.deferred():
            if self._cfg.save_model:
                self.save(step)
            self.wait()
        if self.stop.number:
            raise Stopped(self.stop.number)

    def save(self, step: int) -> None:
        """Begin a checkpoint; returns when the training may go on. Every rank must call.

        Args:
            step: the last one taken.
        """
        if not self._is_on or step == self.step:
            return
        hooks.beat("save", self._trained.world.rank, step)
        self._recorder.flush()
        begin_s = time.monotonic()
        self.wait()
        shot = snapshot.take(self._trained, self._copies, self._is_writer)
        best, self._has_new_best = self.best if self._has_new_best else None, False
        trained, self.step, self._saved_s = self._trained, step, time.monotonic()
        state = {
            **self._facts,
            "is_finite": shot.is_finite,
            "num_ranks": trained.world.size,
            "num_scheduled": trained.schedule.last_epoch,
            "optimizer": shot.numbers,
            "guard": trained.guard.state(),
            "total_s": self._recorder.total_s(),
        }
        self._start(lambda: self._write(step, shot, state, best))
        if not self._is_writer:
            for point in hooks.SAVE_POINTS:  # only kills and the like matter to those that wait
                with contextlib.suppress(OSError):
                    hooks.reach(point, trained.world.rank, step)
        self._recorder.event("checkpoint", {"step": step, "blocked_s": time.monotonic() - begin_s})

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank must call."""
        world, is_busy = self._trained.world, True
        while is_busy:
            if self._writer is not None:
                self._writer.join(SIGN_S)
            hooks.beat("save", world.rank, self.step)  # a slow disk is no hang
            is_busy = world.sum(self._writer is not None and self._writer.is_alive()) > 0
        self._join()

    def _write(
        self,
        step: int,
        shot: Snapshot,
        state: dict[str, Any],
        best: tuple[int, float] | None,
    ) -> None:
        """Write one checkpoint and remove those that it makes needless; in the thread."""

        def at(point: str) -> None:
            hooks.reach(point, 0, step)

        with contextlib.suppress(FileNotFoundError):
            files.sync(self._output_dir / "metrics.jsonl")  # a record never ends before
        files.write(self._output_dir / CHECKPOINTS, step, shot.tensors, state, at)
        self._tidy(best, at)

    def _tidy(
        self, best: tuple[int, float] | None, at: Callable[[str], None] = lambda point: None
    ) -> None:
        """Mark the best checkpoint, if it is there, and remove those that nobody needs."""
        if best is not None and best[0] in files.steps(self._output_dir):
            files.set_best(self._output_dir, *best)
        files.prune(self._output_dir, self._cfg.keep_checkpoints, at)

    def _start(self, work: Callable[[], None]) -> None:
        if self._is_writer:
            self._writer = Writer(self.step, work)

    def _join(self) -> None:
        """Wait for the thread, and say what went wrong; the training goes on."""
        if self._writer is None:
            return
        self._writer.join()
        writer, self._writer = self._writer, None
        if isinstance(writer.error, OSError | UserError):
            last = files.last_step(self._output_dir)
            left = "none" if last is None else f"of step {last}"
            reason = getattr(writer.error, "strerror", None) or str(writer.error)
            self._recorder.say(
                f"warning   the checkpoint of step {writer.step} could not be written ({reason}); "
                f"the training goes on; the last one there: {left}"
            )
        elif writer.error is not None:
            raise writer.error
