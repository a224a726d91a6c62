"""What lies in a model directory: JSON files and the headers of the safetensors files.

Only headers are read (a few MB even for a 70B). Every byte of a file must belong to exactly one
tensor, so that a truncated download is found before anything else starts.

Source: the format's README, section "Format", github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.errors import INTEGRITY, UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PACKED_ITEM_BYTES = ITEM_BYTES | {"U8": 1}  # of a model stored in 4 bit
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
NOT_WEIGHTS = ("adapter_model", "consolidated")  # an adapter; a second copy in another format
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class TensorRef:
    """Where the bytes of one tensor lie.

    Args:
        file: the safetensors file.
        dtype: its name in safetensors: "BF16", "F16", "F32" or "F64".
        shape: as stored, row major.
        start: absolute offset of the first byte in the file.
        nbytes: length in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_json(path: Path) -> dict:
    """Read a JSON object, and name the file when it is not one.

    Args:
        path: for example the config.json of a model.

    Returns:
        The object.

    Raises:
        UserError: absent (code 2); a git-lfs pointer, an HTML page, no JSON object (code 5).
    """
    if not path.is_file():
        raise UserError(str(path), "is needed, and absent", "give a complete model directory")
    raw = path.read_bytes()
    _refuse_stand_in(path, raw[:64])
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is no valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path, "must hold a JSON object")
    return value


def read_tensors(
    directory: Path, item_bytes: Mapping[str, int] = ITEM_BYTES
) -> dict[str, TensorRef]:
    """Read the headers of all weight files of a model.

    Args:
        directory: holds an index and the files that it names, or model.safetensors, or loose
            *.safetensors files.
        item_bytes: dtypes that may occur, with their sizes.

    Returns:
        Tensor name -> where its bytes lie, in file order.

    Raises:
        UserError: no safetensors files (code 2); one absent, cut off, unlike the index (code 5).
    """
    index = _read_index(directory / INDEX_NAME)
    tensors: dict[str, TensorRef] = {}
    for name in sorted(set(index.values())) or _list_files(directory):
        header = read_header(directory / name, item_bytes)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise _damaged(directory / name, f"repeats {describe(twice)} of another file")
        tensors |= header
    lost = [name for name in index if name not in tensors or tensors[name].file.name != index[name]]
    if lost:
        raise _damaged(directory / INDEX_NAME, f"{describe(lost)} not in the file that it names")
    return tensors


def read_header(path: Path, item_bytes: Mapping[str, int] = ITEM_BYTES) -> dict[str, TensorRef]:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.
        item_bytes: dtypes that may occur, with their sizes.

    Returns:
        Tensor name -> where its bytes lie, in file order.

    Raises:
        UserError: not floating point of 16 to 64 bits (code 2); absent, a git-lfs pointer, an HTML
            page, truncated, damaged (code 5).
    """
    if not path.is_file():
        what = (
            "is no regular file" if os.path.lexists(path) else "is named by the index, and absent"
        )
        raise _damaged(path, what)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        _refuse_stand_in(path, head)
        header_bytes = int.from_bytes(head[:8], "little")
        data_start = 8 + header_bytes
        if header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
            raise _damaged(path, f"{file_bytes} bytes are no whole safetensors file")
        file.seek(8)
        raw = file.read(header_bytes)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        refs = [
            (name, _tensor_ref(path, data_start, item_bytes, **entries[name])) for name in entries
        ]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, "has a damaged safetensors header") from None
    refs.sort(key=lambda item: (item[1].start, item[1].nbytes))
    end = data_start
    for name, ref in refs:
        if ref.start != end:
            raise _damaged(path, f"tensor {name} overlaps the one before it, or leaves a gap")
        end += ref.nbytes
    if end != file_bytes:
        raise _damaged(path, f"has {file_bytes} bytes where its header announces {end}")
    return dict(refs)


def describe(names: list[str]) -> str:
    """Name the first three tensors of a list, and count all.

    Args:
        names: at least one name.

    Returns:
        For example "2 tensors (a, b)" or "12 tensors (a, b, c, ...)".
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _read_index(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise _damaged(path, f"weight_map names {name!r}, which is no plain file name")
    return weight_map


def _list_files(directory: Path) -> list[str]:
    if (directory / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    weights = [name for name in names if not name.startswith(NOT_WEIGHTS)]
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if pickled and not weights:
        rule = f"only pickled weights ({pickled[0]}), which can run code and are never read"
        raise UserError(str(directory), rule, "convert them to safetensors")
    if not weights:
        remedy = "add the *.safetensors files, or --weights random to measure without them"
        raise UserError(str(directory), "holds no safetensors weights", remedy)
    return weights


def _tensor_ref(
    path: Path,
    data_start: int,
    item_bytes: Mapping[str, int],
    dtype: str,
    shape: list[int],
    data_offsets: list[int],
) -> TensorRef:
    if dtype not in item_bytes:
        rule = f"holds {dtype} tensors; a base is {', '.join(ITEM_BYTES)}"
        raise UserError(str(path), rule, "take the 16-bit original of this model")
    begin, end = data_offsets
    nbytes = math.prod(shape) * item_bytes[dtype]
    if begin < 0 or end - begin != nbytes or any(size < 0 for size in shape):
        raise ValueError(f"offsets {data_offsets} do not fit shape {shape}")
    return TensorRef(path, dtype, tuple(shape), data_start + begin, nbytes)


def _refuse_stand_in(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise _damaged(path, "is a git-lfs pointer, not the file", "run git lfs pull there")
    if head.lstrip()[:5].lower() in {b"<!doc", b"<html"}:
        raise _damaged(path, "is an HTML page, not the file", "download the raw file")


def _damaged(path: Path, rule: str, remedy: str = "fetch it again") -> UserError:
    return UserError(str(path), rule, remedy, INTEGRITY)
