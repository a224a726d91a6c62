"""Where the quantized bytes of each decoder layer lie between their uses, and weight streaming.

Streamed layers lie in host memory, and whole layers are copied to the GPU one layer ahead. The
memory is a rank's own, or one copy for all ranks of a machine. `torch.pin_memory` rounds every
block to a power of two; registering a mapping does not. What has no room there is read from files,
layer by layer, into a ring in that memory.
"""

import dataclasses
import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import DISK, TrainConfig
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, UserError, one_line_of
from fsdp_qlora.hardware import GIB, host_limit_gib, host_used_gib, pss_gib
from fsdp_qlora.model import disk
from fsdp_qlora.planning import fit, rows
from fsdp_qlora.planning import memory as plans
from fsdp_qlora.planning import sizes as planned
from fsdp_qlora.planning.run import WORDS
from fsdp_qlora.planning.sizes import NUM_RING_SLOTS, NUM_SLOTS, STREAMED, Setting, setting_of

# Where a layer's bytes lie -> what that means, for the user.
PLACEMENTS: dict[str, str] = WORDS["placements"]
# A CPU rank may take so much more than the plan says (1.4 B parameters, quantized there: 0.27 GiB).
SPARE_GIB = 0.4
GROUPS = ("sharded", "offloaded")  # an FSDP group: a slice on every rank, gathered for use


class HostBytes:
    """One block of host memory, pinned at its exact size where there is a GPU.

    Attributes:
        bytes: uint8 [nbytes].
        pinned_bytes: nbytes, or 0.
    """

    def __init__(self, mapping: mmap.mmap, pin: bool) -> None:
        """Take over a mapping.

        Args:
            mapping: the memory; it lives as long as `bytes` or a view of it.
            pin: page-lock it.

        Raises:
            UserError: it cannot be pinned (code 3).
        """
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self.pinned_bytes = len(mapping) if pin else 0
        if not pin:
            return
        cudart, address = torch.cuda.cudart(), self.bytes.data_ptr()
        if int(cudart.cudaHostRegister(address, len(mapping), 0)):
            got = f"{len(mapping) / GIB:.1f} GiB of host memory could not be pinned"
            rule = "offloaded weights are copied to the GPU from pinned memory"
            remedy = "raise the limit (ulimit -l unlimited) or free host memory; "
            raise UserError(got, rule, remedy + "or --use_cpu_offload false", ENVIRONMENT)
        # The driver must forget the pages before another mapping gets their address.
        release = weakref.finalize(mapping, cudart.cudaHostUnregister, address)
        release.atexit = False


def private(nbytes: int, pin: bool, folder: Path | None = None) -> HostBytes:
    """Memory of this process alone.

    Args:
        nbytes: its size.
        pin: page-lock it.
        folder: a file in it, without a name, instead: the system writes what it has no room for.
    """
    if folder is None:
        return HostBytes(mmap.mmap(-1, nbytes), pin)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # or a full disk would kill the process later
        return HostBytes(mmap.mmap(file.fileno(), nbytes), False)


def shared(nbytes: int, pin: bool, world: World) -> tuple[str, HostBytes | None]:
    """Memory that all ranks of a machine see.

    It has no name anywhere (Linux: memfd), so that nothing is left behind however the ranks end,
    and no limit of /dev/shm applies, only that of the machine or container.

    Args:
        nbytes: its size.
        pin: page-lock it, each rank for itself.
        world: the ranks; all must call.

    Returns:
        Why there is none, the same on every rank, or ""; and the memory.
    """
    memory: HostBytes | None = None
    refusal, fd, place, first = "", -1, "", world.peers[0]
    try:
        if world.rank == first:
            fd = os.memfd_create("fsdp_qlora")
            os.ftruncate(fd, nbytes)
            place = f"/proc/{os.getpid()}/fd/{fd}"
    except (OSError, AttributeError) as error:
        refusal = f"no shared memory: {error}"
    place = world.gather_objects(place)[first]
    try:
        if world.rank != first and place:
            fd = os.open(place, os.O_RDWR)
        if fd >= 0 and place:
            memory = HostBytes(mmap.mmap(fd, nbytes), pin)
    except OSError as error:
        refusal = f"rank {world.rank} cannot map the memory of rank {first}: {error}"
    except UserError as error:
        refusal = error.got
    refusals = [text for text in world.gather_objects(refusal) if text]  # all have opened it now
    if fd >= 0:
        os.close(fd)
    return (refusals[0], None) if refusals else ("", memory)


