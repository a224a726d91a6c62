"""What torch tells of a run: the memory probe before step 1, and traces of a few steps.

The probe, a pass over the longest rows, shows that they fit, and how. It leaves no trace. Every
allocation of the pass is known by the place in the program that made it and by how long it lives,
from the history of torch's own allocator. At the peak of a phase the rows then are what was alive,
byte for byte.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fsdp_qlora import atomic, hardware
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.batches import Batch, Batches, PackedBatches
from fsdp_qlora.data.preferences import Sides
from fsdp_qlora.data.tokens import Sample
from fsdp_qlora.model import shard, skeleton
from fsdp_qlora.planning import rows as names
from fsdp_qlora.training import memory, optim
from fsdp_qlora.training.losses import StepWeights, step_losses

PROFILES = "profiles"  # in the run's directory
WAIT_STEPS, ACTIVE_STEPS, SNAPSHOT_STEPS = 2, 3, 3
MAX_ROWS = 30  # of the table of operations
MAX_EVENTS = 2_000_000
Say = Callable[[str], None]
AfterStep = Callable[[], None]
# Where an allocation was made -> its row; the innermost place that is known counts.
PLACES = {part: names.WORDS["device_rows"][row] for part, row in memory.TABLE["made_in"].items()}
# `_boundary` is called at the end of each of these, in turn, for every pass, and once at the end.
PASS = ("forward", "backward")
room_like = torch.empty_like  # for what the optimizer will keep
AllocatorEvent = dict[str, Any]


def is_wanted(cfg: TrainConfig, device: torch.device) -> bool:
    """Return whether a run begins with a memory probe.

    Args:
        cfg: dry_run.
        device: of this rank.
    """
    return cfg.dry_run == "on" or (cfg.dry_run == "auto" and device.type == "cuda")


def longest_batch(batches: Batches, cfg: TrainConfig, vocab_size: int) -> Batch:
    """A micro-batch as large as any that the data can bring, every token trained.

    Args:
        batches: this rank's.
        cfg: batch_size; context_length, to which packed sequences are filled up.
        vocab_size: rows of the embedding.

    Returns:
        The batch, on the host.
    """
    longest = cfg.context_length if isinstance(batches, PackedBatches) else batches.longest
    ids = np.arange(longest, dtype=np.int32) % vocab_size
    one = Sample(ids, np.ones(longest, bool), label=int(cfg.num_answers == 1))
    rows = [one] * (cfg.batch_size * batches.samples.num_sides)
    return dataclasses.replace(batches.lay(rows), sides=Sides.of(rows) if cfg.num_answers else None)


def run(trained: optim.Trained, batches: Batches, tracker: memory.MemoryTracker) -> str:
    """Prove that the longest rows fit, and learn what comes and goes in a pass.

    Model, optimizer, random numbers and data are afterwards as if it had not been.

    Args:
        trained: what will be trained; all ranks must call.
        batches: this rank's.
        tracker: of the run; gets what comes and goes.

    Returns:
        One line for the user.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    model, world, cfg = trained.model, trained.world, tracker.plan.cfg
    assert isinstance(model, skeleton.QuantizedModel)
    batch, was_training = longest_batch(batches, cfg, tracker.plan.info.vocab_size), model.training
    model.train()
    gpus = [world.device] if world.device.type == "cuda" else []
    with tracker.phase("memory probe"), torch.random.fork_rng(gpus):  # dropout draws as without it
        moments = [room_like(param) for param in trained.params for _ in range(2)]
        with _traced(world.device) as events:
            # the second finds gradients of the first, or graphs that it captures
            has_graphs = any(block.body.graphs is not None for block in shard.blocks(model))
            is_summed = cfg.gradient_accumulation_steps > trained.per_visit
            num_passes = 2 if is_summed or has_graphs else 1
            for number in range(1, num_passes + 1):
                _pass(trained, batch, is_summed, number == num_passes)
            _drop_gradients(trained)
            _boundary(world.device)
        del moments
        world.barrier()  # no rank goes on before all have come through
    model.train(was_training)
    model.set_checkpointing(cfg, world.device)  # CUDA graphs are captured anew
    words = f"probe     {batch.num_tokens:,} tokens at once fit"
    if not tracker.is_cuda:
        return words
    torch.cuda.empty_cache()
    try:
        tracker.set_transients(*told_apart(events))
    except (KeyError, ValueError) as error:  # another torch, another form
        words += f" (rows are not told apart: {type(error).__name__}: {error})"
    return f"{words}: {tracker.taken['memory probe'].allocated_gib:.2f} GiB in tensors"


