"""The files of a model or an adapter: weights tensor by tensor, config.json, the tokenizer.

Of a safetensors file nothing is held but the header: it may be padded with spaces, so room for it
is left in front and it is written last. A tokenizer saved anew carries the names of the library
that saved it, and an older transformers, vLLM and llama.cpp's converter cannot read it: its files
are copied from the base, and only what changed is written (the chat template, new tokens).

Source: the format's README, section "Format", github.com/huggingface/safetensors.
"""

import collections
import contextlib
import json
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fsdp_qlora import atomic, cli, errors, hardware
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import INDEX_NAME, SINGLE_NAME, read_json
from fsdp_qlora.arch.targets import ALL_LINEARS, layer_numbers, module_names, peft_name
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig
from fsdp_qlora.data import tokenizer as tokenizers
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.export import hub
from fsdp_qlora.model import adapters, experts, shard, weights
from fsdp_qlora.model.skeleton import QuantizedModel
from fsdp_qlora.planning.sizes import NEW_LAYERS, has_adapters, trained_whole

MAX_SHARD_GIB = 5.0
ENTRY_BYTES = 160  # of a header entry besides the name, at most
OF_WRAPPER = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
ALIGN_BYTES = 8  # every tensor starts at a multiple of its item size, as torch's views want it
FORMAT = {"format": "pt"}  # what transformers wants in a header
Tensors = dict[str, torch.Tensor]
NamedTensors = Iterable[tuple[str, torch.Tensor]]


