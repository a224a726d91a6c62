"""What was trained, on disk: an adapter in peft's format, new layers, or a whole model."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.atomic import new_file
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.export import adapter, hub, model_files
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.model.skeleton import QuantizedModel

MAX_SHARD_BYTES = 5 * 2**30


def save(
    model: torch.nn.Module, info: ModelInfo, cfg: TrainConfig, tokenizer: Any, is_writer: bool
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
    assert isinstance(model, QuantizedModel)
    directory = cfg.resolved_output_dir
    kind = TRAIN_TYPES[cfg.train_type].adapter
    if kind == "full":
        return _save_model(model, info, cfg, tokenizer, is_writer)
    is_new = kind == "llama_pro"
    path = directory / (adapter.LAYERS_NAME if is_new else adapter.WEIGHTS_NAME)
    own = trained.whole(info, cfg)
    prefixes = tuple(f"{info.layers_prefix}.{index}." for index in own.layers)
    names = [name for name in model.tensors if name in own.root or name.startswith(prefixes)]
    tensors = {n: t for n, t in shard.whole_parameters(model, names, is_writer) if is_writer}
    flats = [] if is_new else shard.whole_lora(model, is_writer)
    if not is_writer:
        return path
    if not is_new:
        tensors = _adapter_tensors(model, info, flats, tensors)
        _save_config(model, info, cfg)
    if tokenizer is not None:
        model_files.write_tokenizer(directory, info, tokenizer)
    record = adapter.record_of(info, cfg)
    with new_file(path) as draft:
        save_file(tensors, draft, metadata=adapter.metadata(record))
    _compare(path, tensors)
    hub.write_card(directory, cfg, info)
    return path


def _adapter_tensors(
    model: QuantizedModel,
    info: ModelInfo,
    flats: list[torch.Tensor],
    saved: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """By peft's names; a tied embedding stands for the head, too."""
    adapters.shift_magnitudes(model, flats, 1)
    pairs = adapters.named_pairs(model, flats, info.layers_prefix)
    tensors = {name: tensor.contiguous() for name, tensor in pairs}
    for name, tensor in saved.items():
        tensors[f"base_model.model.{name}"] = tensor.contiguous()
        if info.is_tied:
            tensors["base_model.model.lm_head.weight"] = tensor.clone()
    return tensors


def _save_config(model: QuantizedModel, info: ModelInfo, cfg: TrainConfig) -> None:
    import peft

    saved = {name.split(".")[-2] for name in trained.whole(info, cfg).root}
    name, revision = adapter.base_name(info, cfg)
    slots = next(shard.blocks(model)).body.slots
    config = peft.LoraConfig(
        r=slots[0].rank,
        lora_alpha=round(slots[0].alpha),
        use_rslora=slots[0].use_rslora,
        use_dora=slots[0].has_magnitude,
        lora_dropout=slots[0].dropout,
        target_modules=sorted({slot.name.rpartition(".")[2] for slot in slots}),
        base_model_name_or_path=name,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        modules_to_save=sorted(saved | ({"lm_head"} if saved and info.is_tied else set())) or None,
    )
    config.save_pretrained(str(cfg.resolved_output_dir))


def _save_model(
    model: QuantizedModel, info: ModelInfo, cfg: TrainConfig, tokenizer: Any, is_writer: bool
) -> Path:
    directory = cfg.resolved_output_dir
    names, dtype = list(model.tensors), getattr(torch, cfg.compute_dtype)
    tensors = shard.whole_parameters(model, names, is_writer)
    if not is_writer:
        for _ in tensors:  # the others gather with the writer
            pass
        return directory
    own = ((name, tensor.to(dtype)) for name, tensor in tensors)
    model_files.write_weights(directory, names, own, MAX_SHARD_BYTES)
    name = next(key for key, own in model_files.DTYPES.items() if own == cfg.compute_dtype)
    model_files.copy_beside(directory, info, name)
    if tokenizer is not None:
        model_files.write_tokenizer(directory, info, tokenizer)
    hub.write_card(directory, cfg, info)
    return directory


def _compare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    read = load_file(path)
    same = read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)
    if not same:
        got, rule = f"{path} does not hold what was written", "an adapter is read back and compared"
        raise UserError(got, rule, "check the disk and save again", INTEGRITY)
