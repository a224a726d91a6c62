"""A model from nothing to filled, in the one order that works."""

from dataclasses import dataclass

import torch

from fsdp_qlora import arch
from fsdp_qlora.arch import trained
from fsdp_qlora.config import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import adapters, cache, kernels, load, placement, shard, skeleton, weights
from fsdp_qlora.model.cache import PackedCache
from fsdp_qlora.model.kernels import Choice
from fsdp_qlora.model.load import LoadReport
from fsdp_qlora.model.placement import Placed
from fsdp_qlora.model.skeleton import PackedModel


@dataclass(frozen=True)
class Shaped:
    """A model that is sharded, but has no bytes yet.

    Attributes:
        model: its adapters attached.
        chosen: what it computes with.
        cache, placed: where its packed bytes will come from and lie.
    """

    model: PackedModel
    chosen: Choice
    cache: PackedCache
    placed: Placed


@dataclass(frozen=True)
class Built(Shaped):
    """A model that can run, its adapters at their starting values.

    Attributes:
        loaded: how its bytes came.
    """

    loaded: LoadReport


def shape(cfg: Config, info: arch.ModelInfo, world: World) -> Shaped:
    """Build, adapt, place and shard a model on the meta device.

    Args:
        cfg: the run.
        info: the model.
        world: the ranks; all must call.

    Returns:
        The model, to be filled.

    Raises:
        UserError: see placement.choose.
    """
    chosen = kernels.choose(
        cfg.attn, cfg.liger, cfg.compute_dtype, world.device, info.softcaps_attention
    )
    whole = trained.whole(info, cfg)
    master = getattr(torch, cfg.master_dtype)
    model = skeleton.build(info, cfg.format_name, chosen, whole, master)
    if trained.has_adapters(cfg):
        adapters.attach(model, arch.select_linears(info, cfg.lora_target_modules), cfg, world.size)
    # The cache keeps whole models.
    setting = "off" if whole.layers else cfg.quant_cache
    packed_cache = cache.open_cache(setting, info, model.layout, world)
    placed = placement.choose(model.layout, info.num_layers, cfg, packed_cache, world, whole.layers)
    shard.apply(model, cfg.sharding_strategy, placed, chosen.dtype, world)
    model.set_checkpointing(cfg, world.device)
    return Shaped(model, chosen, packed_cache, placed)


def build(cfg: Config, info: arch.ModelInfo, world: World) -> Built:
    """Shape a model and fill it.

    Args:
        cfg: the run.
        info: the model.
        world: the ranks; all must call.

    Returns:
        The model and what was done.

    Raises:
        UserError: see `shape` and load.fill.
    """
    shaped = shape(cfg, info, world)
    source = weights.build(info, cfg)
    loaded = load.fill(shaped.model, source, shaped.cache, shaped.placed, cfg, world)
    return Built(shaped.model, shaped.chosen, shaped.cache, shaped.placed, loaded)