class Spill:
    """A file without a name for the layers that no cache keeps.

    Attributes:
        spans: (path, offset, bytes) of each.
    """

    def __init__(self, sizes: Sequence[int], folder: Path, world: World) -> None:
        """Make room; all ranks of a machine see one file.

        Args:
            sizes: bytes of each layer.
            folder: where it lies; as long as the first rank lives.
            world: the ranks; all must call.

        Raises:
            UserError: the disk has no room (code 3).
        """
        starts = [0, *itertools.accumulate(map(disk.slot_bytes, sizes))]
        got = f"{starts[-1] / GIB:.1f} GiB of quantized layers in {folder}"
        remedy = "give --output_dir or --quant_cache on a disk with room"

        def make() -> str:
            with one_line_of(got, remedy, ENVIRONMENT, "{}: streamed layers must lie there"):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
                os.posix_fallocate(file.fileno(), 0, starts[-1])
            return f"/proc/{os.getpid()}/fd/{file.fileno()}"

        first = world.peers[0]
        place = world.each(lambda: make() if world.rank == first else "")
        path = Path(world.gather_objects(place)[first])
        self.spans = [(path, start, size) for start, size in zip(starts, sizes, strict=False)]

    def write(self, number: int, quantized: torch.Tensor) -> None:
        """Write one layer.

        Args:
            number: of the layer among those of the file.
            quantized: uint8 [bytes], any device.
        """
        path, start, _ = self.spans[number]
        with path.open("r+b") as file:
            file.seek(start)
            file.write(quantized.cpu().numpy().data)
            file.flush()
            os.fdatasync(file.fileno())


def copy(
    target: torch.Tensor,
    source: torch.Tensor,
    stream: torch.cuda.Stream | None,
    ready: torch.cuda.Event | None = None,
) -> torch.cuda.Event | None:
    """Copy between host and GPU while the GPU computes.

    Args:
        target, source: of one shape.
        stream: that copies, after all that is enqueued now; None: the copy is made at once.
        ready: the moment at which it may begin instead.

    Returns:
        The moment at which it is done; None: it is.
    """
    if stream is None:
        target.copy_(source)
        return None
    if ready is None:
        ready = torch.cuda.current_stream().record_event()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return stream.record_event(torch.cuda.Event(blocking=True))  # whoever waits sleeps


class Streamer:
    """The slots of one GPU (or of a CPU rank, which copies too, but in line).

    Every layer has its slot (its number modulo the number of slots), so neighbours never share one.
    Whoever reads a layer says by that where the computation is: forward, recomputation and
    backward, with or without checkpointing, evaluation, generation alike. The layers that come next
    in the direction of travel are fetched into the slots that have just become free, on a stream of
    their own. The host waits for nothing but the disk. At the turn from forward to backward, and
    from a step to the next, the slots hold what is needed first.

    Attributes:
        sources: uint8 [nbytes] of each streamed layer, on the host; None of those on disk; given
            after the slots are made.
        slots: uint8 [bytes of the largest layer] each, on the device.
        sizes: bytes of each layer that is streamed.
    """

    def __init__(self, sizes: Sequence[int], num_slots: int, device: torch.device) -> None:
        """Allocate the slots.

        Args:
            sizes: bytes of each layer that is streamed.
            num_slots: at least 2: one at work, the others being filled.
            device: of the rank.
        """
        self.sources: Sequence[torch.Tensor | None] = ()
        self.num_layers = len(sizes)
        self.slots = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device)
            for _ in range(min(num_slots, len(sizes)))
        ]
        self.sizes = sizes
        self._held = [-1] * len(self.slots)  # which layer lies, or is being copied, in a slot
        self._at = -1  # the layer read last
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._filled: list[torch.cuda.Event | Future | None] = [None] * len(self.slots)
        self._ring: disk.Ring | None = None

    def open(self, ring: disk.Ring, memory: torch.Tensor, owner: object) -> None:
        """Say where the layers come from that are on disk.

        Args:
            ring: reads them, in their order.
            memory: uint8, its memory.
            owner: of the files, which are in use from now on.
        """
        self._ring, self._memory, self._owner = ring, memory, owner
        on_disk = [layer for layer, source in enumerate(self.sources) if source is None]
        self._numbers = {layer: number for number, layer in enumerate(on_disk)}
        self._carries = disk.worker(self)

    def read(self, layer: int) -> torch.Tensor:
        """The bytes of a layer, valid for what is computed until another layer is read.

        Args:
            layer: index into `sources`.

        Returns:
            Its slot, uint8; the layer lies at its start.
        """
        if layer != self._at:
            step = 1 if layer == (self._at + 1) % self.num_layers else -1
            self._at = layer
            if self._ring is not None:
                way = range(layer, self.num_layers if step > 0 else -1, step)
                ahead = (self._numbers[i] for i in way if i in self._numbers)
                self._ring.want(itertools.islice(ahead, self._ring.num_slots))
            for ahead_by in range(len(self.slots)):
                self._fetch(layer + step * ahead_by)
            filled = self._filled[layer % len(self.slots)]
            filled = filled.result() if isinstance(filled, Future) else filled
            if filled is not None:
                torch.cuda.current_stream().wait_event(filled)
        return self.slots[layer % len(self.slots)]

    def _fetch(self, layer: int) -> None:
        slot = layer % len(self.slots)
        if not 0 <= layer < self.num_layers or self._held[slot] == layer:
            return
        self._held[slot], last = layer, self._filled[slot]
        if isinstance(last, Future):
            last.result()  # or it would overwrite this one
        # What used the slot so far has been enqueued: this layer is another, and it was read later.
        source, target = self.sources[layer], self.slots[slot][: self.sizes[layer]]
        if source is not None:
            self._filled[slot] = copy(target, source, self._copies)
            return
        assert self._ring is not None
        number, filled = self._numbers[layer], Future[Any]()
        ready = torch.cuda.current_stream().record_event() if self._copies is not None else None
        taken = self._ring.taken(number, self._ring.book(number))
        self._carries.put(partial(self._carry, taken, target, ready, filled))
        self._filled[slot] = filled

    def _carry(self, taken: Any, target: torch.Tensor, ready: Any, filled: Future) -> None:
        """Copy a layer that comes from disk, in another thread; tell when that is under way."""
        try:
            with taken as place:
                copied = copy(target, self._memory[place], self._copies, ready)
                filled.set_result(copied)
                if copied is not None:
                    copied.synchronize()
        except BaseException as error:  # whoever reads the layer raises it
            if not filled.done():
                filled.set_exception(error)


