"""Filling the sharded model: stream, quantise, exchange, keep this rank's slice.

Decoder layers are dealt to the ranks in turn: in each round every rank makes the packed bytes of
one layer (from 16-bit files, from the cache, or at random), then one exchange hands every rank its
slice of all of them. No rank ever holds more than three linears in 16 bit (one at work, two read
ahead). Everything else is read by each rank as its own range of bytes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import adapters, host, shard
from fsdp_qlora.model.cache import PackedCache
from fsdp_qlora.model.layout import Layout, put_linear
from fsdp_qlora.model.packed import DecoderBlock
from fsdp_qlora.model.placement import PLACEMENTS, Placed
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.model.skeleton import PackedModel
from fsdp_qlora.model.weights import Weights


@dataclass
class LoadReport:
    """What the load did.

    Attributes:
        seconds: it took.
        read_bytes: from disk by this rank.
        source: of the packed bytes: "files", "random" or "cache".
        pinned_bytes: host memory that this rank page-locked itself.
        fingerprints: layer -> `fingerprint` of the packed bytes that this rank made.
        num_verified: layers whose bytes were compared after a gather, 0 = not asked.
    """

    seconds: float = 0.0
    read_bytes: int = 0
    source: str = "files"
    pinned_bytes: int = 0
    fingerprints: dict[int, int] = field(default_factory=dict)
    num_verified: int = 0

    def __str__(self) -> str:
        """One line for the user."""
        text = f"from {self.source} in {self.seconds:.1f} s"
        if self.read_bytes:
            gib = self.read_bytes / 2**30
            text += f" ({gib:.2f} GiB a rank, {gib / self.seconds:.2f} GiB/s)"
        if self.num_verified:
            text += f"; gathered bytes of all {self.num_verified} layers are exact"
        return text


def fill(
    model: PackedModel,
    weights: Weights,
    cache: PackedCache,
    placed: Placed,
    cfg: Config,
    world: World,
) -> LoadReport:
    """Give every parameter and buffer of a sharded meta model its bytes.

    Args:
        model: from skeleton.build, after adapters.attach and shard.apply.
        weights: where 16-bit tensors come from.
        cache: where packed layers are kept between runs.
        placed: where packed layers lie.
        cfg: seed (of the adapters' starting values).
        world: the ranks; all must call.

    Returns:
        What was done.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or bytes changed on their way
            (code 5); or host memory cannot be pinned (code 3).
    """
    start = time.monotonic()
    info, report = weights.info, LoadReport()
    weights.check_names(_expected_shapes(model, info))
    shares = shard.num_shares(cfg.sharding_strategy, world)
    _fill_packed(model, info, weights, cache, world, placed, shares, report)
    for name, (module, attribute) in model.tensors.items():
        param = getattr(module, attribute)
        rows = shard.local_range(param)
        shard.set_local(module, attribute, weights.read_rows(name, rows, param.dtype, world.device))
    if model.is_tied:
        model.head.weight = model.embedding.get_parameter("weight")
    _move_buffers(model, world.device)
    adapters.initialise(model, cfg.seed, world.device)
    report.num_verified = verify_bytes(model, report.fingerprints, world)
    report.read_bytes = weights.read_bytes + cache.read_bytes
    report.seconds = time.monotonic() - start
    return report


def _expected_shapes(model: PackedModel, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    shapes = {n: tuple(getattr(m, a).shape) for n, (m, a) in model.tensors.items()}
    for layer in range(info.num_layers):
        for linear in info.linears:
            name = f"{info.layers_prefix}.{layer}.{linear.name}.weight"
            shapes[name] = (linear.out_features, linear.in_features)
    return shapes


def _fill_packed(
    model: PackedModel,
    info: ModelInfo,
    weights: Weights,
    cache: PackedCache,
    world: World,
    placed: Placed,
    shares: int,
    report: LoadReport,
) -> None:
    blocks, layer_bytes = list(shard.blocks(model)), model.layout.nbytes
    slice_bytes = -(-layer_bytes // 4 // shares) * 4
    rounds = [
        (name, layers[start : start + world.size])
        for name, layers in ((name, placed.layers(name)) for name in PLACEMENTS)
        if name != "trained"
        for start in range(0, len(layers), world.size)
    ]
    own = [layers[world.rank] for _, layers in rounds if world.rank < len(layers)]
    padded_bytes = slice_bytes * shares
    made = _make_layers(own, model.layout, info, weights, cache, world, padded_bytes)
    report.source = "cache" if cache.is_complete else weights.source
    keep = _Keep(blocks, placed, slice_bytes, world)
    report.pinned_bytes = keep.pinned_bytes
    for name, layers in rounds:
        hooks.reach("load", world.rank)
        if world.rank < len(layers):
            flat = next(made)
            report.fingerprints[layers[world.rank]] = fingerprint(flat[:layer_bytes])
        else:  # fewer layers than ranks are left: take part in the exchange all the same
            flat = torch.zeros(padded_bytes, dtype=torch.uint8, device=world.device)
        keep.layers(name, layers, flat)
    cache.commit(world)
    if placed.streamer is not None and placed.memory is None:
        placed.streamer.sources = cache.map_layers(placed.layers("streamed"))
    world.barrier()  # shared memory is whole on every rank


class _Keep:
    """Puts the packed bytes of a round of layers where their placement says."""

    def __init__(
        self, blocks: list[DecoderBlock], placed: Placed, slice_bytes: int, world: World
    ) -> None:
        self.blocks, self.placed, self.world = blocks, placed, world
        self.slice_bytes = slice_bytes
        pin, num_offloaded = world.device.type == "cuda", len(placed.layers("offloaded"))
        self.pinned_bytes = placed.memory.pinned_bytes if placed.memory else 0
        self.slices: list[torch.Tensor] = []
        if num_offloaded:
            memory = host.private(slice_bytes * num_offloaded, pin)
            self.slices, self.pinned_bytes = (
                list(memory.bytes.split(slice_bytes)),
                memory.pinned_bytes,
            )

    def layers(self, name: str, layers: list[int], flat: torch.Tensor) -> None:
        """Keep one round.

        Args:
            name: their placement.
            layers: one for each rank, or fewer.
            flat: uint8 [padded], what this rank made: the layer in its place of `layers`.
        """
        if name == "streamed":
            streamer, rank = self.placed.streamer, self.world.rank
            if rank < len(layers) and streamer is not None and self.placed.memory is not None:
                number = self.placed.layers(name).index(layers[rank])
                source = streamer.sources[number]
                source.copy_(flat[: source.numel()])
            return
        is_group = PLACEMENTS[name].is_group
        copies = self.world.size * self.slice_bytes // flat.numel()
        whole = flat.repeat(copies) if is_group and copies > 1 else flat
        parts = self.world.exchange(whole) if is_group else self.world.share(flat)
        for layer, part in zip(layers, parts, strict=False):
            first, last = shard.local_range(self.blocks[layer].packed)
            local = self.slices.pop(0).copy_(part) if name == "offloaded" else part.clone()
            local = local[: (last - first) * 4].view(torch.float32)
            shard.set_local(self.blocks[layer], "packed", local)


def _make_layers(
    own: list[int],
    layout: Layout,
    info: ModelInfo,
    weights: Weights,
    cache: PackedCache,
    world: World,
    padded_bytes: int,
) -> Iterator[torch.Tensor]:
    """Yield the packed bytes of this rank's layers, uint8 [padded_bytes] on the rank's device."""
    if cache.is_complete:
        for packed in cache.read_layers(own):
            flat = torch.zeros(padded_bytes, dtype=torch.uint8, device=world.device)
            flat[: packed.numel()] = packed.to(world.device, non_blocking=True)
            yield flat
        return
    names = [
        f"{info.layers_prefix}.{layer}.{linear.name}.weight"
        for layer in own
        for linear in info.linears
    ]
    pack = FORMATS[layout.format_name].pack
    arrays = weights.read_packed(names, world.device) or map(
        pack, weights.read_ahead(names, world.device)
    )
    for layer in own:
        flat = torch.zeros(padded_bytes, dtype=torch.uint8, device=world.device)
        for index in range(len(info.linears)):
            put_linear(flat, layout, index, next(arrays))
        cache.write_layer(layer, flat[: layout.nbytes])
        yield flat


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def fingerprint(flat: torch.Tensor) -> int:
    """Sum all 4-byte words, each times an odd number of its own: any one changed word changes it.

    Args:
        flat: contiguous, a multiple of 4 bytes long, on any device.

    Returns:
        The sum modulo 2^64.
    """
    words, total, piece = flat.view(torch.int32), 0, 2**24
    for start in range(0, words.numel(), piece):
        part = words[start : start + piece].long()
        index = torch.arange(start, start + part.numel(), device=part.device)
        total += int((part * (index * 0x1E3779B97F4A7C15 | 1)).sum())
    return total % 2**64


def verify_bytes(model: nn.Module, own_fingerprints: dict[int, int], world: World) -> int:
    """Gather each layer as training will and compare its bytes with what was packed, on every rank.

    Args:
        model: filled.
        own_fingerprints: layer -> `fingerprint` of what this rank packed.
        world: the ranks; all must call.

    Returns:
        Number of layers compared.

    Raises:
        UserError: bytes differ (code 5), on all ranks together.
    """
    made = {k: v for part in world.gather_objects(own_fingerprints) for k, v in part.items()}
    wrong = []
    packed = [(i, block) for i, block in enumerate(shard.blocks(model)) if block.store is not None]
    for index, block in packed:
        if fingerprint(shard.gathered(block)) != made[index]:
            wrong.append(index)
        shard.release(block)
    by_rank = world.gather_objects(wrong)
    if any(by_rank):
        rank = next(r for r, layers in enumerate(by_rank) if layers)
        raise UserError(
            f"packed bytes of layer {by_rank[rank][0]} changed on rank {rank}",
            "the bytes gathered by FSDP must be those that were packed",
            "report the versions of torch and the GPU driver; training on them would be wrong",
            code=5,
        )
    return len(made)
