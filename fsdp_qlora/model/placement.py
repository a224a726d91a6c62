"""Where the quantized bytes of each decoder layer lie between their uses, and weight streaming.

Streamed layers lie in host memory, and whole layers are copied to the GPU one layer ahead. The
memory is a rank's own, or one copy for all ranks of a machine. `torch.pin_memory` rounds every
block to a power of two; registering a mapping does not.
"""

import dataclasses
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import GIB, host_limit_gib, host_used_gib, pss_gib
from fsdp_qlora.planning.sizes import NUM_SLOTS, setting_of, trained_whole

# Where a layer's bytes lie -> what that means, for the user.
PLACEMENTS = {
    "sharded": "sharded over the ranks",
    "offloaded": "sharded over the ranks, slices on the host",
    "streamed": "streamed from the host",
    "resident": "whole on every rank",
    "trained": "trained themselves, nothing quantized",
}
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


def copy(
    target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """Copy between host and GPU while the GPU computes.

    Args:
        target, source: of one shape.
        stream: that copies, after all that is enqueued now; None: the copy is made at once.

    Returns:
        The moment at which it is done; None: it is.
    """
    if stream is None:
        target.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return stream.record_event()


class Streamer:
    """The slots of one GPU (or of a CPU rank, which copies too, but in line).

    Every layer has its slot (its number modulo the number of slots), so neighbours never share one.
    Whoever reads a layer says by that where the computation is: forward, recomputation and
    backward, with or without checkpointing, evaluation, generation alike. The layers that come next
    in the direction of travel are fetched into the slots that have just become free, on a stream of
    their own. The host waits for nothing. At the turn from forward to backward, and from a step to
    the next, the slots hold what is needed first.

    Attributes:
        sources: uint8 [nbytes] of each streamed layer, on the host; given after the slots are made.
        slots: uint8 [bytes of the largest layer] each, on the device.
        num_copies: layers copied so far.
        mapped: the cache whose files `sources` are: its entry is in use as long as they are.
    """

    def __init__(self, sizes: Sequence[int], num_slots: int, device: torch.device) -> None:
        """Allocate the slots.

        Args:
            sizes: bytes of each layer that is streamed.
            num_slots: at least 2: one at work, the others being filled.
            device: of the rank.
        """
        self.sources: Sequence[torch.Tensor] = ()
        self.num_layers = len(sizes)
        self.slots = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device)
            for _ in range(min(num_slots, len(sizes)))
        ]
        self.num_copies = 0
        self.mapped: object = None
        self._held = [-1] * len(self.slots)  # which layer lies, or is being copied, in a slot
        self._at = -1  # the layer read last
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._filled: list[torch.cuda.Event | None] = [None] * len(self.slots)

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
            for ahead in range(len(self.slots)):
                self._fetch(layer + step * ahead)
            filled = self._filled[layer % len(self.slots)]
            if filled is not None:
                torch.cuda.current_stream().wait_event(filled)
        return self.slots[layer % len(self.slots)]

    def _fetch(self, layer: int) -> None:
        slot = layer % len(self.slots)
        if not 0 <= layer < self.num_layers or self._held[slot] == layer:
            return
        self._held[slot] = layer
        self.num_copies += 1
        # What used the slot so far has been enqueued: this layer is another, and it was read later.
        source = self.sources[layer]
        self._filled[slot] = copy(self.slots[slot][: len(source)], source, self._copies)


@dataclasses.dataclass
class Placed:
    """The placement of a model.

    Attributes:
        names: row of PLACEMENTS for each layer.
        note: one line for the user.
        streamer: streams the weights of layers; None when there are none.
        memory: the shared copy of those layers; None when they are mapped from the cache.
    """

    names: tuple[str, ...]
    note: str
    streamer: Streamer | None = None
    memory: HostBytes | None = dataclasses.field(default=None, repr=False)

    def layers(self, name: str) -> list[int]:
        """Numbers of the layers with a placement."""
        return [layer for layer, own in enumerate(self.names) if own == name]