@dataclasses.dataclass
class Placed:
    """The placement of a model.

    Attributes:
        names: row of PLACEMENTS for each layer.
        note: one line for the user.
        streamer: streams the weights of layers; None when there are none.
        memory: what all ranks share: the ring for layers on disk, then those in memory.
        ring_bytes: of the ring.
        spill: holds the layers on disk where no cache does.
    """

    names: tuple[str, ...]
    note: str
    streamer: Streamer | None = None
    memory: HostBytes | None = dataclasses.field(default=None, repr=False)
    ring_bytes: int = 0
    spill: Spill | None = None

    def layers(self, name: str) -> list[int]:
        """Numbers of the layers with a placement."""
        return [layer for layer, own in enumerate(self.names) if own == name]

    def keep(self, layer: int, flat: torch.Tensor) -> None:
        """Put a streamed layer where it lies; one on disk that the cache has written is there.

        Args:
            layer: its number.
            flat: uint8 [its bytes, or more], any device.
        """
        assert self.streamer is not None
        every = [number for number, name in enumerate(self.names) if name in STREAMED]
        number = every.index(layer)
        source, flat = self.streamer.sources[number], flat[: self.streamer.sizes[number]]
        if source is not None:
            source.copy_(flat)
        elif self.spill is not None:
            self.spill.write(self.layers(DISK).index(layer), flat)

    def open(self, spans: Sequence[tuple[Path, int, int]], owner: object, world: World) -> None:
        """Begin to read the layers on disk.

        Args:
            spans: path, offset and bytes of each; they are written.
            owner: of the files.
            world: the ranks; all must call.

        Raises:
            UserError: see disk.Span (code 5).
        """
        assert self.streamer is not None and self.memory is not None
        memory, files = self.memory.bytes[: self.ring_bytes], [disk.Span(*span) for span in spans]
        place = min(NUM_RING_SLOTS, len(files)), world.local_rank, world.local_size
        self.streamer.open(disk.Ring(files, memory.numpy().data, *place), memory, owner)


