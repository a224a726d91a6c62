"""Safetensors files written tensor by tensor: nothing is held but the header.

Source: the format's README, section "Format", github.com/huggingface/safetensors: a header may be
padded with spaces, so room for it is left in front and it is written last.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch.files import INDEX_NAME, SINGLE_NAME
from fsdp_qlora.atomic import write_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
ENTRY_BYTES = 160  # of a header entry besides the name, at most
ALIGN_BYTES = 8  # every tensor starts at a multiple of its item size, as torch's views want it


class SafetensorsFile:
    """One safetensors file; use it as a context manager."""

    def __init__(
        self, path: Path, names: Iterable[str], metadata: dict[str, str] | None = None
    ) -> None:
        """Open the file and leave room for its header.

        Args:
            path: to be made.
            names: of all tensors that may come.
            metadata: texts for the header.
        """
        self.nbytes = 0
        self._metadata = {"format": "pt"} | (metadata or {})
        room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        room += len(json.dumps(self._metadata)) + ENTRY_BYTES
        self._header_bytes = -(-room // ALIGN_BYTES) * ALIGN_BYTES
        self._entries: dict[str, Any] = {}
        self._held: list[tuple[str, torch.Tensor]] = []
        self._file = path.open("wb")
        self._file.seek(8 + self._header_bytes)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor; a small odd one waits for the end, so that the others stay aligned.

        Args:
            name: of the tensor.
            tensor: on any device.
        """
        if tensor.numel() * tensor.element_size() % ALIGN_BYTES:
            self._held.append((name, tensor.cpu().clone()))
        else:
            self._write(name, tensor)

    def close(self) -> None:
        """Write what waits and the header, and bring the file to the disk."""
        for name, tensor in sorted(self._held, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps({"__metadata__": self._metadata, **self._entries}).encode()
        assert len(header) <= self._header_bytes, "the header has outgrown its room"
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.nbytes, self.nbytes + raw.nbytes],
        }
        self._file.write(raw.data)
        self.nbytes += raw.nbytes

    def __enter__(self) -> "SafetensorsFile":
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file; after an error it is left as it is, without a header."""
        if kind is None:
            self.close()
        else:
            self._file.raw.close()  # what is buffered cannot be written: the disk may be full


class Shards:
    """A model's tensors over files of a size, named as transformers does; a context manager."""

    def __init__(self, directory: Path, names: Iterable[str], max_bytes: int) -> None:
        """Write nothing yet.

        Args:
            directory: for the files and their index.
            names: of all tensors that may come.
            max_bytes: a file that would be larger is ended and another one begun.
        """
        self.total_bytes, self.largest_bytes = 0, 0
        self._directory, self._names, self._max_bytes = directory, list(names), max_bytes
        self._files: list[dict[str, None]] = []
        self._open: SafetensorsFile | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Args:
            name: of the tensor.
            tensor: on any device.
        """
        nbytes = tensor.numel() * tensor.element_size()
        if self._open is None or (self._files[-1] and self._size + nbytes > self._max_bytes):
            self._begin()
        assert self._open is not None
        self._open.add(name, tensor)
        self._files[-1][name] = None
        self._size += nbytes
        self.total_bytes += nbytes
        self.largest_bytes = max(self.largest_bytes, nbytes)

    @property
    def num_files(self) -> int:
        """Files begun."""
        return len(self._files)

    def _begin(self) -> None:
        if self._open is not None:
            self._open.close()
        self._files.append({})
        self._size = 0
        self._open = SafetensorsFile(self._directory / f"part-{self.num_files}", self._names)

    def close(self) -> None:
        """End the last file, name all of them and write the index."""
        if self._open is not None:
            self._open.close()
        num = self.num_files
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file_name = f"model-{number:05d}-of-{num:05d}.safetensors" if num > 1 else SINGLE_NAME
            (self._directory / f"part-{number}").rename(self._directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        if num > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self._directory / INDEX_NAME, index)

    def __enter__(self) -> "Shards":
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the files; after an error they are left as they are."""
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.__exit__(kind)
