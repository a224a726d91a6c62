"""Options that cannot stand together, and options that have no effect: the rules between flags."""

import dataclasses
from typing import TYPE_CHECKING

from fsdp_qlora.choices import PROFILER, TRAIN_TYPES
from fsdp_qlora.errors import UserError

if TYPE_CHECKING:
    from fsdp_qlora.config import Config


def find_conflicts(cfg: "Config", set_names: frozenset[str]) -> list[UserError]:
    """Return the combinations of options that cannot work.

    Args:
        cfg: options, each valid by itself.
        set_names: the options the user wrote.

    Returns:
        One error per conflict, with the remedy.
    """
    base = TRAIN_TYPES[cfg.train_type].base
    offload = cfg.use_cpu_offload and "use_cpu_offload" in set_names
    cycle = cfg.warmup_steps + cfg.active_steps
    no_bnb = "belongs to a bitsandbytes base"
    table = [
        (
            offload and cfg.sharding_strategy == "ddp",
            "--use_cpu_offload true with --sharding_strategy ddp",
            "ddp keeps the whole base on each card",
            "use full_shard, or leave offload out",
        ),
        (
            cfg.reentrant_checkpointing and not cfg.use_gradient_checkpointing,
            "--reentrant_checkpointing true",
            "needs --use_gradient_checkpointing true",
            "set both or none",
        ),
        (
            base != "bnb" and cfg.quant_type != "nf4",
            f"--quant_type {cfg.quant_type} with --train_type {cfg.train_type}",
            no_bnb,
            "use --train_type qlora, or leave it out",
        ),
        (
            base != "bnb" and not cfg.double_quant,
            f"--double_quant false with --train_type {cfg.train_type}",
            no_bnb,
            "use --train_type qlora, or leave it out",
        ),
        (
            cfg.compile,
            "--compile true",
            "Dynamo cannot trace products whose weights are gathered or streamed as they are read",
            "leave it out: small batches run by CUDA graphs (--cuda_graphs auto)",
        ),
        (
            cfg.attn == "flash_attention_2" and cfg.compute_dtype == "float32",
            "--attn flash_attention_2 with --precision fp32",
            "flash attention has no fp32 kernel",
            "use --attn sdpa or --precision bf16",
        ),
        (
            cfg.profile and not cfg.repeat and cfg.profiling_frequency < cycle,
            f"--profiling_frequency {cfg.profiling_frequency}",
            f"a cycle has {cycle} steps of warmup and trace",
            "make it longer, or say how many cycles with --repeat",
        ),
    ]
    return [UserError(got, rule, remedy) for is_broken, got, rule, remedy in table if is_broken]


def cfg_notes(cfg: "Config") -> list[str]:
    """Return one line for every option that was set but has no effect in this run.

    Args:
        cfg: a configuration made by `parse`.

    Returns:
        Lines to print once, on one rank.
    """
    notes = [
        f"--{field.name} has no effect: {field.metadata['idle']}"
        for field in dataclasses.fields(cfg)
        if field.metadata["idle"] and getattr(cfg, field.name) != field.default
    ]
    if cfg.sharding_strategy == "ddp":
        notes.append("cpu offload is off: ddp keeps the whole base on each card")
    elif not cfg.use_cpu_offload and cfg.offload_impl != "auto":
        notes.append("--offload_impl has no effect: --use_cpu_offload is false")
    if not cfg.use_gradient_checkpointing and (cfg.selective_layers or cfg.uncheckpointed_layers):
        notes.append("without gradient checkpointing every layer keeps everything")
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    if not cfg.apply_gradient_clipping and cfg.grad_norm != fields["grad_norm"].default:
        notes.append("--grad_norm has no effect: --apply_gradient_clipping is false")
    if not cfg.profile:
        changed = [n for n in PROFILER if getattr(cfg, n) != fields[n].default]
        notes += [f"--{name} has no effect: --profile is false" for name in changed]
    return notes
