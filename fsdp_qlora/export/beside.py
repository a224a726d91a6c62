"""What lies beside weights: config.json and the tokenizer, in the bytes that the base has.

A tokenizer saved anew carries the names of the library that saved it, and an older transformers,
vLLM and llama.cpp's converter cannot read it. So files are copied, and only what changed is
written: the chat template, new tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import TOKENIZER_FILES
from fsdp_qlora.arch.trained import NEW_LAYERS
from fsdp_qlora.data import tokenizer as tokenizers
from fsdp_qlora.data.tokenizer import CHAT_FILE, TextTokenizer
from fsdp_qlora.errors import UserError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
SHARD_HELP = "largest output file in GiB"
OF_TOKENIZER = (*TOKENIZER_FILES, "added_tokens.json", "chat_template.json", "*.model")
OF_TOKENIZER += ("*.tiktoken",)
SPECIAL = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


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
    own = _read(adapter)
    if adapter is None or own is None:
        return
    base = _read(info.path)
    if base is None or (base.names, base.core.get_vocab()) != (own.names, own.core.get_vocab()):
        _copy(adapter, out, OF_TOKENIZER)
    elif own.chat_template is not None and own.chat_template != base.chat_template:
        atomic.write(out / CHAT_FILE, own.chat_template)


def write_tokenizer(out: Path, info: ModelInfo, tokenizer: Any) -> None:
    """Put the tokenizer of a base beside what was trained over it.

    Args:
        out: directory of the result.
        info: the base.
        tokenizer: transformers tokenizer, as training used it: its chat template may be another.
    """
    assert info.path is not None, "a tokenizer without files"
    _copy(info.path, out, OF_TOKENIZER)
    template, base = tokenizer.chat_template, _read(info.path)
    if isinstance(template, str) and (base is None or template != base.chat_template):
        atomic.write(out / CHAT_FILE, template)


def write_tokens(out: Path, core: Any) -> None:
    """Write the tokens of a tokenizer that its copied files lack.

    Args:
        out: directory with the files of the base.
        core: `tokenizers.Tokenizer` with the new tokens.
    """
    tokens = {
        number: {"id": number, **{key: getattr(token, key) for key in SPECIAL}}
        for number, token in sorted(core.get_added_tokens_decoder().items())
    }
    path = out / "tokenizer.json"
    table = json.loads(path.read_text("utf-8")) if path.exists() else json.loads(core.to_str())
    known = {entry["id"] for entry in table["added_tokens"]}
    table["added_tokens"] += [entry for number, entry in tokens.items() if number not in known]
    _dump(path, table)
    new = {number: entry for number, entry in tokens.items() if number not in known}
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "added_tokens_decoder" in settings:
        for number, entry in new.items():
            settings["added_tokens_decoder"][str(number)] = {key: entry[key] for key in SPECIAL}
        _dump(path, settings)
    path = out / "added_tokens.json"
    if path.exists():
        ids = {entry["content"]: number for number, entry in new.items()}
        _dump(path, json.loads(path.read_text("utf-8")) | ids)


def _dump(path: Path, table: dict[str, Any]) -> None:
    atomic.write(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _read(place: Path | None) -> TextTokenizer | None:
    """The tokenizer in a directory; None where there is none that can be read."""
    try:
        return None if place is None else tokenizers.read(place)
    except UserError:
        return None


def _copy(source: Path, out: Path, patterns: tuple[str, ...]) -> None:
    found = {path for pattern in patterns for path in source.glob(pattern)}
    for path in found:
        if path.is_file() and path.suffix != ".py":
            shutil.copyfile(path, out / path.name)