def _pass(trained: optim.Trained, batch: Batch, keeps_gradients: bool, is_last: bool) -> None:
    """Forward and backward, with marks at their ends."""
    if trained.is_reduced_once:
        shard.reduce_gradients(trained.model, is_last or not keeps_gradients)
    device = trained.world.device
    losses = step_losses(trained, [batch] * trained.per_visit, StepWeights(1.0))[0]
    _boundary(device)
    losses.sum().backward()
    _boundary(device)
    if not keeps_gradients:
        _drop_gradients(trained)


def _drop_gradients(trained: optim.Trained) -> None:
    if any(param.grad is not None for param in shard.trained_parameters(trained.model)):
        shard.collect_gradients(trained.model, trained.params)
    trained.optimizer.zero_grad()


class _Block(NamedTuple):
    """One allocation.

    Attributes:
        nbytes: of it.
        place: row by where it was made, or "".
        start, stop: index of the event that made and freed it; `stop` is large for one that stays.
    """

    nbytes: int
    place: str
    start: int
    stop: int


def _boundary(device: torch.device) -> None:
    """Mark the end of a phase in the history: an allocation that bears this function's name."""
    if device.type == "cuda":
        torch.empty(1, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _traced(device: torch.device) -> Iterator[list[AllocatorEvent]]:
    """Record the allocations of the block.

    Args:
        device: of this rank; a CPU keeps no history.

    Yields:
        A list that holds them at the end.
    """
    events: list[AllocatorEvent] = []
    if device.type != "cuda":
        yield events
        return
    record = torch.cuda.memory._record_memory_history
    record("all", context="alloc", stacks="python", max_entries=MAX_EVENTS, device=device)
    try:
        yield events
        events += next(filter(None, torch.cuda.memory._snapshot(device)["device_traces"]), [])
    finally:
        record(None, device=device)


def told_apart(events: Sequence[AllocatorEvent]) -> tuple[dict[str, names.GibByRow], float]:
    """The rows at the peak of each phase.

    Args:
        events: of one device, in order: dicts of action, addr, size and frames (innermost first).

    Returns:
        (phase -> GiB by row of what was alive at its highest moment and was made since the events
        began, GiB that nobody of ours has made and that stay).

    Raises:
        ValueError: the boundaries are not those of whole passes.
    """
    blocks, ends = _blocks(events)
    if len(ends) < 3 or len(ends) % 2 == 0:
        raise ValueError(f"{len(ends)} boundaries in {len(events)} events")
    found: dict[str, names.GibByRow] = {}
    stays = [block for block in blocks if block.stop > ends[-1] and not block.place]
    blocks = [block for block in blocks if block.stop <= ends[-1] or block.place]
    for number, end in enumerate(ends[:-1]):
        phase, start = PASS[number % 2], ends[number - 1] if number else 0
        alive = _alive_at_peak(blocks, start, end)
        rows: names.GibByRow = {}
        for block in alive:
            row = _row(block, ends)
            rows[row] = rows.get(row, 0.0) + block.nbytes / hardware.GIB
        if sum(rows.values()) >= sum(found.get(phase, {}).values()):
            found[phase] = rows
    return found, sum(block.nbytes for block in stays) / hardware.GIB


def _blocks(events: Sequence[AllocatorEvent]) -> tuple[list[_Block], list[int]]:
    """The allocations, and the indices of the boundaries."""
    open_blocks, blocks, ends = dict[int, _Block](), [], []
    for index, event in enumerate(events):
        action, address = event["action"], event.get("addr", 0)  # no address: an error, a snapshot
        if action == "alloc":
            frames = event.get("frames", ())  # none: no Python was under way
            if any(frame["name"] == _boundary.__name__ for frame in frames[:2]):
                ends.append(index)
                continue
            open_blocks[address] = _Block(event["size"], _place(frames), index, len(events))
        elif action == "free_requested" and address in open_blocks:
            blocks.append(open_blocks.pop(address)._replace(stop=index))
    return [*blocks, *open_blocks.values()], ends


def _place(frames: Sequence[dict[str, Any]]) -> str:
    """Row by the innermost known place; of the head only what its own function makes."""
    for frame, caller in zip(frames, [*frames[1:], {"filename": ""}], strict=False):
        for part, row in PLACES.items():
            is_loss = row != names.LOSS or caller["filename"].endswith("autograd/function.py")
            if part in frame["filename"] and is_loss:
                return row
    return ""


def _row(block: _Block, ends: Sequence[int]) -> str:
    """By where it was made, else by how long it lives."""
    is_kept, is_left = (
        any(block.start < end < block.stop for end in ends[number:-1:2]) for number in (0, 1)
    )  # beyond a forward, beyond a backward
    if block.place == names.BUFFERS and is_left:
        return names.GRADIENTS
    if block.place == names.LOSS and is_kept:
        return names.LAYER
    if block.place == names.LAYER and is_kept and not is_left:  # a graph's output, handed on
        return names.KEPT
    if block.place:
        return block.place
    return names.KEPT if is_kept else names.LAYER


def _alive_at_peak(blocks: Sequence[_Block], start: int, end: int) -> list[_Block]:
    """The allocations that are alive when most is, between two events."""
    changes = np.zeros(end + 2, np.int64)
    for block in blocks:
        changes[min(block.start, end + 1)] += block.nbytes
        changes[min(block.stop, end + 1)] -= block.nbytes
    at = start + int(changes.cumsum()[start : end + 1].argmax())
    return [block for block in blocks if block.start <= at < block.stop]


@contextlib.contextmanager
def profile(cfg: TrainConfig, rank: int, device: torch.device, say: Say) -> Iterator[AfterStep]:
    """Profile the training in the block, if the run asks for it.

    Args:
        cfg: profile, also the steps of warmup before the trace; profile_memory.
        rank: of this process; every rank writes files of its own.
        device: of this rank.
        say: prints a line on rank 0.

    Yields:
        To be called after every optimizer step.
    """
    folder, steps = cfg.resolved_output_dir / PROFILES, itertools.count(1)
    write: AfterStep | None = None
    with contextlib.ExitStack() as stack:
        if cfg.profile_memory and device.type != "cuda":
            say("note      --profile_memory needs a GPU: torch keeps no history of CPU memory")
        elif cfg.profile_memory:
            write = _memory_history(folder, rank, device, say)
            stack.callback(write)  # a run that fails sooner leaves what was held then
        profiler = _profiler(folder, int(cfg.profile), rank, device, say) if cfg.profile else None
        stack.enter_context(profiler or contextlib.nullcontext())

        def after_step() -> None:
            if write is not None and next(steps) == SNAPSHOT_STEPS:
                write()
            if profiler is not None:
                profiler.step()

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
        atomic.write(place / f"rank{rank}_operations.txt", table + "\n")
        say(f"profile   steps up to {found.step_num}, for ui.perfetto.dev: {place}")

    steps = {"wait": WAIT_STEPS, "warmup": num_warmup, "active": ACTIVE_STEPS, "repeat": 1}
    schedule, records = torch.profiler.schedule(**steps), ("record_shapes", "profile_memory")
    wanted: dict[str, Any] = dict.fromkeys((*records, "acc_events"), True)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, **wanted)


def _memory_history(folder: Path, rank: int, device: torch.device, say: Say) -> AfterStep:
    """Record the allocator; what is returned ends that, once, and writes what it held."""
    record = torch.cuda.memory._record_memory_history
    record("all", max_entries=MAX_EVENTS, device=device)

    @functools.cache
    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}_memory.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        record(None, device=device)
        say(f"memory    snapshot for pytorch.org/memory_viz: {path}")

    return write
