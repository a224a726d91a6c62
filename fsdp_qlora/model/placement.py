"""Where the quantized bytes of each decoder layer lie between their uses."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import GIB, machine_memory, pss_gib
from fsdp_qlora.model import streaming
from fsdp_qlora.model.layer import DecoderBlock, Layout
from fsdp_qlora.model.streaming import Streamer
from fsdp_qlora.planning.sizes import NUM_SLOTS, setting_of


@dataclass(frozen=True)
class Placement:
    """A row of PLACEMENTS.

    Attributes:
        is_group: the bytes are an FSDP group, a slice on every rank, gathered for use.
        is_on_host: they lie in host memory.
        meaning: for the user.
    """

    is_group: bool
    is_on_host: bool
    meaning: str


PLACEMENTS = {
    "sharded": Placement(True, False, "sharded over the ranks"),
    "offloaded": Placement(True, True, "sharded over the ranks, slices on the host"),
    "streamed": Placement(False, True, "streamed from the host"),
    "resident": Placement(False, False, "whole on every rank"),
    "trained": Placement(False, False, "trained themselves, nothing quantized"),
}


@dataclass
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
    memory: streaming.HostBytes | None = field(default=None, repr=False)

    def layers(self, name: str) -> list[int]:
        """Numbers of the layers with a placement."""
        return [layer for layer, own in enumerate(self.names) if own == name]

    @property
    def rows(self) -> list[Placement]:
        """The placement of each layer."""
        return [PLACEMENTS[name] for name in self.names]

    def attach(self, blocks: Sequence[DecoderBlock]) -> None:
        """Let layers with weight streaming read their slots; they have no parameter any more.

        Args:
            blocks: of a model on the meta device.
        """
        for number, layer in enumerate(self.layers("streamed")):
            assert self.streamer is not None
            blocks[layer].quantized = None  # type: ignore[assignment]
            blocks[layer].layer_store.read = partial(self.streamer.read, number)


def choose(
    layout: Layout,
    num_layers: int,
    cfg: TrainConfig,
    has_cache: bool,
    world: World,
    whole: Sequence[int] = (),
) -> Placed:
    """Place the layers; take the host memory that weight streaming needs before anything is read.

    Args:
        layout: of the quantized bytes of a layer.
        num_layers: decoder layers.
        cfg: see plan.sizes.setting_of; offload_impl "auto" is stream on one machine where memory
            can be shared, else fsdp.
        whole: layers that are trained themselves.
        has_cache: there is a copy on disk, to map what the host has no room for.
        world: the ranks; all must call and decide the same.

    Returns:
        The placement.

    Raises:
        UserError: streaming was asked for and cannot be, or the host has no room (code 3).
    """
    names = setting_of(cfg, num_layers, world.size, whole).placements
    num_streamed = names.count("streamed")
    if not num_streamed:
        return Placed(names, _note(names, " (as asked)" if "offloaded" in names else ""))
    nbytes = num_streamed * layout.nbytes
    refusal, memory = _host_copy(nbytes, cfg, has_cache, world)
    if refusal and cfg.offload_impl == "stream":
        got, remedy = f"--offload_impl stream: {refusal}", "use --offload_impl fsdp"
        rule = "weight streaming needs one copy in host memory that all ranks of a machine see"
        raise UserError(got, rule, remedy, ENVIRONMENT)
    if refusal:
        by_fsdp = dataclasses.replace(cfg, offload_impl="fsdp")
        names = setting_of(by_fsdp, num_layers, world.size, whole).placements
        return Placed(names, _note(names, f" ({refusal})"))
    num_slots = NUM_SLOTS + ("resident" in names)
    streamer = Streamer(num_streamed, layout.nbytes, num_slots, world.device)
    place = " (mapped from the cache: the host has no room for a copy)"
    if memory is not None:
        streamer.sources = memory.bytes.split(layout.nbytes)
        pinned = "pinned, " if memory.pinned_bytes else ""
        place = f" (one copy for all ranks, {pinned}{nbytes / GIB:.2f} GiB)"
    return Placed(names, _note(names, place), streamer, memory)


def _host_copy(
    nbytes: int, cfg: TrainConfig, has_cache: bool, world: World
) -> tuple[str, streaming.HostBytes | None]:
    """(why weights cannot be streamed or "", the memory or None for mapped files)."""
    if world.size != world.local_size:
        return "the ranks are on several machines", None
    shortage = _shortage(nbytes, cfg.host_budget_gib, world)
    if shortage and has_cache:
        return "", None
    if shortage:
        got = f"{nbytes / GIB:.1f} GiB of quantized layers on the host"
        remedy = (
            "free host memory, give --resident_layers N, or let --quant_cache keep them on disk"
        )
        raise UserError(got, f"only {shortage}", remedy, ENVIRONMENT)
    memory = streaming.shared(nbytes, world.device.type == "cuda", world)
    return (memory, None) if isinstance(memory, str) else ("", memory)


def _shortage(nbytes: int, budget_gib: float | None, world: World) -> str:
    """What there is when it is less than `nbytes`, else "": the same on every rank."""
    if budget_gib is not None:
        used_gib = sum(value for (value,) in world.gather([pss_gib()]))
        if (budget_gib - used_gib) * GIB < nbytes:
            left_gib = max(budget_gib - used_gib, 0.0)
            return f"{left_gib:.1f} GiB are left of --host_budget_gib {budget_gib:g}"
    now = machine_memory()
    free_gib = now["host_available_gib"] or 0.0
    if now["cgroup_limit_gib"] is not None:
        free_gib = min(free_gib, now["cgroup_limit_gib"] - (now["cgroup_used_gib"] or 0.0))
    free_gib = world.gather([free_gib])[0][0]
    return f"{free_gib:.1f} GiB of host memory are free" if free_gib * GIB < nbytes else ""


def _note(names: Sequence[str], why: str) -> str:
    counts = {name: names.count(name) for name in PLACEMENTS if name in names}
    parts = [f"{count} layers {PLACEMENTS[name].meaning}" for name, count in counts.items()]
    return ", ".join(parts) + why