@contextlib.contextmanager
def safetensors_file(
    path: Path, names: Iterable[str], metadata: Mapping[str, str] = FORMAT
) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Write one safetensors file; after an error it is left as it is, without a header.

    Equal tensors and metadata are equal bytes: the library writes metadata in any order.

    Args:
        path: to be made.
        names: of all tensors that may come.
        metadata: for the header, texts by name.

    Yields:
        A function that writes a tensor, by name. A small one of an odd size waits for the end, so
        that the others stay aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + len(json.dumps(entries))
    header_bytes = -(-room // ALIGN_BYTES) * ALIGN_BYTES
    waiting: Tensors = {}
    with path.open("wb") as file:

        def write(name: str, tensor: torch.Tensor) -> None:
            raw, start = _bytes(tensor).numpy(), file.tell() - 8 - header_bytes
            place = {"shape": list(tensor.shape), "data_offsets": [start, start + raw.nbytes]}
            entries[name] = {"dtype": weights.DTYPE_NAMES[tensor.dtype], **place}
            file.write(raw.data)

        def add(name: str, tensor: torch.Tensor) -> None:
            if tensor.nbytes % ALIGN_BYTES:
                waiting[name] = tensor.cpu().clone()
            else:
                write(name, tensor)

        file.seek(8 + header_bytes)
        yield add
        for name, tensor in sorted(waiting.items(), key=lambda item: -item[1].element_size()):
            write(name, tensor)
        header = json.dumps(entries).encode().ljust(header_bytes)
        assert len(header) == header_bytes, "the header has outgrown its room"
        file.seek(0)
        file.write(header_bytes.to_bytes(8, "little") + header)
    atomic.sync(path)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def write_weights(
    directory: Path, names: Iterable[str], tensors: NamedTensors, max_bytes: int
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
    began_s, names, files = time.perf_counter(), list(names), list[list[str]]()
    size, total_bytes = 0, 0
    progress = cli.Progress("writes", len(names), "tensors")
    with contextlib.ExitStack() as stack, progress:
        for name, tensor in tensors:
            if not files or size + tensor.nbytes > max_bytes:
                stack.close()
                files.append([])
                part = directory / f"part-{len(files)}"
                size, add = 0, stack.enter_context(safetensors_file(part, names))
            add(name, tensor)
            files[-1].append(name)
            size += tensor.nbytes
            total_bytes += tensor.nbytes
            progress.update(1, tensor.nbytes)
    num, weight_map = len(files), dict[str, str]()
    for number, held in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{num:05d}.safetensors" if num > 1 else SINGLE_NAME
        (directory / f"part-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(held, file_name)
    if num > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        atomic.write_json(directory / INDEX_NAME, index)
    took_s, own = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
    figures = {"num_files": num, "gib": total_bytes / hardware.GIB, "written_s": took_s}
    return figures | {"host_peak_gib": own.ru_maxrss / 2**20}


def copy_beside(
    out: Path, info: ModelInfo, dtype: str | None, adapter: Path | None = None, **changes: Any
) -> None:
    """Put the files beside the weights of a model: config.json, generation_config.json, tokenizer.

    Args:
        out: directory of the result.
        info: the base.
        dtype: torch's name, for config.json; None leaves it as it is.
        adapter: directory whose tokenizer stands above that of the base where it has other tokens.
        changes: other values for config.json.
    """
    whole = read_json(info.path / "config.json") if info.wrapper and info.path else info.config
    config = {k: v for k, v in whole.items() if k not in (NEW_LAYERS, "quantization_config")}
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    atomic.write_json(out / "config.json", config | changes)
    own, base = _tokenizer(adapter), _tokenizer(info.path)
    _copy(info.path, out, ("generation_config.json", *OF_WRAPPER * bool(info.wrapper)))
    write_tokenizer(out, info, own)
    words = [None if text is None else (text.names, text.core.get_vocab()) for text in (own, base)]
    if own is not None and words[0] != words[1]:
        _copy(adapter, out, adapter_files.OF_TOKENIZER)


def write_tokenizer(out: Path, info: ModelInfo, tokenizer: Any) -> None:
    """Put the tokenizer of a base beside what was trained over it.

    Args:
        out: directory of the result.
        info: the base.
        tokenizer: with the chat template of training, which may be another; None: of the base.
    """
    _copy(info.path, out, adapter_files.OF_TOKENIZER)
    template, base = getattr(tokenizer, "chat_template", None), _tokenizer(info.path)
    if isinstance(template, str) and (base is None or template != base.chat_template):
        atomic.write(out / tokenizers.CHAT_FILE, template)


def write_tokens(out: Path, core: Any) -> None:
    """Write the tokens of a tokenizer that its copied files lack.

    Args:
        out: directory with the files of the base.
        core: `tokenizers.Tokenizer` with the new tokens.
    """

    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    table, settings, ids = (atomic.read_json(out / name) for name in names)
    settings = settings if "added_tokens_decoder" in settings else {}  # else it names no token
    whole = json.loads(core.to_str())
    table = table or whole
    known = {entry["id"] for entry in table["added_tokens"]}
    new = [entry for entry in whole["added_tokens"] if entry["id"] not in known]
    table["added_tokens"] += new
    for entry in new:
        form = {key: value for key, value in entry.items() if key != "id"}
        if settings:
            settings["added_tokens_decoder"][str(entry["id"])] = form
        if ids:
            ids[entry["content"]] = entry["id"]
    for name, values in zip(names, (table, settings, ids), strict=True):
        if values:
            atomic.write(out / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _tokenizer(place: Path | None) -> tokenizers.TextTokenizer | None:
    """The tokenizer in a directory; None where there is none that can be read."""
    with contextlib.suppress(errors.UserError):
        return None if place is None else tokenizers.read(place)
    return None


def _copy(source: Path | None, out: Path, patterns: tuple[str, ...]) -> None:
    if source is None:
        return
    for path in {path for name in patterns for path in source.glob(name)}:
        if path.is_file() and path.suffix != ".py":
            place = out / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            atomic.write(place, path.read_bytes())


def save(
    model: QuantizedModel, info: ModelInfo, cfg: TrainConfig, tokenizer: Any, is_writer: bool
) -> Path:
    """Write what was trained, the tokenizer and a model card.

    LoRA and DoRA become adapter_config.json and adapter_model.safetensors, LLaMA-Pro the new layers
    alone, full training a model of transformers. All but the last are read back and compared; in
    their header lies what `merge` must know of the base.

    Args:
        model: the sharded model; all ranks must call.
        info: what it is.
        cfg: gives the directory, and the base's name where `info` has no path.
        tokenizer: transformers tokenizer or None.
        is_writer: this rank writes.

    Returns:
        Path of the weights; of a whole model, its directory.

    Raises:
        UserError: what was read back is not what was written (code 5).
    """
    is_full = TRAIN_TYPES[cfg.train_type].adapter == "full"
    path = (_save_model if is_full else _save_parts)(model, info, cfg, is_writer)
    if is_writer and tokenizer is not None:
        write_tokenizer(cfg.resolved_output_dir, info, tokenizer)
    if is_writer:
        hub.write_card(cfg.resolved_output_dir, cfg, info)
    return path


def _save_parts(model: QuantizedModel, info: ModelInfo, cfg: TrainConfig, is_writer: bool) -> Path:
    """Write the LoRA matrices and what was trained whole, or the new layers of LLaMA-Pro."""
    is_lora, own = has_adapters(cfg), trained_whole(info, cfg)
    name = adapter_files.WEIGHTS_NAME if is_lora else adapter_files.LAYERS_NAME
    path = cfg.resolved_output_dir / name
    prefixes = tuple(f"{info.layers_prefix}.{index}." for index in own.layers)
    names = [name for name in model.tensors if name in own.root or name.startswith(prefixes)]
    tensors = {n: t for n, t in shard.whole_parameters(model, names, is_writer) if is_writer}
    flats = shard.whole_lora(model, is_writer) if is_lora else []
    if not is_writer:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_lora:
        adapters.shift_magnitudes(model, flats, 1)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        if tensors and info.is_tied:  # a tied embedding stands for the head, too
            tensors["base_model.model.lm_head.weight"] = next(iter(tensors.values())).clone()
        tensors |= adapters.named_pairs(model, flats)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _save_config(model, info, cfg, path.parent)
    record = adapter_files.metadata(adapter_files.record_of(info, cfg))
    _write_checked(path, tensors, record)
    if cfg.expert_names == "each":
        place = path.parent / adapter_files.EACH
        place.mkdir(exist_ok=True)
        _write_checked(place / name, _each(tensors, model, info), record)
        _save_config(model, info, cfg, place)
    return path


def _each(tensors: Tensors, model: QuantizedModel, info: ModelInfo) -> Tensors:
    """The matrices of an adapter, those of experts by the names of their base's files."""
    each = dict(tensors)
    slots = [(i, slot) for i, block in enumerate(shard.blocks(model)) for slot in block.body.slots]
    for index, slot in (row for row in slots if row[1].num_experts > 1):
        name = f"base_model.model.{model.layers_prefix}.{index}.{peft_name(slot.name)}.lora_"
        both = each.pop(f"{name}A.weight"), each.pop(f"{name}B.weight")
        is_down, linears = slot.name.endswith("down_proj"), info.by_layer[index].linears
        for linear in (n for n in linears if n.expert and (n.expert[2] == 2) == is_down):
            stem = info.outer_name(f"{info.layers_prefix}.{index}.{linear.name}")
            pair = zip("AB", experts.pair_of_one(linear, slot.num_experts, *both), strict=True)
            stem = f"base_model.model.{stem}.lora_"
            each |= {f"{stem}{side}.weight": tensor.contiguous() for side, tensor in pair}
    return each


def _write_checked(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    with atomic.new_file(path) as draft, safetensors_file(draft, tensors, metadata) as add:
        for tensor_name, tensor in sorted(tensors.items()):
            add(tensor_name, tensor)
    read = load_file(path)
    is_same = read.keys() == tensors.keys()  # by bytes: NaN is not equal to itself
    if not is_same or not all(_bytes(read[n]).equal(_bytes(tensors[n])) for n in tensors):
        got, rule = f"{path} does not hold what was written", "an adapter is read back and compared"
        raise errors.UserError(got, rule, "check the disk and save again", errors.INTEGRITY)


def _save_config(model: QuantizedModel, info: ModelInfo, cfg: TrainConfig, place: Path) -> None:
    import peft

    saved = {name.split(".")[-2] for name in trained_whole(info, cfg).root}
    saved |= {"lm_head"} if saved and info.is_tied else set()
    name, revision = adapter_files.base_name(info, cfg)
    slots = [slot for block in shard.blocks(model) for slot in block.body.slots]
    targets = module_names(cfg.lora_target_modules)
    mixed = {slot.name: slot for slot in slots if slot.num_experts > 1}
    slots = [slot for slot in slots if slot.num_experts == 1]
    scales = {re.escape(name): (s.rank // s.num_experts, s.alpha) for name, s in mixed.items()}
    params = [*mixed]
    if ALL_LINEARS.issuperset(targets):
        targets = sorted({slot.name.rpartition(".")[2] for slot in slots})
    own_layers = layer_numbers(cfg.layers_to_transform)
    exclude = module_names(cfg.lora_exclude_modules) or None
    if own_layers:
        params = [f"{model.layers_prefix}.{layer}.{name}" for layer in own_layers for name in mixed]
    if info.wrapper:  # its other parts have linears of the same names
        names = "|".join(sorted({slot.name.replace(".", r"\.") for slot in slots}))
        numbers = "|".join(map(str, own_layers)) or r"\d+"
        stem = model.layers_prefix.replace(".", r"\.")
        targets, own_layers, exclude = rf"{stem}\.({numbers})\.({names})", [], None
    if place.name == adapter_files.EACH:  # of gate and up, peft makes one matrix of both ranks
        own = sorted({linear.last_name for linear in info.linears if linear.expert})
        single, any_own, params = next(iter(scales.values())), "|".join(own), []
        for param in (n for n in scales if not n.endswith("down_proj") and len(own) > 2):
            scales[param] = 2 * single[0], 2 * single[1]
        scales[rf"experts\.\d+\.({any_own})"] = single
        pattern = rf"({targets})|.*\.experts\.(\d+\.)?({any_own})"
        targets = pattern if isinstance(targets, str) else [*targets, *own]
    ranks, alphas = ({name: pair[i] for name, pair in scales.items()} for i in range(2))
    config = peft.LoraConfig(
        r=cfg.lora_rank,
        rank_pattern=ranks | json.loads(cfg.rank_pattern or "{}"),
        alpha_pattern=alphas | json.loads(cfg.alpha_pattern or "{}"),
        use_dora=slots[0].has_magnitude,
        target_modules=targets,
        target_parameters=params or None,
        exclude_modules=exclude,
        layers_to_transform=own_layers or None,
        base_model_name_or_path=name,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        modules_to_save=sorted(saved) or None,
        **{name: getattr(cfg, name) for name in ("lora_alpha", "lora_dropout", "use_rslora")},
    )
    # Not by save_pretrained: peft makes a set of the linears, and a set has no order.
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    atomic.write_json(place / adapter_files.CONFIG_NAME, dict(sorted(values.items())))


def _save_model(model: QuantizedModel, info: ModelInfo, cfg: TrainConfig, is_writer: bool) -> Path:
    """Write all weights of full training, in the dtype that it computed in."""
    directory, dtype = cfg.resolved_output_dir, getattr(torch, cfg.compute_dtype)
    tensors = shard.whole_parameters(model, list(model.tensors), is_writer)
    own = ((name, tensor.to(dtype)) for name, tensor in tensors)
    try:
        if is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            write_weights(directory, model.tensors, own, round(MAX_SHARD_GIB * hardware.GIB))
            copy_beside(directory, info, cfg.compute_dtype)
    finally:
        collections.deque(tensors, 0)  # all gather with the writer, also where its disk is full
    return directory
