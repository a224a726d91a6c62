"""The record of a run: one line per optimizer step in metrics.jsonl, totals in summary.json.

Recording never makes the GPU wait: times are CUDA events, and the loss of step N is read when
step N + 1 has been launched.

A thread of rank 0 for each experiment tracker reads metrics.jsonl as it grows and hands on what
stands in FIGURES and SETTINGS, through accelerate.tracking: figures and choices, no path, no text
of the user's, no secret. Training never waits for it, and when a tracker fails or is out of reach
nothing is lost: metrics.jsonl has it all.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psutil
import torch
from tqdm import tqdm

from fsdp_qlora import arch, atomic, cli, errors, hardware
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, cfg_notes, to_dict
from fsdp_qlora.data import Data
from fsdp_qlora.distributed import exit_report, hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import load, shard
from fsdp_qlora.planning import rows as names
from fsdp_qlora.planning.sizes import count_trained
from fsdp_qlora.record import NUM_WARMUP_STEPS, RUN_FORMAT, hosts_of
from fsdp_qlora.training import memory, objectives

# The phase of the clock that ends at a point of a step.
PHASES = {"data": "data"} | {f"post-{phase}": phase for phase in memory.STEP_PHASES}

MIN_PLAIN_LINES = 20
NUM_SMOOTHED, NUM_RECENT = 20, 50  # steps of the loss and of the time that are shown
MIN_BAR, DUMB_WIDTH, BAR = 8, 80, "{n_fmt}/{total_fmt} {bar} {desc}"  # characters; as tqdm has it
COUNTS = ("num_trained_tokens", "num_tokens")
SUMMED = ("step_s", "tokens_per_s", "loss", "skipped", *COUNTS)
TABLE = memory.TABLE


Marks = list[tuple[str, Any]]  # phase, its end: a CUDA event, or seconds of perf_counter


class Clock:
    """Seconds of each phase of a step, on the device's own time line.

    Every moment belongs to the phase marked at its end, so the phases of a lap sum up to its
    wall time. On a GPU a phase is the time that the GPU spent on it or waited for it.
    """

    def __init__(self, device: torch.device, at_mark: Callable[[str], Any] = str) -> None:
        """Start counting.

        Args:
            device: the device whose current stream is timed; a CPU is timed by perf_counter.
            at_mark: told the name of every phase that ends, by the host's own time.
        """
        self._is_cuda, self._at_mark = device.type == "cuda", at_mark
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

    def lap(self) -> Marks:
        """The marks since the last lap, for `seconds`; the next one begins at the last mark."""
        marks, self._marks = self._marks, self._marks[-1:]
        return marks

    @staticmethod
    def seconds(marks: Marks) -> dict[str, float]:
        """Seconds of every phase, summed over its marks; waits for the last CUDA event.

        Args:
            marks: of a lap; the first one only says where it begins.
        """
        totals: dict[str, float] = {}
        for (_, began), (phase, ended) in itertools.pairwise(marks):
            if isinstance(ended, torch.cuda.Event):
                ended.synchronize()
                totals[phase] = totals.get(phase, 0.0) + began.elapsed_time(ended) / 1e3
            else:
                totals[phase] = totals.get(phase, 0.0) + ended - began
        return totals

    def restart(self) -> None:
        """Forget the time since the last lap (after an evaluation, say)."""
        self._marks = [("", self._now())]


def reach(clock: Clock, rank: int, step: int, point: str) -> None:
    """The one hook of an optimizer step: ends a phase of the clock, shows a sign of life.

    Args:
        clock: whose marks are those of memory too.
        rank: of this process.
        step: that is under way, from 1.
        point: of the step, one of PHASES or of hooks.STEP_POINTS.
    """
    if point in PHASES:
        clock.mark(PHASES[point])
    if point in hooks.STEP_POINTS:
        hooks.reach(point, rank, step)


@dataclass
class Totals:
    """What summary.json is made of, kept up to date line by line.

    Attributes:
        steps: SUMMED -> its value at each step.
        peaks: largest memory figures per rank, in GiB.
        host_peaks: largest memory figures of the machine of rank 0, in GiB.
        hosts: the same of each of several machines, by name.
        events: the lines that are not steps.
    """

    steps: dict[str, list[Any]] = field(default_factory=lambda: {n: [] for n in SUMMED})
    peaks: list[dict[str, float]] = field(default_factory=list)
    host_peaks: dict[str, float] = field(default_factory=dict)
    hosts: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of metrics.jsonl, a step or an event."""
        if "event" in line:
            self.events += [line] if line["event"] != "run" else []
            return
        for name, values in self.steps.items():
            values.append(line.get(name))
        self.peaks += [{} for _ in line["ranks"][len(self.peaks) :]]  # a resumed run may have more
        for peak, rank in zip(self.peaks, line["ranks"], strict=False):
            raise_to(peak, rank)
        raise_to(self.host_peaks, line["host"])
        hosts = line.get("hosts", [])
        self.hosts += [{"name": host["name"]} for host in hosts[len(self.hosts) :]]
        for peak, host in zip(self.hosts, hosts, strict=False):
            raise_to(peak, host)

    def summary(self) -> dict[str, Any]:
        """The totals by name; the median speed leaves out the first steps, which warm up."""
        num_steps, train_s = len(self.steps["step_s"]), sum(self.steps["step_s"])
        found: dict[str, Any] = {"num_steps": num_steps, "train_s": train_s}
        found |= {name: sum(self.steps[name]) for name in COUNTS}
        for name, number in (("steps_per_s", num_steps), ("tokens_per_s", found["num_tokens"])):
            found[name] = number / train_s if train_s else 0.0
        speeds, losses = self.steps["tokens_per_s"], self.steps["loss"] or [None]
        steady = speeds[NUM_WARMUP_STEPS:] or speeds
        found["tokens_per_s_median"] = statistics.median(steady) if steady else 0.0
        found |= {"loss_first": losses[0], "loss_last": losses[-1]}
        found["num_skipped_steps"] = sum(map(bool, self.steps["skipped"]))
        peaks = {"ranks": self.peaks, "host": self.host_peaks, "hosts": self.hosts}
        peaks = {name: figures for name, figures in peaks.items() if figures}
        return found | {"peaks": peaks, "events": self.events}


