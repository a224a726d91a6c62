"""Where weights come from: safetensors files, range by range, random numbers, or the cache.

The cache is one safetensors file of quantized bytes per decoder layer and a manifest of hashes; the
second start of a run reads its bytes instead of 16-bit weights. Its directory is written beside its
final name, by one run at a time, and renamed when it is whole; every file is verified by SHA-256 as
it is read, and a damaged one is made again from the model's files. What is changed in those outside
of `ModelInfo.digest`'s places, in a file whose inode, size and time stay as they are, is not seen
without --verify_base full.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fsdp_qlora import __version__, atomic, config, hardware
from fsdp_qlora.arch import ModelInfo, TensorRef, files
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.model.quantize import FORMATS, Fields, Layout, from_scaled, from_stored

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART_DTYPES = DTYPES | {"U8": torch.uint8, "I8": torch.int8}
PART_DTYPES |= {"I32": torch.int32, "I64": torch.int64}
PART_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
DTYPE_NAMES = {dtype: name for name, dtype in PART_DTYPES.items()}
RANDOM_EXPONENT = 120  # MXFP4's codes then deviate by about 0.02
PIECE_BYTES = 32 * 2**20  # one read of one thread
NUM_READERS = 4
LAYOUT_VERSION = 1  # of the bytes of a cached layer; raise it when build_layout changes
MANIFEST = "manifest.json"
TENSOR = "packed"


class Weights:
    """Tensors by their name in the model's files.

    Attributes:
        source: in words, for the load report.
        info: the model, with the places of its tensors.
        read_bytes: bytes read so far.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info, self.read_bytes = info, 0
        how = "as stored" if info.stored.method in files.KEPT else "made 16 bit"
        self.source = f"files, in {info.stored.method} {how}," if info.quantized else "files"

    def check_names(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Account for every tensor.

        Args:
            expected: name -> shape of everything the model needs.

        Raises:
            UserError: one is absent, unknown or of another shape (code 5).
        """
        found = {n: tuple(ref.shape) for n, ref in self.info.tensors.items()}
        files.check_shapes(expected, found, str(self.info.path))

    def read_rows(
        self, name: str, rows: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Read rows of a tensor.

        Args:
            name: of the tensor.
            rows: (start, stop) in its first dimension.
            dtype, device: of the result.

        Returns:
            [stop - start, ...].

        Raises:
            UserError: a NaN, or the file ends too early (code 5).
        """
        if name in self.info.quantized:
            return self._weight(name, self._read_parts(name), device)[slice(*rows)].to(dtype)
        return self._finite(name, self._read_rows(name, rows)).to(device=device, dtype=dtype)

    def read_ahead(self, names: list[str], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield whole tensors in order, the next two being read meanwhile.

        Args:
            names: of the tensors.
            device: where they go.

        Yields:
            Tensors in the dtype of the file; of one that is quantized there, in 16 bit.

        Raises:
            UserError: a NaN, or the file ends too early (code 5).
        """
        found = zip(names, files.look_ahead(self._read_parts, names), strict=True)
        return (self._weight(name, parts, device) for name, parts in found)

    def read_quantized(
        self, names: list[str], device: torch.device, format_name: str
    ) -> Iterator[Fields]:
        """Yield the quantized bytes of linears: those of the files where they are kept.

        Args:
            names: of their weights.
            device: where they go, and others are quantized.
            format_name: row of FORMATS of the others.

        Returns:
            As Format.quantize makes them, the next two being read meanwhile.

        Raises:
            UserError: another code than that of the format, no number, or the file ends too early
                (code 5).
        """
        quantize = FORMATS[format_name].quantize
        for name, found in zip(names, files.look_ahead(self._read_parts, names), strict=True):
            stored = self.info.quantized.get(name)
            if stored is None or not stored.format:
                yield quantize(self._weight(name, found, device))
                continue
            is_own = stored.format == files.MXFP4
            found = found if is_own else from_stored(found, stored.offset, stored.format, name)
            yield {key: part.to(device) for key, part in found.items()}

    def _read_parts(self, name: str) -> Fields:
        """What the files have of a tensor: itself, or the parts of a quantized one."""
        stored = self.info.quantized.get(name)
        if stored is None:
            return {"": self._read_rows(name)}
        parts = {}
        for part, ref in stored.refs.items():
            read = self._read(ref, 0, ref.nbytes).view(PART_DTYPES[ref.dtype])
            parts[part] = read if stored.format else read.view(ref.shape)
        return parts

    def _weight(self, name: str, parts: Fields, device: torch.device) -> torch.Tensor:
        """The tensor that `_read_parts` has read, in 16 bit or wider."""
        parts = {key: part.to(device) for key, part in parts.items()}
        if "" in parts:
            return self._finite(name, parts[""])
        stored, shape = self.info.quantized[name], self.info.tensors[name].shape
        if stored.format:
            own = [parts["exponents"]], shape, torch.bfloat16
            return FORMATS[stored.format].dequantize(parts["weight"], *own)
        return self._finite(name, from_scaled(parts, shape, stored.block))

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Refuse what would make every loss of the run NaN; aminmax hands a NaN on."""
        if tensor.numel() and not all(torch.stack(torch.aminmax(tensor)).isfinite().tolist()):
            rule = "holds numbers that are not finite"
            remedy = "download the model again, or take another"
            raise UserError(f"{name} in {self.info.tensors[name].file}", rule, remedy, INTEGRITY)
        return tensor

    def _read_rows(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        ref = self.info.tensors[name]
        start, nbytes, shape = 0, ref.nbytes, tuple(ref.shape)
        if rows is not None:
            row_bytes, num_rows = ref.nbytes // max(ref.shape[0], 1), rows[1] - rows[0]
            start, nbytes = rows[0] * row_bytes, num_rows * row_bytes
            shape = (num_rows, *ref.shape[1:])
        read = self._read(ref, start, nbytes).view(PART_DTYPES[ref.dtype])
        return read.view(shape[::-1]).t().contiguous() if ref.is_transposed else read.view(shape)

    def _read(self, ref: TensorRef, offset: int, nbytes: int) -> torch.Tensor:
        self.read_bytes += nbytes
        return read_file(ref.file, ref.start + offset, nbytes)


class RandomWeights(Weights):
    """Random numbers of the model's shapes, to measure a model that is not at hand.

    Norms are ones, biases zeros, matrices normal with deviation 0.02, made on the device.

    Attributes:
        seed: of the numbers; each tensor has its own, from this one and its name.
        shapes: name -> shape, from `check_names`.
    """

    def __init__(self, info: ModelInfo, seed: int) -> None:
        super().__init__(info)
        self.source, self.seed = "random", seed
        self.shapes: dict[str, tuple[int, ...]] = {}

    def check_names(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Take the model's own names and shapes as the ones to make.

        Args:
            expected: name -> shape of everything the model needs.
        """
        self.shapes = expected

    def read_rows(
        self, name: str, rows: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Make a tensor and keep some rows: see Weights.read_rows."""
        return self._make(name, device)[rows[0] : rows[1]].to(dtype).clone()

    def read_quantized(
        self, names: list[str], device: torch.device, format_name: str
    ) -> Iterator[Fields]:
        """Make quantized bytes; those of MXFP4 are any: see Weights.read_quantized."""
        places, quantize = self.info.linear_places(), FORMATS[format_name].quantize
        for name in names:
            layer, index = places[name]
            linear = self.info.by_layer[layer].linears[index]
            if not linear.format:
                yield quantize(self._make(name, device))
                continue
            generator, num = self._generator(name, device), linear.num_weights
            codes = torch.empty(num // 2, dtype=torch.uint8, device=device)
            exponents = torch.full((num // 32,), RANDOM_EXPONENT, dtype=torch.uint8, device=device)
            yield {"weight": codes.random_(generator=generator), "exponents": exponents}

    def read_ahead(self, names: list[str], device: torch.device) -> Iterator[torch.Tensor]:
        """Make whole tensors in order, bfloat16: see Weights.read_ahead."""
        return (self._make(name, device) for name in names)

    def _make(self, name: str, device: torch.device) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) < 2:
            make = torch.zeros if name.endswith("bias") else torch.ones
            return make(shape, dtype=torch.bfloat16, device=device)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return weight.normal_(0.0, 0.02, generator=self._generator(name, device))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7], "little")
        return torch.Generator(device).manual_seed(seed)


def build(info: ModelInfo, cfg: config.TrainConfig) -> Weights:
    """Build the source that `--weights` names.

    Args:
        info: the model.
        cfg: weights, seed.
    """
    return RandomWeights(info, cfg.seed) if cfg.weights == "random" else Weights(info)


def read_file(path: Path, offset: int, nbytes: int) -> torch.Tensor:
    """Read bytes of a file, in parallel pieces and without mapping the file.

    (Mapped files count as memory of the process.)

    Args:
        path: of the file.
        offset: of the first byte to read.
        nbytes: how many.

    Returns:
        uint8 [nbytes] on the host.

    Raises:
        UserError: the file ends too early (code 5).
    """
    raw = torch.empty(nbytes, dtype=torch.uint8)
    view = raw.numpy().data
    parts = [(view[s : s + PIECE_BYTES], offset + s) for s in range(0, nbytes, PIECE_BYTES)]
    file = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            reads = [pool.submit(_read_piece, file, *part) for part in parts]
            if not all(read.result() for read in reads):
                got, remedy = f"{path} ends before byte {offset + nbytes}", "download it again"
                raise UserError(got, "its header promises more", remedy, INTEGRITY)
    finally:
        os.close(file)
    return raw


def _read_piece(file: int, view: memoryview, offset: int) -> bool:
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


@dataclass
class QuantizedCache:
    """Quantized layers of one model in one format.

    Attributes:
        directory: where they are or will be; None = the cache is off.
        note: one line for the user.
        sizes: bytes of each layer.
        is_complete: the directory holds every layer.
        manifest: "sha256" of every layer, "model" for people, "base_bytes", a hash of all bytes of
            the model's files if it was asked for.
        temporary: where layers are written until all are there; None = nothing is to be written.
        lock: of the entry, while it is in use, held by the first rank of a machine.
        read_bytes: read so far.
        made: layer -> SHA-256 of its bytes, of this rank's writes.
        writer, writing: the thread that writes, and the layer in its hands.
        failure: why writing was given up, or "".
    """

    directory: Path | None
    note: str
    sizes: Sequence[int] = ()
    is_complete: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    temporary: Path | None = None
    lock: IO[bytes] | None = None
    read_bytes: int = 0
    made: dict[int, str] = field(default_factory=dict)
    failure: str = ""
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None

    def read_layers(self, layers: list[int]) -> Iterator[torch.Tensor | None]:
        """Yield quantized bytes in order, the next layers being read and hashed meanwhile.

        Args:
            layers: numbers of the layers; the cache must be complete.

        Yields:
            uint8 [bytes] on the host; None for a layer whose file is damaged.
        """
        return files.look_ahead(self._read_layer, layers)

    def _read_layer(self, layer: int) -> torch.Tensor | None:
        assert self.directory is not None, "a cache that is off was read"
        path, nbytes = self.directory / _file_name(layer), self.sizes[layer]
        try:  # the tensor is the last thing in the file
            quantized = read_file(path, path.stat().st_size - nbytes, nbytes)
        except (OSError, UserError):
            return None
        self.read_bytes += nbytes
        digest = hashlib.sha256(quantized.numpy().data).hexdigest()
        return quantized if digest == self.manifest["sha256"][layer] else None

    def spans(self, layers: list[int]) -> list[tuple[Path, int, int]]:
        """Where the quantized bytes of layers lie.

        Args:
            layers: numbers of the layers; the cache must be complete.

        Returns:
            File, offset from its end, and bytes of each.

        Raises:
            UserError: the cache could not be written (code 3).
        """
        if not self.is_complete or self.directory is None:
            rule = "layers that the host has no room for are read from it"
            remedy = "give --quant_cache a directory with room, or off, or free host memory"
            raise UserError(f"quantized cache: {self.note}", rule, remedy, ENVIRONMENT)
        pairs = [(self.directory / _file_name(layer), self.sizes[layer]) for layer in layers]
        return [(path, -nbytes, nbytes) for path, nbytes in pairs]

    def write_layer(self, layer: int, quantized: torch.Tensor) -> None:
        """Keep the quantized bytes of one layer, in a thread; nothing when the cache is off.

        Args:
            layer: its number; of a complete cache, one whose file is damaged.
            quantized: uint8 [bytes], any device.
        """
        place = self.directory if self.is_complete else self.temporary
        if place is not None and not self._failure():
            self.writing = self.writer.submit(self._write, place, layer, quantized.cpu())

    def _write(self, directory: Path, layer: int, host: torch.Tensor) -> None:
        self.made[layer] = hashlib.sha256(host.numpy().data).hexdigest()
        path = directory / _file_name(layer)
        try:
            with atomic.new_file(path) as draft:
                save_file({TENSOR: host}, draft)
        except (OSError, SafetensorError) as error:  # a full disk: train without the cache
            self.failure = f"not written: {path}: {error}"

    def _failure(self) -> str:
        """`failure`, once the layer in hand is written."""
        if self.writing is not None:
            self.writing.result()
        return self.failure

    def commit(self, world: World) -> None:
        """Give the directory its name once every rank of the machine has written its layers.

        A rank that could not write makes its machine give the cache up; `note` says so, and which
        layers were damaged.

        Args:
            world: the ranks; all must call.
        """
        every = world.gather_objects((self._failure(), self.made))
        every = [every[peer] for peer in world.peers]
        made = {layer: digest for _, part in every for layer, digest in part.items()}
        if self.is_complete and made:
            self.note += f"; damaged and made again: layers {', '.join(map(str, sorted(made)))}"
        self.failure = next((text for text, _ in every if text), "")
        if world.local_rank == 0 and made and not self.failure:
            self._finish(made)
        self.failure = world.gather_objects(self.failure)[world.peers[0]]
        self.is_complete = (self.is_complete or bool(made)) and not self.failure
        if self.failure:
            self.note = self.failure
            self.close()

    def _finish(self, made: dict[int, str]) -> None:
        """Write the manifest; a new directory gets its name, and others may read it from now on."""
        assert self.directory is not None
        place = self.temporary or self.directory
        digests = {**dict(enumerate(self.manifest.get("sha256", ()))), **made}
        in_order = {"sha256": [digests[layer] for layer in sorted(digests)]}
        try:
            atomic.write_sealed(place / MANIFEST, self.manifest | in_order)
            if self.temporary is not None:
                atomic.commit(self.temporary, self.directory)
        except OSError as error:
            self.failure = f"not written: {place}: {error.strerror or error}"
        if self.lock is not None:
            atomic.try_lock(self.lock, is_shared=True)

    def close(self) -> None:
        """Leave the entry, and nothing of one that is not whole."""
        if self.lock is not None:
            if self.temporary is not None:
                shutil.rmtree(self.temporary, ignore_errors=True)
            self.lock.close()
        self.lock = self.temporary = None


def _file_name(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def key(info: ModelInfo, layouts: Sequence[Layout]) -> str:
    """Name the cache entry: another for other files, format, layouts or version.

    Args:
        info: the model; of its files count their names, devices, inodes, sizes and times, and of
            every tensor name, dtype, shape and sixteen places.
        layouts: of each layer.

    Returns:
        Name of a directory, for people too.
    """
    assert info.path is not None, "a model without files has no cache"
    kinds = "".join(map(str, {id(layout): layout for layout in layouts}.values()))
    digest = hashlib.sha256(f"{LAYOUT_VERSION}:{__version__}:{kinds}:{info.digest()}".encode())
    for file in sorted({ref.file for ref in info.tensors.values()}):
        at = os.stat(file)
        place = at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns
        digest.update(f"{Path(file).name}:{place}".encode())
    return f"{info.path.name[:40]}-{layouts[0].format_name}-{digest.hexdigest()[:16]}"


def find_cache(
    setting: str, info: ModelInfo, layouts: Sequence[Layout], base_bytes: str | None = None
) -> QuantizedCache:
    """Find the quantized layers of a model that a run has left on this machine.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
        info: the model; one without files is not cached.
        layouts: of each layer; bf16 is not cached.
        base_bytes: hash of all bytes of the model's files, if the layers must be made of those.

    Returns:
        The cache; not complete where nothing was left, without a directory when it is off.
    """
    if setting == "off" or not info.tensors or layouts[0].format_name == "bf16":
        return QuantizedCache(None, "off")
    directory = atomic.cache_dir(setting) / key(info, layouts)
    sizes = [layout.nbytes for layout in layouts]
    cache = QuantizedCache(directory, f"{directory} ({sum(sizes) / hardware.GIB:.2f} GiB)", sizes)
    cache.manifest = {"model": str(info.path), "base_bytes": base_bytes}
    if not directory.exists():
        return cache
    with contextlib.suppress(OSError):  # of a cache that only others may write to
        cache.lock = atomic.lock(directory, is_shared=True)
        if cache.lock is None:
            return cache
    found = atomic.read_sealed(directory / MANIFEST)
    if found is None or len(found["sha256"]) != info.num_layers:
        cache.note += f"; made again: {MANIFEST} was damaged"
    elif base_bytes is not None and found["base_bytes"] != base_bytes:
        cache.note += "; made again: its layers were not known to be made of all these bytes"
    else:
        cache.is_complete, cache.manifest = True, found
    return cache


def open_cache(
    setting: str, info: ModelInfo, layouts: Sequence[Layout], world: World, is_full: bool = False
) -> QuantizedCache:
    """Find the cache entry of a model, or the place to write it; a rank decides for its machine.

    Args:
        setting, info, layouts: see `find_cache`.
        world: the ranks; all must call.
        is_full: the layers must be made of these very bytes, all of which are hashed.
    """
    cache = QuantizedCache(None, "off")
    if world.local_rank == 0:
        base_bytes = info.whole_digest if is_full and setting != "off" else None
        cache = find_cache(setting, info, layouts, base_bytes)
        if cache.directory is not None and not cache.is_complete:
            _claim(cache, cache.directory, sum(cache.sizes) / hardware.GIB)
    facts = cache.directory, cache.note, cache.sizes, cache.is_complete, cache.manifest
    facts = world.gather_objects((*facts, cache.temporary))[world.peers[0]]
    return cache if world.local_rank == 0 else QuantizedCache(*facts)


def _claim(cache: QuantizedCache, directory: Path, need_gib: float) -> None:
    """Take the place to write a cache; where that cannot be, it is off, and `note` says why."""
    root, reason = directory.parent, ""
    cache.close()
    try:
        root.mkdir(parents=True, exist_ok=True)
        cache.lock = atomic.lock(directory)
        if cache.lock is not None:
            atomic.sweep(directory)
        free_gib = shutil.disk_usage(root).free / hardware.GIB
        if cache.lock is None:
            reason = f"{directory} is in use by another run"
        elif free_gib < need_gib * 1.1:
            reason = f"{root} has {free_gib:.1f} GiB free, {need_gib:.1f} needed"
        else:
            cache.temporary = directory.with_name(f".tmp-{os.getpid()}-{directory.name}")
            cache.temporary.mkdir()
    except OSError as error:
        reason = f"{root}: {error.strerror or error}"
    if reason:
        cache.close()
        cache.directory, cache.note = None, f"not written: {reason}"
