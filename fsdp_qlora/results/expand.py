"""A model made larger before it is trained: new layers that change nothing yet, new tokens.

Block expansion: behind each group of layers stands a copy of its last one whose projections into
the residual stream are zero, so that it hands on what it gets. Training moves the copies alone.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.trained import NEW_LAYERS, new_layers
from fsdp_qlora.atomic import new_directory
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.weights import Weights
from fsdp_qlora.results.beside import copy_beside, write_tokens
from fsdp_qlora.results.shards import Shards, edit_json
from fsdp_qlora.results.verbs import ExpandOptions
from fsdp_qlora.results.vocabulary import Vocabulary, add

GIB = 2**30
# What writes into the residual stream, by its name in Llama, GPT-NeoX, GPT-2, Mixtral and kin.
INTO_RESIDUAL = {"o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "w2"}


def run(options: ExpandOptions, info: ModelInfo, num_new: int, out: Path, need_bytes: int) -> None:
    """Expand a model, tensor by tensor, and say what was done.

    Args:
        options: max_shard_gib, add_tokens.
        info: the model, with its tensors.
        num_new: layers to be added.
        out: directory to be made.
        need_bytes: of the result.

    Raises:
        UserError: what writes into the residual stream is not known by name (code 2), a full disk
            (code 3).
    """
    added = new_layers(info.num_layers, num_new) if num_new else ()
    vocabulary = add(info, options.add_tokens) if options.add_tokens else None
    zeroed = {name for name, *_ in _sources(info, added) if INTO_RESIDUAL & set(name.split("."))}
    if added and len(zeroed) < 2 * info.num_layers:
        rule = f"none of {', '.join(sorted(INTO_RESIDUAL))} is in each half of its layers"
        raise UserError(f"{info.path}: {info.model_type}", rule, "expand a Llama-like model")
    with new_directory(out, need_bytes) as draft:
        names = [name for _, name, _ in _sources(info, added)]
        with Shards(draft, names, round(options.max_shard_gib * GIB)) as shards:
            for name, tensor in _tensors(info, added, vocabulary):
                shards.add(name, tensor)
        copy_beside(draft, info, None)
        edit_json(draft / "config.json", _changes(info, added))
        if vocabulary is not None:
            edit_json(draft / "config.json", {"vocab_size": vocabulary.num_rows})
            write_tokens(draft, vocabulary.core)
    flags = f"--train_type qlora --model_name {out} --modules_to_save embed_tokens,lm_head"
    if added:
        flags = f"--train_type bnb_llama_pro --llama_pro_path {out}"
        print(f"layers    {info.num_layers} and {num_new} new ones, numbers {added}")
    if vocabulary is not None:
        num_tokens = vocabulary.core.get_vocab_size()
        print(f"tokens    {num_tokens:,}, embeddings of {vocabulary.num_rows:,} rows")
    print(f"written   {out}\nnext      python train.py {flags} --dataset YOUR_ROWS.jsonl")


def _order(num_layers: int, added: tuple[int, ...]) -> list[int]:
    """Which old layer each layer of the result comes from."""
    order = list(range(num_layers))
    for number in added:
        order.insert(number, order[number - 1])
    return order


def _sources(info: ModelInfo, added: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
    """(name in the old model, name in the new one, whether it is a copy), old one by old one."""
    places: dict[int, list[int]] = {}
    for number, layer in enumerate(_order(info.num_layers, added)):
        places.setdefault(layer, []).append(number)
    stem = f"{info.layers_prefix}."
    for name in info.tensors:
        old, _, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem):
            yield name, name, False
            continue
        for number in places[int(old)]:
            yield name, f"{stem}{number}.{rest}", number in added


def _tensors(
    info: ModelInfo, added: tuple[int, ...], vocabulary: Vocabulary | None
) -> Iterator[tuple[str, torch.Tensor]]:
    ends = {name for name, shape in info.root_params if shape[0] == info.vocab_size}
    read = Weights(info).read_ahead(list(info.tensors), torch.device("cpu"))
    last, tensor = "", torch.empty(0)
    for old, new, is_copy in _sources(info, added):
        if old != last:
            last, tensor = old, next(read)
            if vocabulary is not None and old in ends:
                tensor = vocabulary.extended(tensor)
        is_zero = is_copy and INTO_RESIDUAL & set(old.split("."))
        yield new, torch.zeros_like(tensor) if is_zero else tensor


def _changes(info: ModelInfo, added: tuple[int, ...]) -> dict[str, Any]:
    """What config.json must say of the result; lists of one entry a layer grow with it."""
    from transformers import AutoConfig

    full = AutoConfig.for_model(**info.config).to_dict()
    order = _order(info.num_layers, added)
    lists = {
        key: [values[old] for old in order]
        for key, values in full.items()
        if isinstance(values, list) and len(values) == info.num_layers
    }
    if not added:
        return {}
    return lists | {"num_hidden_layers": len(order), NEW_LAYERS: list(added)}
