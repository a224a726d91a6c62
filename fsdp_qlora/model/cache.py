"""The quantised copy on disk: one safetensors file per decoder layer and a manifest of hashes.

The second start of a run reads these bytes instead of 16-bit weights. The directory is written
beside its final name and renamed when it is whole; every file is verified by SHA-256 as it is read.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fsdp_qlora import __version__, atomic
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.layout import Layout
from fsdp_qlora.model.weights import look_ahead, read_file

LAYOUT_VERSION = 1  # of the bytes; raise it when packed.build_layout changes
TENSOR = "packed"


@dataclass
class PackedCache:
    """Packed layers of one model in one format.

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
        """Yield packed bytes in order, the next layers being read and hashed meanwhile.

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
        packed = torch.empty(self.nbytes, dtype=torch.uint8)
        problem = "is missing"
        if path.exists():
            # The tensor is the last thing in the file.
            header_bytes = path.stat().st_size - self.nbytes
            problem = "is too short"
            if header_bytes >= 8:
                read_file(path, header_bytes, packed)
                self.read_bytes += packed.numel()
                digest = hashlib.sha256(packed.numpy().data).hexdigest()
                problem = "" if digest == self.digests[layer] else "does not match its SHA-256"
        if problem:
            raise _damaged(path, problem)
        return packed

    def map_layers(self, layers: list[int]) -> list[torch.Tensor]:
        """The packed bytes as the kernel's page cache has them, read when they are touched.

        Args:
            layers: numbers of the layers; the cache must be complete.

        Returns:
            uint8 [nbytes] of each, not to be written to.

        Raises:
            UserError: the cache could not be written (code 3).
        """
        if not self.is_complete or self.directory is None:
            raise UserError(
                f"quantised cache: {self.note}",
                "layers that the host has no room for are mapped from it",
                "give --quant_cache a directory with room, or free host memory",
                code=3,
            )
        maps = []
        for layer in layers:
            with (self.directory / _file_name(layer)).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            maps.append(torch.frombuffer(mapping, dtype=torch.uint8)[-self.nbytes :])
        return maps

    def write_layer(self, layer: int, packed: torch.Tensor) -> None:
        """Keep the packed bytes of one layer, in a thread; nothing when the cache is off.

        Args:
            layer: its number.
            packed: uint8 [nbytes], any device.
        """
        if self.temporary is None:
            return
        self._wait()
        if not self.failure:
            self.writing = self.writer.submit(self._write, self.temporary, layer, packed.cpu())

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


def open_cache(setting: str, info: ModelInfo, layout: Layout, world: World) -> PackedCache:
    """Find the cache entry of a model, or the place to write it; all ranks decide the same.

    Args:
        setting: "off", "auto" (~/.cache/fsdp_qlora, or $FSDP_QLORA_CACHE) or a directory.
        info: the model; one without files is not cached.
        layout: of a layer; bf16 is not cached.
        world: the ranks; all must call.
    """
    if setting == "off" or not info.tensors or layout.format_name == "bf16":
        return PackedCache(None, "off")
    root = (atomic.cache_dir() if setting == "auto" else Path(setting)).expanduser()
    directory = root / key(info, layout)
    need_bytes = layout.nbytes * info.num_layers
    cache = PackedCache(directory, f"{directory} ({need_bytes / 2**30:.2f} GiB)", layout.nbytes)
    manifest = directory / "manifest.json"
    if all(world.gather_objects(manifest.exists())):
        cache.digests = _read_manifest(manifest, layout.nbytes, info.num_layers)
        cache.is_complete = True
        return cache
    refusal = _cannot_write(root, need_bytes, world)
    refusals = [text for text in world.gather_objects(refusal) if text]
    pids = world.gather_objects(os.getpid())
    cache.temporary = directory.with_name(f".tmp-{pids[0]}-{directory.name}")
    return PackedCache(None, refusals[0]) if refusals else cache


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
    return UserError(
        f"{path} {problem}",
        "the quantised cache is verified as it is read",
        "delete its directory (it is made again) or use --quant_cache off",
        code=5,
    )


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
