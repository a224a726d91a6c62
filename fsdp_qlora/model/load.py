"""A model from nothing to filled: shape, placement, then bytes from files, cache or at random.

Decoder layers are dealt to the ranks of each machine in turn: in each round every rank makes the
quantized bytes of one layer (from 16-bit files, from the cache, or at random), then one exchange
hands every rank of the machine its slice of all of them. No rank ever holds more than three linears
in 16 bit (one at work, two read ahead). Everything else is read by each rank as its own range of
bytes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from fsdp_qlora import arch, cli, config, errors, hardware
from fsdp_qlora.arch.targets import find_targets
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import adapters, placement, quantize, shard, skeleton, weights
from fsdp_qlora.model.weights import QuantizedCache, Weights
from fsdp_qlora.planning.sizes import STREAMED, has_adapters, trained_whole


@dataclass
class LoadReport:
    """What the load did.

    Attributes:
        seconds: it took.
        read_bytes: from disk by this rank.
        source: of the quantized bytes: "files", "random" or "cache".
        pinned_bytes: host memory that this rank page-locked itself.
        num_verified: layers whose bytes were compared after a gather.
    """

    seconds: float = 0.0
    read_bytes: int = 0
    source: str = "files"
    pinned_bytes: int = 0
    num_verified: int = 0

    def __str__(self) -> str:
        """One line for the user."""
        text = f"from {self.source} in {self.seconds:.1f} s"
        if self.read_bytes:
            gib = self.read_bytes / hardware.GIB
            text += f" ({gib:.2f} GiB a rank, {gib / self.seconds:.2f} GiB/s)"
        if self.num_verified:
            text += f"; gathered bytes of all {self.num_verified} layers are exact"
        return text


@dataclass(frozen=True)
class Built:
    """A model that is sharded; it can run when it is filled.

    Attributes:
        model: its adapters attached, at their starting values when it is filled.
        cache, placed: where its quantized bytes come from and lie.
        loaded: how its bytes came.
    """

    model: skeleton.QuantizedModel
    cache: QuantizedCache
    placed: placement.Placed
    loaded: LoadReport = field(default_factory=LoadReport)


def fill(built: Built, source: Weights, cfg: config.TrainConfig, world: World) -> Built:
    """Give every parameter and buffer of a sharded meta model its bytes.

    Args:
        built: of `shape`.
        source: where 16-bit tensors come from.
        cfg: seed (of the adapters' starting values), sharding_strategy.
        world: the ranks; all must call.

    Returns:
        The same, and what was done.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or bytes changed on their way
            (code 5); or host memory cannot be pinned (code 3).
    """
    start, model, cache = time.monotonic(), built.model, built.cache
    shapes = {n: tuple(getattr(m, a).shape) for n, (m, a) in model.tensors.items()}
    layouts, places = model.layouts, source.info.linear_places()
    shapes |= {name: layouts[layer].shapes[index] for name, (layer, index) in places.items()}
    source.check_names(shapes)
    report = LoadReport(source="cache" if cache.is_complete else source.source)
    dealer = _Dealer(built, source, shard.num_shares(cfg.sharding_strategy, world), world)
    fingerprints, report.pinned_bytes = dealer.run(), dealer.pinned_bytes
    for name, (module, attribute) in model.tensors.items():
        param = getattr(module, attribute)
        if attribute in module._buffers:  # a bias of a router, in float32 where it is stored so
            whole = next(source.read_ahead([name], world.device))
            is_wide = whole.dtype == torch.float32
            module._buffers[attribute] = whole if is_wide else whole.to(param.dtype)
            continue
        rows = shard.local_range(param)
        shard.set_local(module, attribute, source.read_rows(name, rows, param.dtype, world.device))
    if model.is_tied:
        model.head.weight = model.embedding.get_parameter("weight")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(world.device)
    adapters.initialise(model, cfg.seed, world.device)
    report.num_verified = verify_bytes(model, fingerprints, world)
    report.read_bytes = source.read_bytes + cache.read_bytes
    report.seconds = time.monotonic() - start
    return replace(built, loaded=report)


class _Dealer:
    """Makes this rank's layers, and keeps its part of every layer where the placement says."""

    def __init__(self, built: Built, source: Weights, num_shares: int, world: World) -> None:
        self.layouts, self.cache, self.placed = built.model.layouts, built.cache, built.placed
        self.blocks, self.source, self.world = list(shard.blocks(built.model)), source, world
        self.num_shares = num_shares
        # As many rounds on every machine.
        self.num_makers = min(world.gather_objects(world.local_size))
        memory, offloaded = self.placed.memory, self.placed.layers("offloaded")
        self.slices: dict[int, torch.Tensor] = {}
        if offloaded:
            slices = [self._slice_bytes(layer) for layer in offloaded]
            memory = placement.private(sum(slices), world.device.type == "cuda")
            self.slices = dict(zip(offloaded, memory.bytes.split(slices), strict=True))
        self.pinned_bytes = memory.pinned_bytes if memory is not None else 0

    def _slice_bytes(self, layer: int) -> int:
        return -(-self.layouts[layer].nbytes // 4 // self.num_shares) * 4

    def run(self) -> dict[int, int]:
        """Fill every layer; return the fingerprints of those that this rank made."""
        placed, world, fingerprints = self.placed, self.world, {}
        groups: dict[tuple[str, int], list[int]] = {}  # alike in a round: placement, layout
        for layer, (name, layout) in enumerate(zip(placed.names, self.layouts, strict=True)):
            groups.setdefault((name, id(layout)), []).append(layer)
        rounds = [
            (name, layers[start : start + self.num_makers])
            for place in placement.PLACEMENTS
            for (name, _), layers in groups.items()
            if name == place != "trained"
            for start in range(0, len(layers), self.num_makers)
        ]
        me = world.local_rank
        made = self._make([layers[me] for _, layers in rounds if me < len(layers)])
        num_layers, what = sum(len(layers) for _, layers in rounds), "quantizes"
        what = "loads" if self.cache.is_complete else what
        with cli.Progress(what, num_layers, "layers", world.rank > 0) as progress:
            for name, layers in rounds:
                hooks.reach("load", world.rank)
                nbytes = self.layouts[layers[0]].nbytes  # of each layer of the round
                if me < len(layers):
                    flat = next(made)
                    fingerprints[layers[me]] = fingerprint(flat[:nbytes])
                else:  # fewer layers than ranks are left: take part in the exchange all the same
                    flat = self._zeros(layers[0])
                self._keep(name, layers, flat)
                progress.update(len(layers), len(layers) * nbytes)
                hardware.release_freed_memory()  # up to 0.3 GiB of a model of 0.4 billion
        self.cache.commit(world)
        world.barrier()  # shared memory is whole on every rank
        if on_disk := placed.layers(config.DISK):
            spans = placed.spill.spans if placed.spill else self.cache.spans(on_disk)
            placed.open(spans, placed.spill or self.cache, world)
        return fingerprints

    def _zeros(self, layer: int) -> torch.Tensor:
        nbytes = self._slice_bytes(layer) * self.num_shares
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.world.device)

    def _make(self, own: list[int]) -> Iterator[torch.Tensor]:
        """Yield the quantized bytes of this rank's layers, uint8 [padded] on its device."""
        if not self.cache.is_complete:
            yield from self._quantize(own)
            return
        for layer, quantized in zip(own, self.cache.read_layers(own), strict=True):
            if quantized is None:
                yield from self._quantize([layer])
                continue
            flat = self._zeros(layer)
            flat[: quantized.numel()] = quantized.to(self.world.device, non_blocking=True)
            yield flat

    def _quantize(self, layers: list[int]) -> Iterator[torch.Tensor]:
        """As `_make`, from 16-bit files or at random, and into the cache."""
        source, device = self.source, self.world.device
        names = list(source.info.linear_places(layers))
        arrays = source.read_quantized(names, device, self.layouts[0].format_name)
        for layer in layers:
            flat, layout = self._zeros(layer), self.layouts[layer]
            for index in range(len(layout.shapes)):
                quantize.store_linear(flat, layout, index, next(arrays))
            self.cache.write_layer(layer, flat[: layout.nbytes])
            yield flat

    def _keep(self, name: str, layers: list[int], flat: torch.Tensor) -> None:
        """Keep a round of layers with one placement, of which this rank made `flat`."""
        world, peers = self.world, self.world.peers
        if name in STREAMED:
            if world.local_rank < len(layers):
                self.placed.keep(layers[world.local_rank], flat)
            return
        if name in placement.GROUPS:
            slices, wanted = flat.view(self.num_shares, -1), [p % self.num_shares for p in peers]
            is_all = wanted == [*range(self.num_shares)]
            parts = [*world.exchange(slices if is_all else slices[wanted])]
        else:
            every = world.share(flat)
            parts = [every[peer] for peer in peers]
        for layer, part in zip(layers, parts, strict=False):
            first, last = shard.local_range(self.blocks[layer].quantized)
            local = self.slices.pop(layer).copy_(part) if name == "offloaded" else part.clone()
            local = local[: (last - first) * 4].view(torch.float32)
            shard.set_local(self.blocks[layer], "quantized", local)


def fingerprint(flat: torch.Tensor) -> int:
    """Sum all 4-byte words, each times an odd number of its own: any one changed word changes it.

    Args:
        flat: contiguous, a multiple of 4 bytes long, on any device.

    Returns:
        The sum modulo 2^64.
    """
    words, total, piece = flat.view(torch.int32), 0, 2**20  # each of 5 copies in 64 bit: 8 MiB
    for start in range(0, words.numel(), piece):
        part = words[start : start + piece].long()
        index = torch.arange(start, start + part.numel(), device=part.device)
        total += int((part * (index * 0x1E3779B97F4A7C15 | 1)).sum())
    return total % 2**64


def verify_bytes(model: torch.nn.Module, own_fingerprints: dict[int, int], world: World) -> int:
    """Gather each layer as training will; compare its bytes on every rank with what was made.

    Args:
        model: filled.
        own_fingerprints: layer -> `fingerprint` of what this rank quantized.
        world: the ranks; all must call.

    Returns:
        Number of layers compared.

    Raises:
        UserError: bytes differ, or those of two machines (code 5), on all ranks together.
    """
    every = world.gather_objects(own_fingerprints)
    made = {layer: mark for part in every for layer, mark in part.items()}
    if any(mark != made[layer] for part in every for layer, mark in part.items()):
        got, rule = "the machines' quantized bytes differ", "all must train on the same base"
        remedy = "give all the same model files and GPUs; --quant_cache off makes them anew"
        raise errors.UserError(got, rule, remedy, errors.INTEGRITY)
    wrong = []
    for index, block in enumerate(shard.blocks(model)):
        if block.store is None:
            continue
        own = shard.gathered(block)[: block.store.layout.nbytes]  # a slot may be longer
        if fingerprint(own) != made[index]:
            wrong.append(index)
        shard.release(block)
    by_rank = world.gather_objects(wrong)
    if any(by_rank):
        rank = next(r for r, layers in enumerate(by_rank) if layers)
        got = f"quantized bytes of layer {by_rank[rank][0]} changed on rank {rank}"
        rule = "the bytes gathered by FSDP must be those that were quantized"
        remedy = "report the versions of torch and the GPU driver; training on them would be wrong"
        raise errors.UserError(got, rule, remedy, errors.INTEGRITY)
    return len(made)


def shape(cfg: config.TrainConfig, info: arch.ModelInfo, world: World) -> Built:
    """Build, adapt, place and shard a model on the meta device.

    Args:
        cfg: the run.
        info: the model.
        world: the ranks; all must call.

    Returns:
        The model, to be filled.

    Raises:
        UserError: see placement.choose.
    """
    model = skeleton.build(info, cfg, world.device)
    model.context = world.context
    if has_adapters(cfg):
        adapters.attach(model, find_targets(info, cfg), cfg, world.size)
    # The cache keeps whole models, and what is in their files.
    is_cached = cfg.weights == "load" and not trained_whole(info, cfg).layers
    setting = cfg.quant_cache if is_cached else "off"
    cache = weights.open_cache(setting, info, model.layouts, world, cfg.verify_base == "full")
    has_cache = all(world.gather_objects(cache.directory is not None))
    placed = placement.choose(info, cfg, [n.nbytes for n in model.layouts], has_cache, world)
    shard.apply(model, cfg.sharding_strategy, placed, world)
    model.set_checkpointing(cfg, world.device)
    return Built(model, cache, placed)


def build(cfg: config.TrainConfig, info: arch.ModelInfo, world: World) -> Built:
    """Shape a model and fill it.

    Args:
        cfg: the run.
        info: the model.
        world: the ranks; all must call.

    Returns:
        The model and what was done.

    Raises:
        UserError: see `shape` and fill.
    """
    return fill(shape(cfg, info, world), weights.build(info, cfg), cfg, world)
