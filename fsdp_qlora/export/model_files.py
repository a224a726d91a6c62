"""The files of a model that is written: weights tensor by tensor, config.json, the tokenizer.

Of a safetensors file nothing is held but the header: it may be padded with spaces, so room for it
is left in front and it is written last. A tokenizer saved anew carries the names of the library
that saved it, and an older transformers, vLLM and llama.cpp's converter cannot read it: its files
are copied from the base, and only what changed is written (the chat template, new tokens).

Source: the format's README, section "Format", github.com/huggingface/safetensors.
"""

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import atomic
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import INDEX_NAME, SINGLE_NAME, TOKENIZER_FILES
from fsdp_qlora.arch.trained import NEW_LAYERS
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.hardware import GIB

if TYPE_CHECKING:
    import torch

    from fsdp_qlora.data.tokenizer import TextTokenizer

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DEVICES = ("auto", "cpu", "cuda")
SHARD_HELP = "largest output file in GiB"
ENTRY_BYTES = 160  # of a header entry besides the name, at most
ALIGN_BYTES = 8  # every tensor starts at a multiple of its item size, as torch's views want it
OF_TOKENIZER = (*TOKENIZER_FILES, "added_tokens.json", "chat_template.json", "*.model")
OF_TOKENIZER += ("*.tiktoken",)
SPECIAL = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@contextlib.contextmanager
def safetensors_file(
    path: Path, names: Iterable[str]
) -> Iterator[Callable[[str, "torch.Tensor"], None]]:
    """Write one safetensors file; after an error it is left as it is, without a header.

    Args:
        path: to be made.
        names: of all tensors that may come.

    Yields:
        A function that writes a tensor, by name. A small one of an odd size waits for the end, so
        that the others stay aligned.
    """
    import torch

    from fsdp_qlora.model import weights

    dtype_names = {dtype: name for name, dtype in weights.DTYPES.items()} | {torch.uint8: "U8"}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in (*names, "__metadata__"))
    header_bytes = -(-room // ALIGN_BYTES) * ALIGN_BYTES
    waiting: list[tuple[str, torch.Tensor]] = []
    file = path.open("wb")

    def write(name: str, tensor: torch.Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        start = file.tell() - 8 - header_bytes
        offsets, shape = [start, start + raw.nbytes], list(tensor.shape)
        dtype = dtype_names[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        file.write(raw.data)

    def add(name: str, tensor: torch.Tensor) -> None:
        if tensor.nbytes % ALIGN_BYTES:
            waiting.append((name, tensor.cpu().clone()))
        else:
            write(name, tensor)

    try:
        file.seek(8 + header_bytes)
        yield add
        for name, tensor in sorted(waiting, key=lambda item: -item[1].element_size()):
            write(name, tensor)
        header = json.dumps(entries).encode()
        assert len(header) <= header_bytes, "the header has outgrown its room"
        file.seek(0)
        file.write(header_bytes.to_bytes(8, "little") + header.ljust(header_bytes))
        file.flush()
        os.fsync(file.fileno())
        file.close()
    except BaseException:
        file.raw.close()  # what is buffered cannot be written: the disk may be full
        raise


def write_weights(
    directory: Path,
    names: Iterable[str],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    max_bytes: int,
) -> dict[str, float]:
    """Write a model's tensors to files of a size, named as transformers does, and their index.

    Args:
        directory: for the files.
        names: of all tensors that may come.
        tensors: name and tensor, on any device; the next one is asked for when one is written.
        max_bytes: a file that would be larger is ended and another one begun.

    Returns:
        num_files, gib (of all tensors), written_s, host_peak_gib (of this process so far).
    """
    began_s = time.perf_counter()
    names, files = list(names), list[list[str]]()
    size, total_bytes = 0, 0
    with contextlib.ExitStack() as stack:
        for name, tensor in tensors:
            if not files or size + tensor.nbytes > max_bytes:
                stack.close()
                files.append([])
                size, part = 0, directory / f"part-{len(files)}"
                add = stack.enter_context(safetensors_file(part, names))
            add(name, tensor)
            files[-1].append(name)
            size += tensor.nbytes
            total_bytes += tensor.nbytes
    num = len(files)
    weight_map: dict[str, str] = {}
    for number, held in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{num:05d}.safetensors" if num > 1 else SINGLE_NAME
        (directory / f"part-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(held, file_name)
    if num > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        atomic.write_json(directory / INDEX_NAME, index)
    return {
        "num_files": num,
        "gib": total_bytes / GIB,
        "written_s": time.perf_counter() - began_s,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def choose_device(name: str) -> "torch.device":
    """Where to compute.

    Args:
        name: cpu, cuda, or auto: the GPU if there is one.

    Raises:
        UserError: there is no GPU (code 3).
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda", "there is no GPU here", "use --device cpu", ENVIRONMENT)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def linear_names(info: ModelInfo) -> set[str]:
    """Names of the weights that training quantizes: the linears of all decoder layers."""
    return {
        f"{info.layers_prefix}.{index}.{linear.name}.weight"
        for index in range(info.num_layers)
        for linear in info.linears
    }


def describe_written(out: Path, facts: Mapping[str, float]) -> str:
    """Say what has been written, for the console.

    Args:
        out: the directory.
        facts: what `write_weights` returned.
    """
    return (
        f"written   {out}: {facts['num_files']} files, {facts['gib']:.2f} GiB in "
        f"{facts['written_s']:.1f} s; at most {facts['host_peak_gib']:.2f} GiB of host memory"
    )


def copy_beside(
    out: Path, info: ModelInfo, dtype: str | None, adapter: Path | None = None, **changes: Any
) -> None:
    """Put the files beside the weights of a model: config.json, generation_config.json, tokenizer.

    Args:
        out: directory of the result.
        info: the base.
        dtype: key of DTYPES, for config.json; None leaves it as it is.
        adapter: directory whose tokenizer stands above that of the base where it has other tokens.
        changes: other values for config.json.
    """
    config = {key: value for key, value in info.config.items() if key != NEW_LAYERS}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = DTYPES[dtype]
    atomic.write_json(out / "config.json", config | changes)
    if info.path is not None:
        _copy(info.path, out, ("generation_config.json", *OF_TOKENIZER))
    own, base = _read(adapter), _read(info.path)
    if adapter is None or own is None:
        return
    if base is None or (base.names, base.core.get_vocab()) != (own.names, own.core.get_vocab()):
        _copy(adapter, out, OF_TOKENIZER)
    else:
        _write_template(out, own.chat_template, base)


def write_tokenizer(out: Path, info: ModelInfo, tokenizer: Any) -> None:
    """Put the tokenizer of a base beside what was trained over it.

    Args:
        out: directory of the result.
        info: the base.
        tokenizer: transformers tokenizer, as training used it: its chat template may be another.
    """
    assert info.path is not None, "a tokenizer without files"
    _copy(info.path, out, OF_TOKENIZER)
    _write_template(out, tokenizer.chat_template, _read(info.path))


def _write_template(out: Path, template: Any, base: "TextTokenizer | None") -> None:
    from fsdp_qlora.data.tokenizer import CHAT_FILE

    if isinstance(template, str) and (base is None or template != base.chat_template):
        atomic.write(out / CHAT_FILE, template)


def write_tokens(out: Path, core: Any) -> None:
    """Write the tokens of a tokenizer that its copied files lack.

    Args:
        out: directory with the files of the base.
        core: `tokenizers.Tokenizer` with the new tokens.
    """
    path = out / "tokenizer.json"
    table = json.loads(path.read_text("utf-8")) if path.exists() else json.loads(core.to_str())
    known = {entry["id"] for entry in table["added_tokens"]}
    new = {
        number: {key: getattr(token, key) for key in SPECIAL}
        for number, token in sorted(core.get_added_tokens_decoder().items())
        if number not in known
    }
    table["added_tokens"] += [{"id": number, **entry} for number, entry in new.items()]
    _dump(path, table)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {str(number): entry for number, entry in new.items()}
        _dump(path, settings)
    path = out / "added_tokens.json"
    if path.exists():
        ids = {entry["content"]: number for number, entry in new.items()}
        _dump(path, json.loads(path.read_text("utf-8")) | ids)


def _dump(path: Path, table: dict[str, Any]) -> None:
    atomic.write(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _read(place: Path | None) -> "TextTokenizer | None":
    """The tokenizer in a directory; None where there is none that can be read."""
    from fsdp_qlora.data import tokenizer

    try:
        return None if place is None else tokenizer.read(place)
    except UserError:
        return None


def _copy(source: Path, out: Path, patterns: tuple[str, ...]) -> None:
    found = {path for pattern in patterns for path in source.glob(pattern)}
    for path in found:
        if path.is_file() and path.suffix != ".py":
            shutil.copyfile(path, out / path.name)
