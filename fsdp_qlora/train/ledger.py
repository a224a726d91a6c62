"""The record of a run: one line per optimizer step in metrics.jsonl, totals in summary.json.

Recording never makes the GPU wait: times are CUDA events, and the loss of step N is read when
step N + 1 has been launched.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fsdp_qlora.train import memory
from fsdp_qlora.train.clock import Clock, Lap
from fsdp_qlora.train.versions import versions

COUNTS = ("num_trained_tokens", "num_tokens")
MIN_PLAIN_LINES = 20
NUM_WARMUP_STEPS = 3


class Ranks(Protocol):
    """What the record needs to know of the process group: see train/world.py."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's values, in the order of ranks."""


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

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of metrics.jsonl."""
        self.step_s.append(line["step_s"])
        self.tokens_per_s.append(line["tokens_per_s"])
        self.num_tokens += line["num_tokens"]
        self.num_trained_tokens += line["num_trained_tokens"]
        self.loss_first = line["loss"] if len(self.step_s) == 1 else self.loss_first
        self.loss_last = line["loss"]
        self.peaks = self.peaks or [{} for _ in line["ranks"]]
        for peak, rank in zip(self.peaks, line["ranks"], strict=True):
            _raise_to(peak, rank)
        _raise_to(self.host_peaks, line["host"])

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
            "peaks": {"ranks": self.peaks, "host": self.host_peaks},
            "events": self.events,
        }


def _raise_to(peaks: dict[str, float], values: dict[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            peaks[name] = max(peaks.get(name, value), value)


class Recorder:
    """Writes the record of a run on rank 0; every rank must call it in the same order.

    Use as a context manager around the training, and mark the phases of a step on its clock:

        with Recorder(out, world, num_steps, {"config": ...}) as recorder:
            ...
            recorder.clock.mark("forward")
            recorder.step({"step": 1, "epoch": 0.1, "loss": loss, ...})
    """

    def __init__(
        self,
        output_dir: str | Path,
        world: Ranks,
        num_steps: int,
        run_info: dict[str, Any],
        num_registered_bytes: int = 0,
        has_bar: bool = True,
    ) -> None:
        """Describe the run; nothing is written before the `with` block.

        Args:
            output_dir: directory of metrics.jsonl (a former one is replaced) and summary.json.
            world: rank, size, device, gather.
            num_steps: optimizer steps that this run will take.
            run_info: what the summary repeats: the config, the plan, the model's counts.
            num_registered_bytes: host bytes that this rank page-locked itself, unknown to
                torch's pinned allocator.
            has_bar: False prints plain lines on a terminal too.
        """
        self.clock = Clock(world.device)
        self._output_dir = Path(output_dir)
        self._world = world
        self._num_steps = num_steps
        self._has_bar = has_bar
        self._run_info = run_info
        self._registered_gib = num_registered_bytes / memory.GIB
        self._sampler = memory.HostSampler()
        self._cgroup = memory.find_cgroup()
        self._totals = Totals()
        self._pending: tuple[dict[str, Any], Lap] | None = None
        self._file: Any = None
        self._bar: Any = None
        self._began_s = time.perf_counter()

    def __enter__(self) -> "Recorder":
        """Open the files, write the `run` event, start the clock."""
        self._sampler.__enter__()
        if self._world.rank == 0:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            path = self._output_dir / "metrics.jsonl"
            self._file = path.open("w", encoding="utf-8", buffering=1)
            self._bar = _build_bar(self._num_steps, self._has_bar)
        info = {"num_ranks": self._world.size, "versions": versions(self._world.device)}
        self.event("run", {**info, **self._run_info})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last step and the summary, also when the run failed."""
        self.close(is_complete=kind is None)

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step: write the line of the step before, keep this one for later.

        Args:
            record: step (from 1), epoch, learning_rate as numbers; loss and grad_norm of the
                global batch as numbers or 0-d tensors, read one step later: do not write into
                them meanwhile; num_trained_tokens and num_tokens of THIS rank, summed here.
                More fields are written as they are.
        """
        self.clock.mark("other")
        lap = self.clock.lap()
        mine = memory.process_memory(self._world.device, self._sampler)
        mine["host_pinned_gib"] += self._registered_gib
        values = [*mine.values(), *(float(record[name]) for name in COUNTS)]
        rows = self._world.gather(values)
        if self._world.rank == 0:
            self._write_pending()
            sums = {
                name: int(sum(row[i] for row in rows)) for i, name in enumerate(COUNTS, len(mine))
            }
            ranks = [dict(zip(mine, row, strict=False)) for row in rows]
            host = {**memory.machine_memory(self._cgroup)}
            host["host_peak_used_gib"] = max(
                self._sampler.peak_used_gib, host["host_used_gib"] or 0
            )
            self._pending = ({**record, **sums, "ranks": ranks, "host": host}, lap)
        self.clock.mark("record")

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Write a line that is not a step: {"event": name, **values}.

        Call it between two steps, when what it tells of is over: the time since the last step is
        not counted to the next one.

        Args:
            name: "load", "eval", ...
            values: numbers, text, lists and dicts; 0-d tensors are read at once.
        """
        if self._world.rank == 0:
            self._write_pending()
            line = {"event": name, **values}
            self._write(line)
            self._totals.events += [line] if name != "run" else []
        self.clock.restart()

    def say(self, text: str) -> None:
        """Print a line on rank 0, after the steps so far and without breaking the bar."""
        if self._world.rank == 0:
            self._write_pending()
            tqdm.write(text)

    def close(self, is_complete: bool = True) -> None:
        """Write the pending step and summary.json, end the bar and the thread; twice is harmless.

        Args:
            is_complete: False when the run ended by an error or a signal.
        """
        self._sampler.__exit__(None, None, None)
        if self._file is None:
            return
        if is_complete:
            self._write_pending()
        else:
            # After a CUDA error the last loss cannot be read: what was written before must stand.
            with contextlib.suppress(RuntimeError):
                self._write_pending()
        _raise_to(self._totals.host_peaks, {"host_peak_used_gib": self._sampler.peak_used_gib})
        summary = {
            "is_complete": is_complete,
            "total_s": time.perf_counter() - self._began_s,
            **self._totals.summary(),
            "num_ranks": self._world.size,
            "versions": versions(self._world.device),
            **self._run_info,
        }
        _write_json(self._output_dir / "summary.json", _plain(summary))
        self._bar.close()
        self._file.close()
        self._file = None

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (record, lap), self._pending = self._pending, None
        phases = lap.seconds()
        step_s = sum(phases.values())
        times = {
            "tokens_per_s": record["num_tokens"] / step_s if step_s else 0.0,
            "step_s": step_s,
            **{f"{phase}_s": seconds for phase, seconds in phases.items()},
        }
        memories = {name: record.pop(name) for name in ("ranks", "host")}
        line = _plain({**record, **times})
        nonfinite = [name for name in record if line[name] is None and record[name] is not None]
        line |= {"nonfinite": nonfinite} if nonfinite else {}
        line |= _plain(memories)
        self._write(line)
        self._totals.add(line)
        _show(self._bar, line, self._num_steps, statistics.median(self._totals.step_s[-50:]))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_plain(line), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The value as JSON knows it: tensors as numbers, NaN and infinity as None."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | bool | None) else str(value)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _build_bar(num_steps: int, has_bar: bool) -> Any:
    """A progress bar on the terminal; disabled (plain lines instead) elsewhere."""
    is_live = has_bar and sys.stderr.isatty() and "NO_COLOR" not in os.environ
    form = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
    return tqdm(total=num_steps, dynamic_ncols=True, bar_format=form, disable=not is_live)


def _show(bar: Any, line: dict[str, Any], num_steps: int, step_s: float) -> None:
    """Move the bar on, or print a line now and then when nobody watches."""
    loss = math.nan if line["loss"] is None else line["loss"]
    text = f"loss {loss:.3f} {line['tokens_per_s']:,.0f} tok/s"
    card = max(line["ranks"], key=lambda rank: rank["device_peak_reserved_gib"])
    if card["device_total_gib"]:
        text += f" card {card['device_peak_reserved_gib']:.1f}/{card['device_total_gib']:.0f} GiB"
    text += f" host {line['host']['host_used_gib']:.1f}/{line['host']['host_total_gib']:.0f} GiB"
    if not bar.disable:
        bar.set_postfix_str(text, refresh=False)
        bar.update(1)
        return
    step, every = line["step"], max(1, num_steps // MIN_PLAIN_LINES)
    if step % every == 0 or step in (1, num_steps):
        eta = tqdm.format_interval((num_steps - step) * step_s)
        print(f"step {step}/{num_steps} {text} ETA {eta}", flush=True)
