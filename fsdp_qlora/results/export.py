"""The adapter on disk, in peft's format."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import adapters, shard
from fsdp_qlora.results import adapter_files, card


def save(
    model: torch.nn.Module, info: ModelInfo, cfg: Config, tokenizer: Any, is_writer: bool
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, the tokenizer and a model card.

    The weights are read back and compared; in their header lies what `merge` must know of the base.

    Args:
        model: the sharded model; all ranks must call.
        info: what it is.
        cfg: gives the directory, and the base's name where `info` has no path.
        tokenizer: transformers tokenizer or None.
        is_writer: this rank writes.

    Returns:
        Path of the weights.

    Raises:
        UserError: what was read back is not what was written (code 5).
    """
    directory = cfg.resolved_output_dir
    path = directory / "adapter_model.safetensors"
    flats = shard.whole_lora(model, is_writer)
    if not is_writer:
        return path
    import peft

    tensors = {
        name: tensor.contiguous()
        for name, tensor in adapters.named_pairs(model, flats, info.layers_prefix)
    }
    slots = next(shard.blocks(model)).body.slots
    config = peft.LoraConfig(
        r=slots[0].rank,
        lora_alpha=round(slots[0].alpha),
        use_rslora=slots[0].use_rslora,
        lora_dropout=slots[0].dropout,
        target_modules=sorted({slot.name.rpartition(".")[2] for slot in slots}),
        base_model_name_or_path=str(info.path or cfg.model_name),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    record = adapter_files.record_of(info, cfg)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata=adapter_files.metadata(record))
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)
    _compare(path, tensors)
    card.write(directory, cfg, info)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _compare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    read = load_file(path)
    same = read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)
    if not same:
        raise UserError(
            f"{path} does not hold what was written",
            "an adapter is read back and compared",
            "check the disk and save again",
            code=5,
        )
