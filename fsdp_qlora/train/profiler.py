"""Looking inside: traces of torch.profiler on the steps asked for, and torch's memory snapshot."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fsdp_qlora.config import Config

SNAPSHOT_STEPS = 3
MAX_EVENTS = 1_000_000
MOST_ROWS = 30
Say = Callable[[str], None]


def cycle(cfg: Config) -> dict[str, int]:
    """Steps that are left out, watched and kept, as torch.profiler.schedule takes them.

    Without --repeat a trace comes every profiling_frequency steps, as in the reference.

    Args:
        cfg: the profiler's options.
    """
    wait = cfg.wait_steps
    if not cfg.repeat:
        wait = cfg.profiling_frequency - cfg.warmup_steps - cfg.active_steps
    return {
        "wait": wait,
        "warmup": cfg.warmup_steps,
        "active": cfg.active_steps,
        "repeat": cfg.repeat,
    }


@contextlib.contextmanager
def watched(cfg: Config, rank: int, device: torch.device, say: Say) -> Iterator[Callable[[], None]]:
    """Profile the training in the block, if the run asks for it.

    Args:
        cfg: the profiler's options.
        rank: of this process; every rank writes files of its own.
        device: of this rank.
        say: prints a line on rank 0.

    Yields:
        To be called after every optimizer step.
    """
    folder = cfg.resolved_output_dir / cfg.profiling_output
    with contextlib.ExitStack() as stack:
        after_step: list[Callable[[], None]] = []
        if cfg.profile_memory and device.type != "cuda":
            say("note      --profile_memory needs a card: torch keeps no history of CPU memory")
        elif cfg.profile_memory:
            snapshot = stack.enter_context(_memory_history(folder, rank, device, say))
            after_step.append(snapshot)
        if cfg.profile:
            found = stack.enter_context(_profile(cfg, folder, rank, device, say))
            after_step.append(found.step)

        def call_all() -> None:
            for call in after_step:
                call()

        yield call_all


def _profile(
    cfg: Config, folder: Path, rank: int, device: torch.device, say: Say
) -> torch.profiler.profile:
    """A profiler that writes its files whenever a cycle ends."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with_stack, with_shapes = cfg.with_stack, cfg.with_shapes

    def write(found: torch.profiler.profile) -> None:
        place = folder / f"step-{found.step_num}"
        place.mkdir(parents=True, exist_ok=True)
        trace = place / f"rank{rank}_trace.json.gz"
        found.export_chrome_trace(str(trace))
        if cfg.export_memory_timeline:
            rows = memory_timeline(trace)
            (place / f"rank{rank}_memory.json").write_text(json.dumps(rows), encoding="utf-8")
        if not cfg.export_trace:
            trace.unlink()
        table = found.key_averages(
            group_by_input_shape=with_shapes, group_by_stack_n=5 if with_stack else 0
        ).table(sort_by=f"self_{device.type}_time_total", row_limit=MOST_ROWS)
        (place / f"rank{rank}_operations.txt").write_text(table + "\n", encoding="utf-8")
        say(f"profile   steps up to {found.step_num}: {place}")

    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(**cycle(cfg)),
        on_trace_ready=write,
        record_shapes=with_shapes,
        profile_memory=cfg.export_memory_timeline,
        with_stack=with_stack,
        acc_events=True,
    )


def memory_timeline(trace: Path) -> dict[str, list]:
    """The allocator's counters over time, as a trace has them.

    torch's own export_memory_timeline is deprecated, and takes minutes.

    Args:
        trace: gzipped, written with profile_memory.

    Returns:
        "columns", and "rows" of such values in order of time.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    rows = [
        [time_us, args["Device Id"], args["Total Allocated"], args["Total Reserved"]]
        for time_us, args in sorted(found, key=lambda pair: pair[0])
    ]
    return {"columns": ["time_us", "device", "allocated_bytes", "reserved_bytes"], "rows": rows}


@contextlib.contextmanager
def _memory_history(
    folder: Path, rank: int, device: torch.device, say: Say
) -> Iterator[Callable[[], None]]:
    """Record the allocator over the first steps; also what it held when the run fails in them."""
    left = [SNAPSHOT_STEPS]
    record = torch.cuda.memory._record_memory_history
    record("all", max_entries=MAX_EVENTS, device=device)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}_memory.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        record(None, device=device)
        say(f"memory    snapshot for pytorch.org/memory_viz: {path}")

    def after_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            write()

    try:
        yield after_step
    finally:
        if left[0] > 0:
            write()
