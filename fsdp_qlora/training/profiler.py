"""A trace of a few steps by torch.profiler, and torch's memory snapshot of a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fsdp_qlora.config import Config

PLACE = "profiles"  # in the run's directory
WAIT_STEPS, ACTIVE_STEPS = 2, 3
SNAPSHOT_STEPS = 3
MAX_EVENTS = 1_000_000
MAX_ROWS = 30
Say = Callable[[str], None]


@contextlib.contextmanager
def attach(cfg: Config, rank: int, device: torch.device, say: Say) -> Iterator[Callable[[], None]]:
    """Profile the training in the block, if the run asks for it.

    Args:
        cfg: profile, also the steps of warmup before the trace; profile_memory.
        rank: of this process; every rank writes files of its own.
        device: of this rank.
        say: prints a line on rank 0.

    Yields:
        To be called after every optimizer step.
    """
    folder, calls = cfg.resolved_output_dir / PLACE, list[Callable[[], None]]()
    with contextlib.ExitStack() as stack:
        if cfg.profile_memory and device.type != "cuda":
            say("note      --profile_memory needs a GPU: torch keeps no history of CPU memory")
        elif cfg.profile_memory:
            calls.append(stack.enter_context(_memory_history(folder, rank, device, say)))
        if cfg.profile:
            profiler = _profiler(folder, int(cfg.profile), rank, device, say)
            calls.append(stack.enter_context(profiler).step)

        def after_step() -> None:
            for call in calls:
                call()

        yield after_step


def _profiler(
    folder: Path, num_warmup: int, rank: int, device: torch.device, say: Say
) -> torch.profiler.profile:
    """A profiler that writes a trace, allocations in it, and a table of the operations."""

    def write(found: torch.profiler.profile) -> None:
        place = folder / f"step-{found.step_num}"
        place.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(place / f"rank{rank}_trace.json.gz"))
        averages = found.key_averages(group_by_input_shape=True)
        table = averages.table(sort_by=f"self_{device.type}_time_total", row_limit=MAX_ROWS)
        (place / f"rank{rank}_operations.txt").write_text(table + "\n", encoding="utf-8")
        say(f"profile   steps up to {found.step_num}, for ui.perfetto.dev: {place}")

    return torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=WAIT_STEPS, warmup=num_warmup, active=ACTIVE_STEPS, repeat=1
        ),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
        acc_events=True,
    )


@contextlib.contextmanager
def _memory_history(
    folder: Path, rank: int, device: torch.device, say: Say
) -> Iterator[Callable[[], None]]:
    """Record the allocator over the first steps; also what it held when the run fails in them."""
    num_left = [SNAPSHOT_STEPS]
    record = torch.cuda.memory._record_memory_history
    record("all", max_entries=MAX_EVENTS, device=device)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}_memory.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        record(None, device=device)
        say(f"memory    snapshot for pytorch.org/memory_viz: {path}")

    def after_step() -> None:
        num_left[0] -= 1
        if num_left[0] == 0:
            write()

    try:
        yield after_step
    finally:
        if num_left[0] > 0:
            write()
