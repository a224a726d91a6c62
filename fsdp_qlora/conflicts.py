"""Options that cannot stand together, and options that have no effect: the rules between flags."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fsdp_qlora.choices import OPTIMIZERS, PROFILER, TRAIN_TYPES, WANDB
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.redaction import redact

if TYPE_CHECKING:
    from fsdp_qlora.config import Config

HOME_PATHS = (
    *("output_dir", "quant_cache", "token_cache", "template", "eval_split", "sample_prompts"),
)


def find_conflicts(cfg: "Config", set_names: frozenset[str]) -> list[UserError]:
    """Return the combinations of options that cannot work.

    Args:
        cfg: options, each valid by itself.
        set_names: the options the user wrote.

    Returns:
        One error per conflict, with the remedy.
    """
    base = TRAIN_TYPES[cfg.train_type].base
    cycle = cfg.warmup_steps + cfg.active_steps
    table = [
        *_computing(cfg, set_names),
        *_foreign_flags(cfg, base),
        *_starts(cfg),
        (
            cfg.push_to_hub is not None and not cfg.save_model,
            f"--push_to_hub {cfg.push_to_hub} with --save_model false",
            "nothing is saved that could be sent",
            "leave one of them out",
        ),
        (
            cfg.quant_type == "int8" and cfg.double_quant and "double_quant" in set_names,
            "--double_quant true with --quant_type int8",
            "int8 has one constant for each row, and nothing to quantise again",
            "leave --double_quant out",
        ),
        (
            Path(cfg.profiling_output).is_absolute() or ".." in Path(cfg.profiling_output).parts,
            f"--profiling_output {cfg.profiling_output}",
            "must be a directory inside that of the run",
            "give a plain name",
        ),
        (
            cfg.profile and not cfg.repeat and cfg.profiling_frequency < cycle,
            f"--profiling_frequency {cfg.profiling_frequency}",
            f"a cycle has {cycle} steps of warmup and trace",
            "make it longer, or say how many cycles with --repeat",
        ),
    ]
    faults = [UserError(got, rule, remedy) for is_broken, got, rule, remedy in table if is_broken]
    return faults + _homes(cfg) + _secrets(cfg)


def _computing(cfg: "Config", set_names: frozenset[str]) -> list[tuple[bool, str, str, str]]:
    """What concerns where things lie, and kernels."""
    offload = cfg.use_cpu_offload and "use_cpu_offload" in set_names
    return [
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
            cfg.use_activation_cpu_offload and not cfg.use_gradient_checkpointing,
            "--use_activation_cpu_offload true",
            "what goes to the host are the inputs of layers that are recomputed",
            "set --use_gradient_checkpointing true",
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
    ]


def _starts(cfg: "Config") -> list[tuple[bool, str, str, str]]:
    """Starting values of adapters that are not offered, and why.

    Measured: SmolLM2-135M, NF4, r 64: LoftQ takes 9.3 % of a weight to 7.9 %.
    """
    base = "it changes the base, so that the adapter would fit no base that others quantise"
    little = "it finds little: NF4's error has no low rank (9.3 % -> 7.9 % of a weight at r 64)"
    rows = {"pissa": base, "loftq": little}
    return [
        (cfg.init_lora == name, f"--init_lora {name}", why, "leave it out")
        for name, why in rows.items()
    ]


def _foreign_flags(cfg: "Config", base: str) -> list[tuple[bool, str, str, str]]:
    """Flags of another kind of base than that of the train type."""
    bnb = ("belongs to a bitsandbytes base", "use --train_type qlora, or leave it out")
    hqq = ("belongs to an HQQ base", "use --train_type hqq_lora, or leave it out")
    rows = [("quant_type", "nf4", "bnb", bnb), ("double_quant", True, "bnb", bnb)]
    rows += [("n_bits", 4, "hqq", hqq), ("group_size", 64, "hqq", hqq), ("hqq_axis", 1, "hqq", hqq)]
    return [
        (
            base != owner and getattr(cfg, name) != usual,
            f"--{name} {str(getattr(cfg, name)).lower()} with --train_type {cfg.train_type}",
            *why,
        )
        for name, usual, owner, why in rows
    ]


def _homes(cfg: "Config") -> list[UserError]:
    """Paths in the home of a user who is not there."""
    paths = {name: str(getattr(cfg, name)) for name in HOME_PATHS}
    return [
        UserError(f"--{name} {path}", "no such home directory", "give another path")
        for name, path in paths.items()
        if path.startswith("~") and os.path.expanduser(path) == path
    ]


def _secrets(cfg: "Config") -> list[UserError]:
    """Every option stands in the record of the run: secrets come by other ways."""
    texts = "\n".join(value for value in vars(cfg).values() if isinstance(value, str))
    if redact(texts, os.environ) == texts:
        return []
    rule = "holds what looks like a secret, and would stand in the record of the run"
    remedy = "set HF_TOKEN, or run hf auth login"
    return [
        UserError(f"--{name} {value}", rule, remedy)
        for name, value in vars(cfg).items()
        if isinstance(value, str) and redact(value, os.environ) != value
    ]


def check_optimizer(name: str, has_cards: bool) -> None:
    """Refuse an optimizer that the ranks cannot run.

    Args:
        name: row of OPTIMIZERS.
        has_cards: they compute on CUDA cards.

    Raises:
        UserError: it needs a card (code 3).
    """
    if not (has_cards or OPTIMIZERS[name].on_cpu):
        rule = "is a kernel of bitsandbytes for CUDA cards, and the ranks compute on the CPU"
        raise UserError(f"--optimizer {name}", rule, "use adamw", ENVIRONMENT)


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
    if cfg.precision in ("bf16_autocast", "bf16_buffers_autocast"):
        words = f"--precision {cfg.precision} is bf16: rotary tables are float32 in all of them"
        notes.append(words)
    if cfg.no_sync and cfg.gradient_accumulation_steps == 1:
        notes.append("--no_sync has no effect: --gradient_accumulation_steps is 1")
    if cfg.sharding_strategy == "ddp":
        notes.append("cpu offload is off: ddp keeps the whole base on each card")
    elif not cfg.use_cpu_offload and cfg.offload_impl != "auto":
        notes.append("--offload_impl has no effect: --use_cpu_offload is false")
    if not cfg.use_gradient_checkpointing and (cfg.selective_layers or cfg.uncheckpointed_layers):
        notes.append("without gradient checkpointing every layer keeps everything")
    if TRAIN_TYPES[cfg.train_type].adapter == "dora":
        notes += ["CUDA graphs are off: they have no inputs for the row lengths of DoRA"]
        notes += ["--lora_dropout doubles DoRA's frozen products"] * (cfg.lora_dropout > 0)
    kind = TRAIN_TYPES[cfg.train_type].adapter
    if kind not in ("lora", "dora"):
        idle = "--loraplus_ratio has no effect: nothing has an adapter"
        notes += [idle] * (cfg.loraplus_ratio != 1)
    if kind == "full":
        notes += ["--modules_to_save has no effect: all is trained"] * bool(cfg.modules_to_save)
        notes += ["cpu offload has no effect: nothing is frozen"] * cfg.use_cpu_offload
    if kind != "llama_pro" and cfg.llama_pro_path:
        notes.append("--llama_pro_path has no effect: no llama_pro is trained")
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    if not cfg.apply_gradient_clipping and cfg.grad_norm != fields["grad_norm"].default:
        notes.append("--grad_norm has no effect: --apply_gradient_clipping is false")
    for is_used, names, why in (
        (cfg.profile, PROFILER, "--profile is false"),
        (cfg.log_to == "wandb", WANDB, "--log_to is not wandb"),
    ):
        changed = [n for n in names if getattr(cfg, n) != fields[n].default and not is_used]
        notes += [f"--{name} has no effect: {why}" for name in changed]
    return notes
