"""LoRA adapters: attaching them, starting values, and their names outside.

Source: LoRA, arXiv 2106.09685, section 4.1.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fsdp_qlora.arch import Linear
from fsdp_qlora.config import Config
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.linear import PackedLinear
from fsdp_qlora.model.packed import LoraSlot
from fsdp_qlora.model.shard import blocks, local_range, set_local


def attach(model: nn.Module, targets: Iterable[Linear], cfg: Config, world_size: int) -> None:
    """Give each decoder layer one flat float32 LoRA parameter (meta).

    Args:
        model: from skeleton.build.
        targets: linears to adapt, by their name inside the layer.
        cfg: lora_rank, lora_alpha, lora_dropout, use_rslora: see LoraSlot.
        world_size: the parameter is padded to a multiple of it, so that slices are even.
    """
    names = [linear.name for linear in targets]
    for block in blocks(model):
        body = block.body
        linears = {n: m for n, m in body.layer.named_modules() if isinstance(m, PackedLinear)}
        rest = (cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.use_rslora)
        numel = body.set_slots([LoraSlot(name, linears[name], *rest) for name in names])
        numel = -(-numel // world_size) * world_size
        body.lora = nn.Parameter(torch.empty(numel, dtype=torch.float32, device="meta"))


def initialise(model: nn.Module, seed: int, device: torch.device) -> None:
    """Fill this rank's slices: A uniform in +-1/sqrt(I), B zero.

    The values depend on (seed, layer, name) only, so every world size starts from the same adapter.

    Args:
        model: sharded.
        seed: of the values.
        device: where this rank keeps its slices.

    Source: huggingface/peft, src/peft/tuners/lora/layer.py (Kaiming uniform with a = sqrt 5).
    """
    for index, block in enumerate(blocks(model)):
        if not block.body.slots:
            continue
        whole = torch.zeros(block.body.lora.shape, dtype=torch.float32)
        for slot, (a_RI, _) in zip(block.body.slots, block.body.split_lora(whole), strict=True):
            bound = 1 / math.sqrt(slot.linear.in_features)
            a_RI.uniform_(-bound, bound, generator=_generator(seed, f"{index}.{slot.name}"))
        start, stop = local_range(block.body.lora)
        set_local(block.body, "lora", whole[start:stop].to(device))


def load(model: nn.Module, path: Path, layers_prefix: str, device: torch.device) -> None:
    """Fill this rank's slices from an adapter in peft's format.

    Args:
        model: sharded and filled, with slots as the adapter has them.
        path: adapter_model.safetensors.
        layers_prefix: where the layers are in the model, "model.layers".
        device: where this rank keeps its slices.

    Raises:
        UserError: a tensor is missing, unknown or of another shape (code 5).
    """
    blocks_ = list(blocks(model))
    flats = [torch.zeros(block.body.lora.shape, dtype=torch.float32) for block in blocks_]
    places = dict(named_pairs(model, flats, layers_prefix))
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(places):
            other = sorted(set(file.keys()) ^ set(places))
            raise UserError(
                f"{path}: {other[0]} and {len(other) - 1} more",
                "an adapter must have just the tensors of the linears that it adapts",
                "check that it belongs to this model",
                code=5,
            )
        for name, place in places.items():
            values = file.get_tensor(name)
            if values.shape != place.shape:
                raise UserError(
                    f"{path}: {name} is {list(values.shape)}",
                    f"this model has {list(place.shape)}",
                    "check that it belongs to this model",
                    code=5,
                )
            place.copy_(values)
    for block, flat in zip(blocks_, flats, strict=True):
        start, stop = local_range(block.body.lora)
        set_local(block.body, "lora", flat[start:stop].to(device))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def named_pairs(
    model: nn.Module, flats: list[torch.Tensor], layers_prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (peft tensor name, tensor) for whole flat LoRA tensors, one per decoder layer.

    Args:
        model: that the tensors belong to; only its slots are read.
        flats: the whole (unsharded) `lora` of each layer, in order.
        layers_prefix: where the layers are in the model, "model.layers".

    Yields:
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" and [R, I]; likewise
        lora_B, [O, R].
    """
    for index, (block, flat) in enumerate(zip(blocks(model), flats, strict=True)):
        for slot, (a_RI, b_OR) in zip(block.body.slots, block.body.split_lora(flat), strict=True):
            stem = f"base_model.model.{layers_prefix}.{index}.{slot.name}"
            yield f"{stem}.lora_A.weight", a_RI
            yield f"{stem}.lora_B.weight", b_OR
