"""A model from nothing to filled: shape, placement, then bytes from files, cache or at random.

Decoder layers are dealt to the ranks in turn: in each round every rank makes the quantized bytes of
one layer (from 16-bit files, from the cache, or at random), then one exchange hands every rank its
slice of all of them. No rank ever holds more than three linears in 16 bit (one at work, two read
ahead). Everything else is read by each rank as its own range of bytes.

The cache is one safetensors file per decoder layer and a manifest of hashes; the second start of a
run reads its bytes instead of 16-bit weights. Its directory is written beside its final name and
renamed when it is whole; every file is verified by SHA-256 as it is read.
"""

import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fsdp_qlora import __version__, arch, atomic
from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.model import adapters, placement, shard, skeleton, streaming, weights
from fsdp_qlora.model.layer import DecoderBlock, Layout, store_linear
from fsdp_qlora.model.placement import PLACEMENTS, Placed
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.model.skeleton import KernelChoice, QuantizedModel
from fsdp_qlora.model.weights import Weights, look_ahead, read_file

LAYOUT_VERSION = 1  # of the bytes; raise it when layer.build_layout changes
TENSOR = "packed"


@dataclass
class QuantizedCache:
    """Quantized layers of one model in one format.

    Attributes:
        directory: where they are or will be; None = the cache is off.
        note: one line for the user.
        nbytes: of one layer.
        is_complete: the directory holds every layer.
        digests: layer -> SHA-256 of its bytes, of this rank's writes or of the manifest.
        read_bytes: read so far.
        temporary: where layers are written until all are there; None = nothing is to be written.
        writer, writing: the thread that writes, and the layer in its hands.
        failure: why writing was given up, or "".
    """

    directory: Path | None
    note: str
    nbytes: int = 0
    is_complete: bool = False
    digests: dict[int, str] = field(default_factory=dict)
    read_bytes: int = 0
    temporary: Path | None = None
    failure: str = ""
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None

    def read_layers(self, layers: list[int]) -> Iterator[torch.Tensor]:
        """Yield quantized bytes in order, the next layers being read and hashed meanwhile.

        Args:
            layers: numbers of the layers; the cache must be complete.

        Yields:
            uint8 [nbytes] on the host.

        Raises:
            UserError: a file is damaged (code 5).
        """
        return look_ahead(self._read_layer, layers)

    def _read_layer(self, layer: int) -> torch.Tensor:
        assert self.directory is not None, "a cache that is off was read"
        path = self.directory / _file_name(layer)
        problem = "is missing"
        if path.exists():
            # The tensor is the last thing in the file.
            header_bytes = path.stat().st_size - self.nbytes
            problem = "is too short"
            if header_bytes >= 8:
                quantized = read_file(path, header_bytes, self.nbytes)
                self.read_bytes += self.nbytes
                digest = hashlib.sha256(quantized.numpy().data).hexdigest()
                problem = "" if digest == self.digests[layer] else "does not match its SHA-256"
        if problem:
            raise _damaged(path, problem)
        return quantized

    def map_layers(self, layers: list[int]) -> list[torch.Tensor]:
        """The quantized bytes as the kernel's page cache has them, read when they are touched.

        Args:
            layers: numbers of the layers; the cache must be complete.

        Returns:
            uint8 [nbytes] of each, not to be written to.

        Raises:
            UserError: the cache could not be written (code 3).
        """
        if not self.is_complete or self.directory is None:
            rule = "layers that the host has no room for are mapped from it"
            remedy = "give --quant_cache a directory with room, or free host memory"
            raise UserError(f"quantized cache: {self.note}", rule, remedy, ENVIRONMENT)
        maps = []
        for layer in layers:
            with (self.directory / _file_name(layer)).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            maps.append(torch.frombuffer(mapping, dtype=torch.uint8)[-self.nbytes :])
        return maps

    def write_layer(self, layer: int, quantized: torch.Tensor) -> None:
        """Keep the quantized bytes of one layer, in a thread; nothing when the cache is off.

        Args:
            layer: its number.
            quantized: uint8 [nbytes], any device.
        """
        if self.temporary is None:
            return
        self._wait()
        if not self.failure:
            self.writing = self.writer.submit(self._write, self.temporary, layer, quantized.cpu())

    def _write(self, directory: Path, layer: int, host: torch.Tensor) -> None:
        self.digests[layer] = hashlib.sha256(host.numpy().data).hexdigest()
        path = directory / _file_name(layer)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file({TENSOR: host}, path)
            atomic.sync(path)
        except (OSError, SafetensorError) as error:  # a full disk: train without the cache
            self.failure = f"not written: {path}: {error}"

    def _wait(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def commit(self, world: World) -> None:
        """Give the directory its name once every rank has written its layers.

        A rank that could not write makes all give the cache up; `note` says so.

        Args:
            world: the ranks; all must call.
        """
        if self.directory is None or self.temporary is None:
            return
        self._wait()
        failures = [text for text in world.gather_objects(self.failure) if text]
        if failures:
            self.note = failures[0]
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        digests = {k: v for part in world.gather_objects(self.digests) for k, v in part.items()}
        if world.rank == 0:
            manifest = {"nbytes": self.nbytes, "sha256": [digests[i] for i in sorted(digests)]}
            (self.temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            atomic.commit(self.temporary, self.directory)
        self.is_complete = True
        world.barrier()


def _file_name(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def key(info: ModelInfo, layout: Layout) -> str:
    """Name the cache entry: another for other files, format, layout or version.

    Args:
        info: the model; of its files count names, sizes, times and every entry of their headers.
        layout: of a layer.

    Returns:
        Name of a directory, for people too.
    """
    assert info.path is not None, "a model without files has no cache"
    digest = hashlib.sha256(f"{LAYOUT_VERSION}:{__version__}:{layout}".encode())
    for file in sorted({ref.file for ref in info.tensors.values()}):
        status = os.stat(file)
        digest.update(f"{Path(file).name}:{status.st_size}:{status.st_mtime_ns}".encode())
    for name, ref in sorted(info.tensors.items()):
        digest.update(f"{name}:{ref.dtype}:{ref.shape}:{ref.start}".encode())
    return f"{info.path.name[:40]}-{layout.format_name}-{digest.hexdigest()[:16]}"


def open_cache(
    setting: str, info: ModelInfo, layout: Layout, world: World | None
) -> QuantizedCache:
    """Find the cache entry of a model, or the place to write it; all ranks decide the same.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
        info: the model; one without files is not cached.
        layout: of a layer; bf16 is not cached.
        world: the ranks; all must call. None: what is not there is not to be written either.
    """
    if setting == "off" or not info.tensors or layout.format_name == "bf16":
        return QuantizedCache(None, "off")
    root = atomic.cache_dir(setting)
    directory = root / key(info, layout)
    need_bytes = layout.nbytes * info.num_layers
    cache = QuantizedCache(directory, f"{directory} ({need_bytes / 2**30:.2f} GiB)", layout.nbytes)
    manifest = directory / "manifest.json"
    if all(world.gather_objects(manifest.exists()) if world else [manifest.exists()]):
        cache.digests = _read_manifest(manifest, layout.nbytes, info.num_layers)
        cache.is_complete = True
        return cache
    if world is None:
        return QuantizedCache(None, "not there")
    refusal = _cannot_write(root, need_bytes, world)
    refusals = [text for text in world.gather_objects(refusal) if text]
    pids = world.gather_objects(os.getpid())
    cache.temporary = directory.with_name(f".tmp-{pids[0]}-{directory.name}")
    return QuantizedCache(None, refusals[0]) if refusals else cache


def _read_manifest(path: Path, nbytes: int, num_layers: int) -> dict[int, str]:
    try:
        manifest = json.loads(path.read_text())
        digests = dict(enumerate(manifest["sha256"]))
        is_good = manifest["nbytes"] == nbytes and len(digests) == num_layers
    except (ValueError, KeyError, TypeError):
        is_good = False
    if not is_good:
        raise _damaged(path, "does not describe this model")
    return digests


def _damaged(path: Path, problem: str) -> UserError:
    rule = "the quantized cache is verified as it is read"
    remedy = "delete its directory (it is made again) or use --quant_cache off"
    return UserError(f"{path} {problem}", rule, remedy, INTEGRITY)


def _cannot_write(root: Path, need_bytes: int, world: World) -> str:
    if world.size != world.local_size:
        return "not written: the ranks are on several machines"
    try:
        root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(root).free
    except OSError as error:
        return f"not written: {root}: {error.strerror}"
    if free_bytes < need_bytes * 1.1:
        free_gib, need_gib = free_bytes / 2**30, need_bytes / 2**30
        return f"not written: {root} has {free_gib:.1f} GiB free, {need_gib:.1f} needed"
    return ""


@dataclass
class LoadReport:
    """What the load did.

    Attributes:
        seconds: it took.
        read_bytes: from disk by this rank.
        source: of the quantized bytes: "files", "random" or "cache".
        pinned_bytes: host memory that this rank page-locked itself.
        fingerprints: layer -> `fingerprint` of the quantized bytes that this rank made.
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
    model: QuantizedModel,
    weights: Weights,
    cache: QuantizedCache,
    placed: Placed,
    cfg: TrainConfig,
    world: World,
) -> LoadReport:
    """Give every parameter and buffer of a sharded meta model its bytes.

    Args:
        model: from skeleton.build, after adapters.attach and shard.apply.
        weights: where 16-bit tensors come from.
        cache: where quantized layers are kept between runs.
        placed: where quantized layers lie.
        cfg: seed (of the adapters' starting values).
        world: the ranks; all must call.

    Returns:
        What was done.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or bytes changed on their way
            (code 5); or host memory cannot be pinned (code 3).
    """
    start = time.monotonic()
    weights.check_names(_expected_shapes(model, weights.info))
    shares = shard.num_shares(cfg.sharding_strategy, world)
    report = _fill_quantized(model, weights, cache, placed, shares, world)
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


def _expected_shapes(model: QuantizedModel, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    shapes = {n: tuple(getattr(m, a).shape) for n, (m, a) in model.tensors.items()}
    for layer in range(info.num_layers):
        for linear in info.linears:
            name = _weight_name(info, layer, linear)
            shapes[name] = (linear.out_features, linear.in_features)
    return shapes


def _weight_name(info: ModelInfo, layer: int, linear: arch.Linear) -> str:
    return f"{info.layers_prefix}.{layer}.{linear.name}.weight"


def _fill_quantized(
    model: QuantizedModel,
    weights: Weights,
    cache: QuantizedCache,
    placed: Placed,
    shares: int,
    world: World,
) -> LoadReport:
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
    made = _make_layers(own, model.layout, weights, cache, padded_bytes, world.device)
    keep = _Keep(blocks, placed, slice_bytes, world)
    source = "cache" if cache.is_complete else weights.source
    report = LoadReport(source=source, pinned_bytes=keep.pinned_bytes)
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
    return report


class _Keep:
    """Puts the quantized bytes of a round of layers where their placement says."""

    def __init__(
        self, blocks: list[DecoderBlock], placed: Placed, slice_bytes: int, world: World
    ) -> None:
        self.blocks, self.placed, self.world = blocks, placed, world
        self.slice_bytes = slice_bytes
        pin, num_offloaded = world.device.type == "cuda", len(placed.layers("offloaded"))
        self.pinned_bytes = placed.memory.pinned_bytes if placed.memory else 0
        self.slices: list[torch.Tensor] = []
        if num_offloaded:
            memory = streaming.private(slice_bytes * num_offloaded, pin)
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
            first, last = shard.local_range(self.blocks[layer].quantized)
            local = self.slices.pop(0).copy_(part) if name == "offloaded" else part.clone()
            local = local[: (last - first) * 4].view(torch.float32)
            shard.set_local(self.blocks[layer], "quantized", local)


def _make_layers(
    own: list[int],
    layout: Layout,
    weights: Weights,
    cache: QuantizedCache,
    padded_bytes: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yield the quantized bytes of this rank's layers, uint8 [padded_bytes] on its device."""
    if cache.is_complete:
        for quantized in cache.read_layers(own):
            flat = torch.zeros(padded_bytes, dtype=torch.uint8, device=device)
            flat[: quantized.numel()] = quantized.to(device, non_blocking=True)
            yield flat
        return
    info, quantize = weights.info, FORMATS[layout.format_name].quantize
    names = [_weight_name(info, layer, linear) for layer in own for linear in info.linears]
    arrays = weights.read_quantized(names, device)
    arrays = arrays or map(quantize, weights.read_ahead(names, device))
    for layer in own:
        flat = torch.zeros(padded_bytes, dtype=torch.uint8, device=device)
        for index in range(len(info.linears)):
            store_linear(flat, layout, index, next(arrays))
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
    """Gather each layer as training will; compare its bytes on every rank with what was made.

    Args:
        model: filled.
        own_fingerprints: layer -> `fingerprint` of what this rank quantized.
        world: the ranks; all must call.

    Returns:
        Number of layers compared.

    Raises:
        UserError: bytes differ (code 5), on all ranks together.
    """
    made = {k: v for part in world.gather_objects(own_fingerprints) for k, v in part.items()}
    wrong = []
    quantized = [
        (i, block) for i, block in enumerate(shard.blocks(model)) if block.store is not None
    ]
    for index, block in quantized:
        if fingerprint(shard.gathered(block)) != made[index]:
            wrong.append(index)
        shard.release(block)
    by_rank = world.gather_objects(wrong)
    if any(by_rank):
        rank = next(r for r, layers in enumerate(by_rank) if layers)
        got = f"quantized bytes of layer {by_rank[rank][0]} changed on rank {rank}"
        rule = "the bytes gathered by FSDP must be those that were quantized"
        remedy = "report the versions of torch and the GPU driver; training on them would be wrong"
        raise UserError(got, rule, remedy, INTEGRITY)
    return len(made)


@dataclass(frozen=True)
class Built:
    """A model that is sharded; it can run when it is filled.

    Attributes:
        model: its adapters attached, at their starting values when it is filled.
        chosen: what it computes with.
        cache, placed: where its quantized bytes come from and lie.
        loaded: how its bytes came.
    """

    model: QuantizedModel
    chosen: KernelChoice
    cache: QuantizedCache
    placed: Placed
    loaded: LoadReport = field(default_factory=LoadReport)


def shape(cfg: TrainConfig, info: arch.ModelInfo, world: World) -> Built:
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
    chosen = skeleton.choose_kernels(
        cfg.attn, cfg.liger, cfg.compute_dtype, world.device, info.softcaps_attention
    )
    whole = trained.whole(info, cfg)
    master = getattr(torch, cfg.master_dtype)
    model = skeleton.build(info, cfg.format_name, chosen, whole, master)
    if trained.has_adapters(cfg):
        adapters.attach(model, arch.select_linears(info, cfg.lora_target_modules), cfg, world.size)
    # The cache keeps whole models.
    setting = "off" if whole.layers else cfg.quant_cache
    cache = open_cache(setting, info, model.layout, world)
    has_cache = cache.directory is not None
    placed = placement.choose(model.layout, info.num_layers, cfg, has_cache, world, whole.layers)
    shard.apply(model, cfg.sharding_strategy, placed, chosen.dtype, world)
    model.set_checkpointing(cfg, world.device)
    return Built(model, chosen, cache, placed)


def build(cfg: TrainConfig, info: arch.ModelInfo, world: World) -> Built:
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
    built = shape(cfg, info, world)
    source = weights.build(info, cfg)
    return replace(built, loaded=fill(built.model, source, built.cache, built.placed, cfg, world))
