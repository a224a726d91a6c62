"""Where 16-bit weights come from: safetensors files, range by range, or random numbers."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from fsdp_qlora.arch import ModelInfo, TensorRef
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model.quantize import Fields, from_stored
from fsdp_qlora.planning.sizes import NUM_READ_AHEAD

T = TypeVar("T")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 32 * 2**20  # one read of one thread
NUM_READERS = 4


class Weights:
    """Tensors by their name in the model's files.

    Attributes:
        source: "files" or "random", in words for the load report.
        info: the model, with the places of its tensors.
        read_bytes: bytes read so far.
    """

    source = "files"

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.read_bytes = 0
        if info.quantized:
            self.source = f"files, in {info.stored_format} as stored,"

    def check_names(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Account for every tensor.

        Args:
            expected: name -> shape of everything the model needs.

        Raises:
            UserError: names missing, unknown, or of another shape (code 5).
        """
        found = {n: tuple(ref.shape) for n, ref in self.info.tensors.items()}
        missing = sorted(expected.keys() - found.keys())
        unknown = sorted(found.keys() - expected.keys())
        wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
        faults = {"missing": missing, "unknown": unknown, "of another shape": wrong}
        rule = f"the files in {self.info.path} must hold exactly what config.json describes"
        remedy = "check config.json (number of layers, sizes) or download the model again"
        for word, names in faults.items():
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                got = f"tensors {word}: {', '.join(names[:3])}{more}"
                raise UserError(got, rule, remedy, INTEGRITY)

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
            UserError: no known dtype, a NaN, or the file ends too early (code 5).
        """
        ref = self.info.tensors[name]
        row_bytes = ref.nbytes // max(ref.shape[0], 1)
        raw = self._read(ref, rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes)
        shape = (rows[1] - rows[0], *ref.shape[1:])
        tensor = raw.view(_dtype(ref, name)).view(shape)
        return self._finite(name, tensor).to(device=device, dtype=dtype)

    def read_ahead(self, names: list[str], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield whole tensors in order, the next two being read meanwhile.

        Args:
            names: of the tensors.
            device: where they go.

        Yields:
            Tensors in the dtype of the file.

        Raises:
            UserError: no known dtype, a NaN, or the file ends too early (code 5).
        """
        found = zip(names, look_ahead(self._read_whole, names), strict=True)
        return (self._finite(name, tensor.to(device)) for name, tensor in found)

    def read_quantized(self, names: list[str], device: torch.device) -> Iterator[Fields] | None:
        """Yield the quantized bytes of linears that are stored in 4 bit, as they are stored.

        Args:
            names: of their weights.
            device: where they go.

        Returns:
            As Format.quantize makes them, the next two being read meanwhile; None where the model
            is stored in 16 or 32 bit.

        Raises:
            UserError: another code than that of the format, or the file ends too early (code 5).
        """
        if not self.info.quantized:
            return None
        fields = look_ahead(self._read_fields, names)
        return ({key: part.to(device) for key, part in found.items()} for found in fields)

    def _read_fields(self, name: str) -> Fields:
        stored, parts = self.info.quantized[name], {}
        for part, ref in stored.refs.items():
            raw = self._read(ref, 0, ref.nbytes)
            parts[part] = raw.view(DTYPES[ref.dtype]) if ref.dtype == "F32" else raw
        return from_stored(parts, stored.offset, str(self.info.stored_format), name)

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Refuse what would make every loss of the run NaN; aminmax hands a NaN on."""
        if tensor.numel() and not all(torch.stack(torch.aminmax(tensor)).isfinite().tolist()):
            rule = "holds numbers that are not finite"
            remedy = "download the model again, or take another"
            raise UserError(f"{name} in {self.info.tensors[name].file}", rule, remedy, INTEGRITY)
        return tensor

    def _read_whole(self, name: str) -> torch.Tensor:
        ref = self.info.tensors[name]
        return self._read(ref, 0, ref.nbytes).view(_dtype(ref, name)).view(tuple(ref.shape))

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

    source = "random"

    def __init__(self, info: ModelInfo, seed: int) -> None:
        super().__init__(info)
        self.seed = seed
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

    def read_quantized(self, names: list[str], device: torch.device) -> None:
        """Nothing is quantized yet: see Weights.read_quantized."""

    def read_ahead(self, names: list[str], device: torch.device) -> Iterator[torch.Tensor]:
        """Make whole tensors in order, bfloat16: see Weights.read_ahead."""
        return (self._make(name, device) for name in names)

    def _make(self, name: str, device: torch.device) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            make = torch.zeros if name.endswith("bias") else torch.ones
            return make(shape, dtype=torch.bfloat16, device=device)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return weight.normal_(0.0, 0.02, generator=generator)


def look_ahead(read: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield read(item) in order while the next NUM_READ_AHEAD items are being read in threads.

    Args:
        read: function of one item.
        items: all of them.
    """
    with ThreadPoolExecutor(NUM_READ_AHEAD) as pool:
        ahead = deque(pool.submit(read, item) for item in items[:NUM_READ_AHEAD])
        for position in range(len(items)):
            result = ahead.popleft().result()
            if position + NUM_READ_AHEAD < len(items):
                ahead.append(pool.submit(read, items[position + NUM_READ_AHEAD]))
            yield result


def build(info: ModelInfo, cfg: TrainConfig) -> Weights:
    """Build the source that `--weights` names.

    Args:
        info: the model.
        cfg: weights, seed.
    """
    return RandomWeights(info, cfg.seed) if cfg.weights == "random" else Weights(info)


def _dtype(ref: TensorRef, name: str) -> torch.dtype:
    if ref.dtype not in DTYPES:
        rule = f"weights must be one of {', '.join(DTYPES)}"
        remedy = "use the 16-bit release of this model"
        raise UserError(f"{name} is stored as {ref.dtype}", rule, remedy, INTEGRITY)
    return DTYPES[ref.dtype]


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
    starts = range(0, nbytes, PIECE_BYTES)
    file = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            read = pool.map(
                lambda s: _read_piece(file, view[s : s + PIECE_BYTES], offset + s), starts
            )
            if not all(read):
                got, remedy = (
                    f"{path} ends before byte {offset + nbytes}",
                    "download the file again",
                )
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