class Resumed(NamedTuple):
    """The record of a run that goes on.

    Args:
        lines: of metrics.jsonl, up to the checkpoint.
        seconds: that the run had taken.
        step: after which it goes on, on every rank.
    """

    lines: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0
    step: int = 0


def raise_to(peaks: dict[str, float], values: dict[str, Any]) -> None:
    """Keep the higher figure of each name; what is no number is left out.

    Args:
        peaks: figures so far, changed in place.
        values: new ones.
    """
    for name, value in values.items():
        if isinstance(value, int | float):
            peaks[name] = max(peaks.get(name, value), value)


class Recorder:
    """Writes the record of a run on rank 0; every rank must call it in the same order.

    Use as a context manager around the training, and mark the phases of a step on its clock:

        with Recorder(tracker, world, num_steps, {"config": ...}) as recorder:
            ...
            recorder.clock.mark("forward")
            recorder.step({"step": 1, "epoch": 0.1, "loss": loss, ...})

    Attributes:
        resumed: the record that this one goes on with, on the rank that writes.
    """

    def __init__(
        self,
        tracker: memory.MemoryTracker,
        world: World,
        num_steps: int,
        run_info: dict[str, Any],
        resumed: Resumed | None = None,
    ) -> None:
        """Describe the run; nothing is written before the `with` block.

        Args:
            tracker: of this rank's memory, its model loaded; its plan gives the configuration: the
                directory of metrics.jsonl (a former one is replaced) and summary.json.
            world: rank, size, device, gather.
            num_steps: optimizer steps that this run will take.
            run_info: what the summary repeats: the config, the plan, the model's counts.
            resumed: the record that this one goes on with, on the rank that writes.
        """
        self.clock = Clock(world.device, tracker.peaks.mark)
        places = sorted(world.gather_objects((tuple(world.peers), os.uname().nodename)))
        self._machines = dict(places)  # ranks -> name of their host
        self.tracker = tracker
        self._ledger = memory.MemoryLedger(tracker.is_cuda, [*self._machines])
        self._output_dir = tracker.plan.cfg.resolved_output_dir
        self._world, self._num_steps, self._run_info = world, num_steps, run_info
        self._sampler, self._totals = memory.HostSampler(), Totals()
        self._process = psutil.Process()
        self._process.cpu_percent()  # from here on it counts
        self._pending: tuple[dict[str, Any], Marks] | None = None
        self._file: Any = None
        self._unwritten = b""
        self._bar: Any = None
        self._said_s = self._stepped_s = time.monotonic()
        self._over, self._is_reading = threading.Event(), False
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self.resumed = resumed or Resumed()
        self._step, self._began_s = self.resumed.step, time.perf_counter() - self.resumed.seconds

    def __enter__(self) -> "Recorder":
        """Open the files, write the `run` event, start the clock."""
        self._sampler.__enter__()
        if self._world.rank == 0:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            path = self._output_dir / "metrics.jsonl"
            self._file = path.open("ab" if self.resumed.lines else "wb", buffering=0)
            for line in self.resumed.lines:
                self._totals.add(line)
            has_bar = "stdout" not in self.tracker.plan.cfg.log_targets and sys.stderr.isatty()
            size = {"total": self._num_steps, "initial": len(self._totals.steps["step_s"])}
            self._bar = tqdm(**size, disable=not has_bar, bar_format=BAR, dynamic_ncols=True)
            self._waiting.start()
        info: dict[str, Any] = {"run_format": RUN_FORMAT, "num_ranks": self._world.size}
        info["versions"] = hardware.versions(self._world.device)
        is_first = not self.resumed.lines
        self.event("run" if is_first else "resume", info | (self._run_info if is_first else {}))
        self.collect("load")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write the last step and the summary, also when the run failed; say where memory went."""
        if error is not None and not hasattr(error, "__notes__"):
            self.tracker.annotate_oom(error, self._where())
        self._sampler.__exit__(None, None, None)
        if self._file is None:
            return
        is_complete = kind is None
        # After a CUDA error the last loss cannot be read: what was written before must stand.
        with contextlib.suppress(*() if is_complete else (RuntimeError,)):
            self.flush()
        raise_to(self._totals.host_peaks, {"host_peak_used_gib": self._sampler.peak_used_gib})
        summary: dict[str, Any] = {"is_complete": is_complete, "total_s": self.total_s()}
        summary |= {**self._totals.summary(), "num_ranks": self._world.size}
        summary["versions"] = hardware.versions(self._world.device)
        summary |= {"ledger": self._ledger.to_dict(), **self._run_info}
        atomic.write_json(self._output_dir / "summary.json", _plain(summary))
        self._over.set()
        self._waiting.join()
        self._bar.close()
        self._file.close()

    def step(self, record: dict[str, Any], wishes: Sequence[float] = ()) -> list[float]:
        """Record one optimizer step: write the line of the step before, keep this one for later.

        Args:
            record: step (from 1), epoch, learning_rate as numbers; loss and grad_norm of the
                global batch as numbers or 0-d tensors, read one step later: do not write into
                them meanwhile; num_trained_tokens and num_tokens of THIS rank, summed here.
                More fields are written as they are.
            wishes: numbers that the ranks shall agree on, as many on every rank.

        Returns:
            The highest of each wish over all ranks.
        """
        self.clock.mark("other")
        lap = self.clock.lap()
        phases, highest = self.tracker.step()
        mine = memory.process_memory(self._world.device, highest, self._sampler)
        mine["host_pinned_gib"] += self.tracker.pinned_gib
        mine["cpu_cores"] = self._process.cpu_percent() / 100
        counts, host = {name: record[name] for name in COUNTS}, self._host()
        share = self.tracker.share._replace(used_gib=host["host_used_gib"])
        own = (wishes, counts, mine, host, (phases, share))
        every_wish, every_count, *every = zip(*self._world.gather_objects(own), strict=True)
        agreed = [max(column) for column in zip(*every_wish, strict=True)]
        if self._world.rank == 0:
            self._is_reading = True
            self.flush()
            self._is_reading = False
            sums = {name: sum(own[name] for own in every_count) for name in COUNTS}
            self._pending = ({**record, **sums, **self._memories(*every)}, lap)
        self._step, self._stepped_s = record["step"], time.monotonic()
        self.clock.mark("record")
        return agreed

    def total_s(self) -> float:
        """Seconds since the run began, without those between an end and a resume."""
        return time.perf_counter() - self._began_s

    def _where(self) -> str:
        """What is under way, in words."""
        running = self.tracker.running
        if self._step >= self._num_steps:
            return "work after the last step"
        return (f"{running} of" if running else "work before") + f" step {self._step + 1}"

    def _host(self) -> dict[str, Any]:
        """Memory and processors of this machine; None where there is no such limit."""
        host: dict[str, Any] = dict(hardware.machine_memory(self._sampler.cgroup))
        num_cores = host["num_cpu_cores"] = os.cpu_count() or 1
        host["cpu_cores"] = psutil.cpu_percent() / 100 * num_cores
        host["host_peak_used_gib"] = max(self._sampler.peak_used_gib, host["host_used_gib"])
        return host

    def _memories(self, own: Sequence[dict], host: Sequence[dict], rows: Sequence[tuple]) -> dict:
        """What a line says of memory and processors, of each rank and of each machine."""
        tops, host_tops = self._ledger.update(rows, memory.STEP_PHASES)
        ranks = [{**one, "device_rows": top} for one, top in zip(own, tops, strict=True)]
        pairs = zip(self._machines, host_tops, strict=True)
        hosts = [{**host[first], "host_rows": top} for (first, *_), top in pairs]
        named = zip(self._machines.values(), hosts, strict=True)
        several = {"hosts": [{"name": name, **figures} for name, figures in named]}
        return {"ranks": ranks, "host": hosts[0]} | (several if len(hosts) > 1 else {})

    def collect(self, phase: str) -> None:
        """Keep the rows of a phase that happens once and is over; every rank must call.

        Args:
            phase: "load" or "save".
        """
        share = self.tracker.share._replace(used_gib=self.tracker.used_gib[phase])
        self._ledger.update(self._world.gather_objects((self.tracker.phases, share)), (phase,))

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Write a line that is not a step: {"event": name, **values}.

        Call it between two steps, when what it tells of is over: the time since the last step is
        not counted to the next one.

        Args:
            name: "load", "eval", ...
            values: numbers, text, lists and dicts; 0-d tensors are read at once.
        """
        if self._world.rank == 0:
            self.flush()
            self._write({"event": name, **values})
        self.clock.restart()

    def compared(self) -> list[str]:
        """What was predicted beside what was measured, on the rank that writes; else nothing."""
        plan = self.tracker.plan.to_dict()
        return names.comparison(plan, self._ledger.to_dict(), self.tracker.is_cuda)

    def say(self, text: str) -> None:
        """Print a line on rank 0, after the steps so far and without breaking the bar."""
        if self._world.rank == 0:
            self.flush()
            tqdm.write(text)

    def flush(self) -> None:
        """Write the last step, on the rank that writes; waits for its loss."""
        if self._pending is None:
            return
        (record, lap), self._pending = self._pending, None
        phases = Clock.seconds(lap)
        step_s = sum(phases.values())
        speed = record["num_tokens"] / step_s if step_s else 0.0
        times = {f"{phase}_s": seconds for phase, seconds in phases.items()}
        times = {"tokens_per_s": speed, "step_s": step_s, **times}
        memories = {n: record.pop(n) for n in ("ranks", "host", "hosts") if n in record}
        line = _plain({**record, **times})
        nonfinite = [name for name in record if line[name] is None and record[name] is not None]
        line |= {"nonfinite": nonfinite} if nonfinite else {}
        line |= _plain(memories)
        self._write(line)
        self._show_progress(line)

    def _show_progress(self, line: dict[str, Any]) -> None:
        """Move the bar on, or print a line now and then; what is left is steps, nothing else."""
        step, bar, steps = line["step"], self._bar, self._totals.steps
        words = _progress_words(line, steps["loss"][-NUM_SMOOTHED:])
        left_s = statistics.median(steps["step_s"][-NUM_RECENT:]) * (self._num_steps - step)
        left = tqdm.format_interval(left_s)
        if not bar.disable:
            width = bar.dynamic_ncols(bar.fp)[0] or DUMB_WIDTH
            shown = fit([f"{left} left", *words], width - 2 * len(str(self._num_steps)) - MIN_BAR)
            bar.set_description_str(shown, refresh=False)
            bar.update(1)
            return
        every, now_s = max(1, self._num_steps // MIN_PLAIN_LINES), time.monotonic()
        if step % every == 0 or now_s - self._said_s >= cli.LINE_S or step in (1, self._num_steps):
            print(f"step {step}/{self._num_steps} {' '.join(words)} ETA {left}", flush=True)
            self._said_s = now_s

    def _wait(self) -> None:
        """Where there is no bar, say now and then that a long step goes on."""
        while not self._over.wait(max(cli.LINE_S, 1.0) / 3):
            running = "waits for the GPU" if self._is_reading else self.tracker.running
            now_s = time.monotonic()
            if running and self._bar.disable and now_s - self._said_s >= cli.LINE_S:
                where = f"step {self._step + 1}/{self._num_steps} {running}"
                took_s = f"{now_s - self._stepped_s:.0f} s since the last one"
                self._said_s = now_s
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    print(f"{where}, {took_s}", flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        """Count and write a line; what a full disk does not take is tried again with the next."""
        self._totals.add(line)
        was_full = bool(self._unwritten)
        self._unwritten += json.dumps(_plain(line), allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not was_full:
                tqdm.write(f"warning   metrics.jsonl lags behind: {error.strerror}")


def _plain(value: Any) -> Any:
    """The value as JSON knows it: tensors as numbers, NaN and infinity as None."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | bool | None) else str(value)


def _progress_words(line: dict[str, Any], losses: Sequence[float | None]) -> list[str]:
    """Figures of a step, the most wanted first; the loss is the mean of the last steps."""
    known = [loss for loss in losses if loss is not None] if line["loss"] is not None else []
    words = [f"loss {statistics.fmean(known) if known else math.nan:.3f}"]
    words += [f"accuracy {line['accuracy']:.0%}"] if line.get("accuracy") is not None else []
    words += [f"margin {line['margin']:.3g}"] if line.get("margin") is not None else []
    words += [f"lr {line['learning_rate']:.3g}", f"{line['tokens_per_s']:,.0f} tok/s"]
    gpu = max(line["ranks"], key=lambda rank: rank["device_peak_reserved_gib"])
    if gpu["device_total_gib"]:
        words.append(f"GPU {_of(gpu['device_peak_reserved_gib'], gpu['device_total_gib'])}")
    host = max(hosts_of(line), key=lambda host: host["host_used_gib"] / host["host_total_gib"])
    name = f"host {host['name']}" if "name" in host else "host"
    return [*words, f"{name} {_of(host['host_used_gib'], host['host_total_gib'])}"]


def _of(used_gib: float, total_gib: float) -> str:
    return f"{used_gib:.1f}/{total_gib:{'.0f' if total_gib > 9.5 else '.2g'}} GiB"


def fit(words: Sequence[str], num_chars: int) -> str:
    """Return the first of the words, as many as there is room for."""
    return next(t for i in range(len(words), -1, -1) if len(t := " ".join(words[:i])) <= num_chars)


def describe(data: Data, built: load.Built, tracker: memory.MemoryTracker) -> dict[str, Any]:
    """Collect the facts of a run.

    Args:
        data: on what it is trained.
        built: what is trained, and how it came to lie where it does.
        tracker: of this rank's memory, its model loaded; its plan is that of the run.

    Returns:
        For the record, by name; `lines` are what the console shows.
    """
    plan, cfg, info = tracker.plan, tracker.plan.cfg, tracker.plan.info
    trainable, total = count_trained(info, cfg).total, arch.num_params(info)
    allocated_gib, reserved_gib, _ = tracker.taken["load"] if tracker.is_cuda else memory.Peak()
    rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = {"device_peak_allocated_gib": allocated_gib, "device_peak_reserved_gib": reserved_gib}
    host = {"host_peak_rss_gib": rss_gib, "host_peak_used_gib": tracker.used_gib["load"]}
    kernels, cache, placed, loaded = built.model.kernels, built.cache, built.placed, built.loaded
    stores = (block.store for block in shard.blocks(built.model))
    quantized_gib = sum(store.layout.nbytes for store in stores if store) / hardware.GIB
    sizes = {name.removesuffix(".weight"): num for name, num in arch.unquantized(info).items()}
    whole = ", ".join(f"{name} {2 * num / hardware.GIB:.2f} GiB" for name, num in sizes.items())
    facts: dict[str, Any] = {"config": to_dict(cfg), "plan": plan.to_dict()}
    facts |= {"model_type": info.model_type, "num_params": total}
    facts |= {"num_trainable_params": trainable, "packed_gib": quantized_gib}
    facts |= {"load_s": loaded.seconds, "load_source": loaded.source, "load_peaks": device | host}
    facts |= {"kernels": kernels.note, "placement": placed.note, "quant_cache": cache.note}
    shown = facts | device | host | {"cfg": cfg, "info": info, "whole": whole, "loaded": loaded}
    shown |= {"share": trainable / total, "audit": data.audit}
    shown["formats"] = info.formats(cfg.format_name)
    lines = [text.format_map(shown) for text in TABLE["lines"]]
    lines += [f"note      {note}" for note in data.audit.facts["notes"]]
    if plan.found is not None and plan.rows_note:  # what the plan says now that rows are known
        lines.append(f"plan      {plan.rows_note}: {plan.found.host.peak_gib:.1f} GiB on the host")
    lines += [f"note      {note}" for note in cfg_notes(cfg)]
    return facts | {"data": data.audit.facts, "lines": lines}


def print_summary(cfg: TrainConfig, next_steps: list[str]) -> None:
    """Say how long the training took, where the results are, and what to try next.

    Args:
        cfg: gives the directory, with summary.json.
        next_steps: commands.
    """
    done = atomic.read_json(cfg.resolved_output_dir / "summary.json")
    done |= {"out": cfg.resolved_output_dir, "next": "\n          ".join(next_steps)}
    done["what"] = TABLE["saved"][TRAIN_TYPES[cfg.train_type].adapter]
    print(TABLE["summary"].format_map(done), flush=True)


FIGURES = (*TABLE["figures"], *objectives.FIGURES)
HELD_OUT = ("loss", "perplexity", "accuracy", "margin")
_OPTIONS = cli.options(TrainConfig).items()  # a tracker gets those that are no text of the user's
SETTINGS = tuple(name for name, row in _OPTIONS if str not in row.kinds or row.choices)
POLL_S = 1.0
PATIENCE_S = 15.0  # for the trackers to take the rest, once the run is over
SHORT_S = 1.0  # the same, when the run has failed
Say = Callable[[str], None]


class _Quiet:
    """A stream that drops what some threads write: trackio and swanlab print, without a switch."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.muted = stream, set[int]()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() in self.muted else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _follow(name: str, cfg: TrainConfig, stop: threading.Event, tell: Say, quiet: _Quiet) -> None:
    """Hand on every line of a record as it grows; a fault of the tracker ends this, not the run.

    Args:
        name: of the tracker.
        cfg: how the run is named there, and its directory.
        stop: set when no more lines will come.
        tell: shows a line to the user.
        quiet: the standard output.
    """
    quiet.muted.add(threading.get_ident())
    try:
        tracker, step = _open(name, cfg), 0
        for line in _lines(cfg.resolved_output_dir / "metrics.jsonl", stop):
            step = int(line.get("step") or step)
            if values := figures(line):
                tracker.log(values, step=step)
        tracker.finish()
    except BaseException as error:  # wandb leaves by SystemExit too
        failure = errors.brief(error) or type(error).__name__
        quiet.muted.discard(threading.get_ident())
        tell(f"note      {name} failed ({failure}): metrics.jsonl goes on")


def _lines(path: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
    rest, is_over = "", False
    with path.open(encoding="utf-8") as file:
        while not is_over:
            is_over = stop.wait(POLL_S)  # before the look: what was written by then is read
            *whole, rest = (rest + file.read()).split("\n")
            yield from map(json.loads, whole)


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracker gets of a line of metrics.jsonl.

    Args:
        line: a step or an event.

    Returns:
        Figures by name; none of a line that is not for trackers.
    """
    found: dict[str, Any] = {}
    if line.get("event") == "eval":
        found = {f"held_out/{name}": line.get(name) for name in HELD_OUT}
    elif "event" not in line:
        found = {f"train/{name}": line.get(name) for name in FIGURES}
        gpus = [rank.get("device_peak_reserved_gib") or 0.0 for rank in line.get("ranks", ())]
        found |= {"memory/card_gib": max(gpus, default=0.0) or None}
        used_gib = [host.get("host_used_gib") for host in hosts_of({"host": {}, **line})]
        found |= {"memory/host_gib": max(filter(None, used_gib), default=None)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def attach_trackers(cfg: TrainConfig, is_writer: bool, tell: Say = tqdm.write) -> Iterator[None]:
    """Hand the record on while the block runs; nothing where no tracker was asked for.

    The process group must exist: accelerate would make one of its own from the environment.

    Args:
        cfg: its trackers, how the run is named there, and the directory with metrics.jsonl.
        is_writer: this rank writes the record.
        tell: shows a line to the user.
    """
    if not cfg.trackers or not is_writer:
        yield
        return
    quiet, stop, wait_s = _Quiet(sys.stdout), threading.Event(), SHORT_S
    rest = (cfg, stop, tell, quiet)
    threads = [threading.Thread(None, _follow, n, (n, *rest), daemon=True) for n in cfg.trackers]
    with contextlib.redirect_stdout(quiet):
        for thread in threads:
            thread.start()
        try:
            yield
            wait_s = PATIENCE_S
        finally:
            stop.set()
            for thread in threads:
                thread.join(wait_s)
            if slow := " and ".join(thread.name for thread in threads if thread.is_alive()):
                tell(f"note      {slow} has not taken all of it yet: metrics.jsonl has it")
                # Before what the tracker wants to do at the end, and waits.
                atexit.register(exit_report.leave, errors.DONE)


def _open(name: str, cfg: TrainConfig) -> Any:
    """Start a tracker, an accelerate.tracking.GeneralTracker; it may wait for a network."""
    import accelerate
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    accelerate.PartialState(cpu=True)  # a rank of the group that exists; no GPU is touched
    project = name if name == "tensorboard" else cfg.project_name
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **_arguments(name, cfg))
    tracker.start()
    tracker.store_init_configuration({key: getattr(cfg, key) for key in SETTINGS})
    return tracker


def _arguments(name: str, cfg: TrainConfig) -> dict[str, Any]:
    """What keeps a tracker inside the run directory, quiet, and names the run."""
    out_dir = cfg.resolved_output_dir
    named = {"name": out_dir.name, **cfg.tracker_options}
    entity = named.pop("entity", None)
    if name == "wandb":
        import wandb

        known = getattr(wandb.Settings, "model_fields", TABLE[name])  # they differ by release
        quiet = {key: value for key, value in TABLE[name].items() if key in known}
        return {**named, "dir": str(out_dir), "settings": wandb.Settings(**quiet), "entity": entity}
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(out_dir / "trackio"))  # read at import
        return {**named, **TABLE[name]}
    if name == "swanlab":
        import swanlab

        probe = swanlab.Settings.Probe(**TABLE[name])
        terminal = swanlab.Settings.Terminal(proxy_type="none")
        settings = swanlab.Settings(interactive=False, probe=probe, terminal=terminal)
        place = {"log_dir": str(out_dir / "swanlab"), "settings": settings}
        return {**named, **place, "workspace": entity}
    shown, own = {"out": out_dir, "name": named["name"]}, TABLE["others"].get(name, {}).items()
    return {key: v.format_map(shown) if isinstance(v, str) else v for key, v in own}