def choose(
    info: ModelInfo, cfg: TrainConfig, sizes: Sequence[int], has_cache: bool, world: World
) -> Placed:
    """Place the layers; take the host memory that weight streaming needs before anything is read.

    Args:
        info: the model.
        cfg: see planning.sizes.setting_of; offload_impl "auto" is stream where the ranks of a
            machine can share memory, else fsdp.
        sizes: quantized bytes of each layer.
        has_cache: there is a copy on disk, to map what the host has no room for.
        world: the ranks; all must call and decide the same.

    Returns:
        The placement.

    Raises:
        UserError: streaming was asked for and cannot be, or the host has no room (code 3).
    """
    whole = trained_whole(info, cfg).layers
    names = setting_of(cfg, info.num_layers, world.size, whole).placements
    streamed = [size for size, name in zip(sizes, names, strict=True) if name == "streamed"]
    if not streamed:
        return Placed(names, _note(names, " (as asked)" if "offloaded" in names else ""))
    nbytes = sum(streamed)
    refusal, memory = _host_copy(nbytes, cfg, has_cache, world)
    if refusal and cfg.offload_impl == "stream":
        got, remedy = f"--offload_impl stream: {refusal}", "use --offload_impl fsdp"
        rule = "weight streaming needs one copy in host memory that all ranks of a machine see"
        raise UserError(got, rule, remedy, ENVIRONMENT)
    if refusal:
        by_fsdp = dataclasses.replace(cfg, offload_impl="fsdp")
        names = setting_of(by_fsdp, info.num_layers, world.size, whole).placements
        return Placed(names, _note(names, f" ({refusal})"))
    streamer = Streamer(streamed, NUM_SLOTS + ("resident" in names), world.device)
    place = " (mapped from the cache: the host has no room for a copy)"
    if memory is not None:
        streamer.sources = memory.bytes.split(streamed)
        pinned = "pinned, " if memory.pinned_bytes else ""
        place = f" (one copy for all ranks, {pinned}{nbytes / GIB:.2f} GiB)"
    return Placed(names, _note(names, place), streamer, memory)


def _host_copy(
    nbytes: int, cfg: TrainConfig, has_cache: bool, world: World
) -> tuple[str, HostBytes | None]:
    """(why weights cannot be streamed or "", the memory or None for mapped files)."""
    shortage = _shortage(nbytes, cfg.host_budget_gib, world)
    if shortage and has_cache:
        return "", None
    if shortage:
        got = f"{nbytes / GIB:.1f} GiB of quantized layers on the host"
        remedy = "free host memory, give --resident_layers, or let --quant_cache keep them on disk"
        raise UserError(got, f"only {shortage}", remedy, ENVIRONMENT)
    return shared(nbytes, world.device.type == "cuda", world)


def _shortage(nbytes: int, budget_gib: float | None, world: World) -> str:
    """What there is on a machine with less than `nbytes`, else "": the same on every rank."""
    free_gib = host_limit_gib() - host_used_gib()
    by_rank = world.gather([free_gib, 0.0 if budget_gib is None else pss_gib()])
    free_gib = by_rank[world.peers[0]][0]
    words = f"{free_gib:.1f} GiB of host memory are free" if free_gib * GIB < nbytes else ""
    if budget_gib is not None:
        left_gib = max(budget_gib - sum(by_rank[peer][1] for peer in world.peers), 0.0)
        if left_gib * GIB < nbytes:
            words = f"{left_gib:.1f} GiB are left of --host_budget_gib {budget_gib:g}"
    return next(filter(None, world.gather_objects(words)), "")


def _note(names: Sequence[str], why: str) -> str:
    counts = {name: names.count(name) for name in PLACEMENTS if name in names}
    parts = [f"{count} layers {PLACEMENTS[name]}" for name, count in counts.items()]
    return ", ".join(parts) + why
