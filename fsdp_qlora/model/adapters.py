"""LoRA adapters: attaching them, starting values, and their names outside.

Source: LoRA, arXiv 2106.09685, section 4.1.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.targets import Target, peft_name
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model import experts, lora, shard
from fsdp_qlora.model.skeleton import QuantizedModel

PEFT_NAMES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def attach(
    model: nn.Module, targets: Sequence[Sequence[Target]], cfg: TrainConfig, world_size: int
) -> None:
    """Give each decoder layer with linears to adapt one flat LoRA parameter (meta).

    Args:
        model: from skeleton.build.
        targets: of every layer, see find_targets.
        cfg: lora_dropout, use_rslora, train_type (see LoraSlot), master_dtype.
        world_size: the parameter is padded to a multiple of it, so that slices are even.
    """
    has_magnitude = TRAIN_TYPES[cfg.train_type].adapter == "dora"
    master = getattr(torch, cfg.master_dtype)
    for block, own in zip(shard.blocks(model), targets, strict=True):
        if not own:
            continue
        body, linears, slots = block.body, dict[str, tuple[str, Any]](), list[lora.LoraSlot]()
        for name, module in body.layer.named_modules():
            if isinstance(module, lora.QuantizedLinear):
                linears[module.stored_name] = name, module
            elif isinstance(module, experts.QuantizedExperts):
                sides = {module.in_name: module.ins, "down_proj": module.down}
                linears |= {m.stored_name: (f"{name}.{side}", m) for side, m in sides.items()}
        for linear, rank, alpha, num in own:
            rest: Any = (cfg.lora_dropout, cfg.use_rslora, has_magnitude, num)
            slots.append(lora.LoraSlot(*linears[linear.name], rank * num, alpha, *rest))
        numel = -(-body.set_slots(slots) // world_size) * world_size
        body.lora = nn.Parameter(torch.empty(numel, dtype=master, device="meta"))


def generator(seed: int, name: str) -> torch.Generator:
    """The random numbers of one matrix A, the same however the model is placed.

    Args:
        seed: of the run.
        name: number of the layer, and name of the linear in it.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(model: nn.Module, seed: int, device: torch.device) -> None:
    """Fill this rank's slices: A uniform in +-1/sqrt(I), all else zero; measure rows for DoRA.

    The values depend on (seed, layer, name) only, so every world size starts from the same adapter.

    Args:
        model: sharded.
        seed: of the values.
        device: where this rank keeps its slices.

    Source: huggingface/peft, src/peft/tuners/lora/layer.py (Kaiming uniform with a = sqrt 5).
    """
    for index, block in enumerate(shard.blocks(model)):
        if not block.body.slots:
            continue
        whole = torch.zeros(block.body.lora.shape, dtype=torch.float32)
        for slot, (a_RI, *_) in zip(block.body.slots, block.body.split_lora(whole), strict=True):
            bound = 1 / math.sqrt(slot.linear.in_features)
            a_RI.uniform_(-bound, bound, generator=generator(seed, f"{index}.{slot.name}"))
        shard.set_slice(block.body, "lora", whole, device)
        if block.body.slots[0].has_magnitude:
            shard.gathered(block)
            dtype = next(block.body.layer.parameters()).dtype
            rows = [lora.row_squares(slot.linear.dequantize(dtype)) for slot in block.body.slots]
            block.body.row_squares = torch.cat(rows)
            block.layer_store.cache.clear()  # else a layer would lie there till the first step
            shard.release(block)


def load(model: QuantizedModel, path: Path, scales: dict[str, float] | None = None) -> None:
    """Fill this rank's slices from an adapter in peft's format, or new layers of LLaMA-Pro.

    Args:
        model: sharded and filled, with slots as the adapter has them.
        path: adapter_model.safetensors, or new_layers.safetensors.
        scales: linear in the model -> scale of its pair; ranks may be smaller than the slots' then
            and pairs may be missing. None: every slot has its pair, of its own rank and scale.

    Raises:
        UserError: a tensor is missing, unknown or of another shape (code 5).
    """
    blocks_, device = [b for b in shard.blocks(model) if b.body.slots], model.head.weight.device
    flats = [torch.zeros(block.body.lora.shape, dtype=torch.float32) for block in blocks_]
    places, stem = dict(named_pairs(model, flats)), "base_model.model." if flats else ""
    saved = {n: place for n, place in model.tensors.items() if getattr(*place).requires_grad}
    places |= {stem + name: torch.empty(getattr(*place).shape) for name, place in saved.items()}
    remedy = "check that it belongs to this model"
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        if saved and model.is_tied:
            found.discard(f"{stem}lm_head.weight")  # a copy
        absent = [n for n in places if scales and n not in found and ".lora_" in n]
        if {*found, *absent} != set(places):
            other = sorted(found ^ set(places))
            rule = "an adapter must have just the tensors of the linears that it adapts"
            got = f"{path}: {other[0]} and {len(other) - 1} more"
            raise UserError(got, rule, remedy, INTEGRITY)
        for name in (name for name in places if name in found):
            values, tensor = file.get_tensor(name), places[name]
            linear, _, part = name.removeprefix(stem).partition(".lora_")
            if scales and part == "A.weight":
                tensor = tensor[: len(values)]
            elif scales and part == "B.weight":
                tensor = tensor[:, : values.shape[-1]]
                values = values.float() * (scales[linear] / blocks_[0].body.slots[0].scale)
            if values.shape != tensor.shape:
                got, rule = f"{path}: {name} is {list(values.shape)}", "this model has "
                raise UserError(got, rule + str(list(tensor.shape)), remedy, INTEGRITY)
            tensor.copy_(values)
    shift_magnitudes(model, flats, -1)
    for name in absent:
        places[name].zero_()
    for block, flat in zip(blocks_, flats, strict=True):
        shard.set_slice(block.body, "lora", flat, device)
    for name, place in saved.items():
        shard.set_slice(*place, places[stem + name], device)
    if model.is_tied:
        model.head.weight = model.embedding.get_parameter("weight")


