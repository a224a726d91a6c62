"""The totals of a run, kept up to date line by line of its record."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_WARMUP_STEPS = 3


@dataclass
class Totals:
    """What summary.json is made of, kept up to date line by line.

    Attributes:
        step_s, tokens_per_s: one number per step.
        num_tokens, num_trained_tokens: over all ranks and steps.
        loss_first, loss_last: loss of the first and of the last recorded step.
        peaks: largest memory figures per rank, in GiB.
        host_peaks: largest memory figures of the machine, in GiB.
        events: the lines that are not steps.
        num_skipped: steps that were not taken, because loss or gradient was not finite.
    """

    step_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_trained_tokens: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    peaks: list[dict[str, float]] = field(default_factory=list)
    host_peaks: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of metrics.jsonl."""
        self.step_s.append(line["step_s"])
        self.tokens_per_s.append(line["tokens_per_s"])
        self.num_tokens += line["num_tokens"]
        self.num_trained_tokens += line["num_trained_tokens"]
        self.loss_first = line["loss"] if len(self.step_s) == 1 else self.loss_first
        self.loss_last = line["loss"]
        self.num_skipped += bool(line.get("skipped"))
        self.peaks += [{} for _ in line["ranks"][len(self.peaks) :]]  # a resumed run may have more
        for peak, rank in zip(self.peaks, line["ranks"], strict=False):
            raise_to(peak, rank)
        raise_to(self.host_peaks, line["host"])

    def repeat(self, line: dict[str, Any]) -> None:
        """Count a line, step or event, of a record that goes on."""
        if "event" not in line:
            self.add(line)
        elif line["event"] != "run":
            self.events.append(line)

    def summary(self) -> dict[str, Any]:
        """The totals by name; the median speed leaves out the first steps, which warm up."""
        train_s = sum(self.step_s)
        steady = self.tokens_per_s[NUM_WARMUP_STEPS:] or self.tokens_per_s
        return {
            "num_steps": len(self.step_s),
            "train_s": train_s,
            "steps_per_s": len(self.step_s) / train_s if train_s else 0.0,
            "tokens_per_s": self.num_tokens / train_s if train_s else 0.0,
            "tokens_per_s_median": statistics.median(steady) if steady else 0.0,
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained_tokens,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "num_skipped_steps": self.num_skipped,
            "peaks": {"ranks": self.peaks, "host": self.host_peaks},
            "events": self.events,
        }


@dataclass(frozen=True)
class Resumed:
    """The record of a run that goes on.

    Args:
        lines: of metrics.jsonl, up to the checkpoint.
        seconds: that the run had taken.
    """

    lines: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0


def raise_to(peaks: dict[str, float], values: dict[str, Any]) -> None:
    """Keep the higher figure of each name; what is no number is left out.

    Args:
        peaks: figures so far, changed in place.
        values: new ones.
    """
    for name, value in values.items():
        if isinstance(value, int | float):
            peaks[name] = max(peaks.get(name, value), value)