def choose(
    info: ModelInfo, cfg: TrainConfig, sizes: Sequence[int], has_cache: bool, world: World
) -> Placed:
    """Place the layers; take the host memory that weight streaming needs before anything is read.

    Args:
        info: the model.
        cfg: see planning.sizes.setting_of; offload_impl "auto" is stream where the ranks of a
            machine can share memory, else fsdp.
        sizes: quantized bytes of each layer.
        has_cache: there is a copy on disk, to read what the host has no room for.
        world: the ranks; all must call and decide the same.

    Returns:
        The placement.

    Raises:
        UserError: streaming was asked for and cannot be, or the disk has no room (code 3).
    """
    whole = planned.trained_whole(info, cfg).layers
    setting = setting_of(cfg, info.num_layers, world.size, whole)
    if not setting.count(*STREAMED):
        names = setting.placements
        return Placed(names, _note(names, " (as asked)" if "offloaded" in names else ""))
    setting = setting.tiered(_num_in_memory(info, cfg, setting, sizes, world))
    names, ring_bytes = setting.placements, 0
    pairs = [pair for pair in zip(names, sizes, strict=True) if pair[0] in STREAMED]
    streamed, on_disk = ([size for own, size in pairs if own == name] for name in STREAMED)
    if on_disk:
        size = min(NUM_RING_SLOTS, len(on_disk)), world.local_size
        ring_bytes = disk.ring_bytes(max(on_disk), *size)
    nbytes = ring_bytes + sum(streamed)
    refusal, memory = shared(nbytes, world.device.type == "cuda", world)
    if refusal and cfg.offload_impl in ("stream", "file"):
        got, remedy = f"--offload_impl {cfg.offload_impl}: {refusal}", "use --offload_impl fsdp"
        rule = "weight streaming needs memory on the host that all ranks of a machine see"
        raise UserError(got, rule, remedy, ENVIRONMENT)
    if memory is None:
        by_fsdp = dataclasses.replace(cfg, offload_impl="fsdp")
        names = setting_of(by_fsdp, info.num_layers, world.size, whole).placements
        return Placed(names, _note(names, f" ({refusal})"))
    num_slots = NUM_SLOTS + ("resident" in names)
    streamer = Streamer([size for _, size in pairs], num_slots, world.device)
    sources = iter(memory.bytes.split([ring_bytes, *streamed])[1:])
    streamer.sources = [None if name == DISK else next(sources) for name, _ in pairs]
    spill = Spill(on_disk, cfg.resolved_output_dir, world) if on_disk and not has_cache else None
    pinned = "pinned, " if memory.pinned_bytes else ""
    place = f" (one copy for all ranks, {pinned}{nbytes / GIB:.2f} GiB)"
    if on_disk:
        where = cfg.resolved_output_dir if spill else "the cache"
        place = f" ({sum(on_disk) / GIB:.2f} GiB in {where}; {pinned}{nbytes / GIB:.2f} GiB shared)"
    return Placed(names, _note(names, place), streamer, memory, ring_bytes, spill)


def _num_in_memory(
    info: ModelInfo, cfg: TrainConfig, setting: Setting, sizes: Sequence[int], world: World
) -> int:
    """How many of the streamed layers have room in memory, the same on every rank."""
    num, is_file = setting.count(*STREAMED), cfg.offload_impl == "file"
    if is_file and cfg.host_budget_gib is None:
        return 0
    pairs = zip(setting.placements, sizes, strict=True)
    nbytes = sum(size for name, size in pairs if name in STREAMED)
    own = dataclasses.replace(setting.tiered(0), machines=world.size // world.local_size)
    table = plans.host(planned.Sizes(info, cfg, world.device.type), own)
    ranks_gib = table.peak_gib - sum(table.gib("load", row) for row in (rows.SYSTEM, rows.FILES))
    by_rank = world.gather_objects((host_limit_gib(), host_used_gib(), pss_gib()))
    limit_gib, used_gib, _ = by_rank[world.peers[0]]
    taken_gib = sum(by_rank[peer][2] for peer in world.peers)
    limit_gib -= used_gib - taken_gib  # by other programs
    if cfg.host_budget_gib is not None:
        limit_gib = min(limit_gib, cfg.host_budget_gib)
    left_gib = limit_gib - max(ranks_gib, taken_gib)
    if world.device.type == "cpu":
        left_gib -= SPARE_GIB * world.local_size
    if is_file or (left_gib + table.gib("load", rows.HOSTED)) * GIB < nbytes:
        left_gib -= fit.MARGIN * limit_gib
        num = max(0, min(num, int(left_gib * GIB * num / nbytes)))
    return min(world.gather_objects(num))


def _note(names: Sequence[str], why: str) -> str:
    counts = {name: names.count(name) for name in PLACEMENTS if name in names}
    return ", ".join(f"{num} layers {PLACEMENTS[name]}" for name, num in counts.items()) + why
