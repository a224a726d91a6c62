"""Seconds of each phase of a step, without making the GPU wait."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fsdp_qlora.distributed import hooks

# The phase of the clock that ends at a point of a step.
PHASES = {
    "data": "data",
    "post-forward": "forward",
    "post-backward": "backward",
    "post-optimizer": "optimizer",
}


@dataclass(frozen=True)
class Lap:
    """The marks of one step, read later so that nothing waits for the GPU now.

    Attributes:
        marks: (phase, end of it) in order; CUDA events, or seconds of perf_counter. The first
            one only says where the lap begins.
    """

    marks: tuple[tuple[str, Any], ...]

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase, summed over its marks; waits for the last CUDA event."""
        if isinstance(self.marks[-1][1], torch.cuda.Event):
            self.marks[-1][1].synchronize()
        totals: dict[str, float] = {}
        for (_, began), (phase, ended) in zip(self.marks, self.marks[1:], strict=False):
            totals[phase] = totals.get(phase, 0.0) + _seconds_between(began, ended)
        return totals


def _seconds_between(began: Any, ended: Any) -> float:
    if isinstance(began, torch.cuda.Event):
        return began.elapsed_time(ended) / 1e3
    return ended - began


class Clock:
    """Seconds of each phase of a step, on the device's own time line.

    Every moment belongs to the phase marked at its end, so the phases of a lap sum up to its
    wall time. On a GPU a phase is the time that the GPU spent on it or waited for it.
    """

    def __init__(
        self, device: torch.device, at_mark: Callable[[str], None] = lambda phase: None
    ) -> None:
        """Start counting.

        Args:
            device: the device whose current stream is timed; a CPU is timed by perf_counter.
            at_mark: told the name of every phase that ends, by the host's own time.
        """
        self._is_cuda = device.type == "cuda"
        self._at_mark = at_mark
        self._marks = [("", self._now())]

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        """End `phase`: the time since the last mark belongs to it (and adds up within a lap)."""
        self._marks.append((phase, self._now()))
        self._at_mark(phase)

    def lap(self) -> Lap:
        """The marks since the last lap; the next one begins at the last mark."""
        lap = Lap(tuple(self._marks))
        self._marks = self._marks[-1:]
        return lap

    def restart(self) -> None:
        """Forget the time since the last lap (after an evaluation, say)."""
        self._marks = [("", self._now())]


class StepHook:
    """The one hook of an optimizer step: ends phases of the clock, shows signs of life.

    Args:
        clock: whose marks are those of memory too.
        rank: of this process.
        step: that is under way, from 1.
    """

    def __init__(self, clock: Clock, rank: int, step: int) -> None:
        self._clock, self._rank, self._step = clock, rank, step

    def __call__(self, point: str) -> None:
        """Be at a point of the step: one of PHASES or of hooks.STEP_POINTS."""
        if point in PHASES:
            self._clock.mark(PHASES[point])
        if point in hooks.STEP_POINTS:
            hooks.reach(point, self._rank, self._step)