def b_slices(model: nn.Module, params: list[nn.Parameter]) -> list[Tensor]:
    """Find the B matrices in this rank's slices of what is trained.

    Args:
        model: sharded.
        params: of shard.local_parameters.

    Returns:
        Views of those of their elements that are here.
    """
    local, found = dict(zip(map(id, shard.trained_parameters(model)), params, strict=True)), []
    for body in (block.body for block in shard.blocks(model) if block.body.slots):
        start, stop = shard.local_range(body.lora)
        for _, b_OR, *_ in body.split_lora(torch.empty(body.lora.shape, device="meta")):
            first = max(b_OR.storage_offset(), start)
            last = min(b_OR.storage_offset() + b_OR.numel(), stop)
            if first < last:
                found.append(local[id(body.lora)].data[first - start : last - start])
    return found


def named_pairs(model: QuantizedModel, flats: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (peft tensor name, tensor) for whole flat LoRA tensors, one per decoder layer.

    Args:
        model: that the tensors belong to; only its slots are read.
        flats: the whole (unsharded) `lora` of each layer that has one, in order.

    Yields:
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" and [R, I]; likewise
        lora_B, [O, R], and of DoRA lora_magnitude_vector, [O].
    """
    adapted = [(i, block.body) for i, block in enumerate(shard.blocks(model)) if block.body.slots]
    for (index, body), flat in zip(adapted, flats, strict=True):
        for slot, parts in zip(body.slots, body.split_lora(flat), strict=True):
            stem = f"base_model.model.{model.layers_prefix}.{index}.{peft_name(slot.name)}"
            for name, part in zip(PEFT_NAMES, parts, strict=False):
                yield f"{stem}.{name}", part


def shift_magnitudes(model: nn.Module, flats: list[Tensor], sign: int) -> None:
    """Make DoRA's magnitudes of their changes, or changes of magnitudes; LoRA is left alone.

    Args:
        model: filled.
        flats: the whole `lora` of each layer, on the host, changed in place.
        sign: 1 adds the length of the frozen rows, -1 takes it away.
    """
    bodies = [block.body for block in shard.blocks(model) if block.body.slots]
    for body, flat in zip(bodies, flats, strict=True):
        for parts, square_O in zip(body.split_lora(flat), body.split_squares(), strict=False):
            parts[2].add_(square_O.cpu().sqrt(), alpha=sign)


def peft_note(model: nn.Module, info: ModelInfo) -> str:
    """Say where peft takes the linears of shared experts for those of the experts themselves.

    Args:
        model: with adapters, or without.
        info: the model.

    Returns:
        One line, or "".
    """
    if all(linear.expert is None for linear in info.linears):
        return ""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    slots = [slot for block in shard.blocks(model) for slot in block.body.slots]
    names = {slot.name.rpartition(".")[2] for slot in slots if slot.num_experts == 1}
    config = LoraConfig(target_modules=list(names))
    stand_in = cast(nn.Module, SimpleNamespace(config=SimpleNamespace(model_type=info.model_type)))
    try:
        convert_peft_config_for_transformers(config, stand_in, None)
        kept = set(config.target_modules or ())
    except ValueError:  # only some of what it would fuse
        kept = {name for name in names if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))}
    if kept == names:
        return ""
    wrong = f"peft takes {', '.join(sorted(names - kept))} of {info.model_type} for experts"
    remedy = f"merge it, or use --lora_target_modules {','.join(sorted(kept))}"
    return f"adapter   {wrong} and would compute otherwise: {remedy}"
