"""Every option of a run, once: name, type, default, meaning and the values it may take."""

import dataclasses
import os
import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, cli
from fsdp_qlora.choices import (
    ALIASES,
    ATTENTIONS,
    COUNT,
    DATASET_HELP,
    EVERY,
    FITS,
    GROUP_SIZES,
    HQQ_AXES,
    HQQ_BITS,
    INITS,
    LOGS,
    OFFLOADS,
    OPTIMIZERS,
    PACKINGS,
    PERIOD,
    PLANS,
    PRECISIONS,
    PROMPTS_HELP,
    QUANT_TYPES,
    RESUME_HELP,
    RUNS,
    SCHEDULERS,
    STRATEGIES,
    TEXT,
    TRAIN_TYPES,
    TRAINED,
    built,
    hqq_name,
)
from fsdp_qlora.cli import any_of, flag, idle
from fsdp_qlora.conflicts import find_conflicts
from fsdp_qlora.errors import UserError, join

USAGE = """usage: python train.py --model_name NAME [--recipe NAME|FILE.toml] [--option value ...]

Fine-tunes a language model on 4-bit weights sharded over the GPUs of this machine.
--option true and a bare --option are the same; a recipe stands below the command line."""
PROJECT_DIR = Path(__file__).resolve().parents[1]
RECIPES_DIR = PROJECT_DIR / "recipes"
OWN_CODE = re.compile(r"(.+\.py)(?::(\w+))?")  # rows from a function of the user's own
DATA_OPTIONS = ("dataset", "eval_split")  # those that may name one


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of a run. Fields are the flags of train.py; `--help` prints their meanings."""

    recipe: str | None = flag(None, "model", "recipe name or TOML file; flags stand above it")
    model_name: str = flag("meta-llama/Llama-2-7b-hf", "model", "directory or hub name", rule=TEXT)
    train_type: str = flag("qlora", "model", "base and adapter", built(TRAIN_TYPES))
    precision: str = flag("bf16", "model", "dtype of products; adapters fp32", built(PRECISIONS))
    quant_type: str = flag("nf4", "model", "code of a bitsandbytes weight", QUANT_TYPES)
    double_quant: bool = flag(True, "model", "quantise the block scales too (bitsandbytes)")
    n_bits: int = flag(4, "model", "bits of an HQQ weight", HQQ_BITS)
    group_size: int = flag(64, "model", "HQQ weights that share a scale", GROUP_SIZES)
    hqq_axis: int = flag(1, "model", "1: groups lie in a row; 0: across rows", HQQ_AXES)
    quant_cache: str = flag("auto", "model", "kept 4-bit bytes: auto, off or DIR", rule=TEXT)
    weights: str = flag("load", "model", "random: only the shape is real", any_of("load", "random"))
    attn: str = flag("auto", "model", "attention kernel", ATTENTIONS)
    liger: str = flag("auto", "model", "Liger kernels, if installed", any_of("auto", "off"))

    lora_rank: int = flag(64, "adapter", "rank r of the LoRA matrices", rule=">= 1")
    lora_alpha: int = flag(16, "adapter", "scale is alpha / r", rule=">= 1")
    lora_dropout: float = flag(0.1, "adapter", "on the adapter's input", rule="from 0 to below 1")
    lora_target_modules: str = flag("all", "adapter", "all linears, or a,comma,list", rule=TEXT)
    use_rslora: bool = flag(False, "adapter", "scale is alpha / sqrt(r)")
    init_lora: str = flag("default", "adapter", "start: A random, B zero", INITS)
    loraplus_ratio: float = flag(1.0, "adapter", "lr of the B matrices / lr (LoRA+)", rule="> 0")
    modules_to_save: str | None = flag(None, "adapter", "trained whole: embed_tokens,lm_head")
    llama_pro_path: str | None = flag(None, "adapter", "block-expanded model, see expand")

    dataset: str = flag("alpaca_sample", "data", DATASET_HELP, rule=TEXT)
    dataset_samples: int = flag(512, "data", "rows of dummy, *_sample and orca_math", rule=">= 1")
    train_split: str | None = flag(None, "data", "split to learn, or share of the rows (0.8)")
    eval_split: str | None = flag(None, "data", "held out: share of the rows (0.1), split or file")
    eval_samples: int = flag(0, "data", "rows held out for loss before and after", rule=">= 0")
    template: str | None = flag(None, "data", "kind of rows, x.jinja, or text with {columns}")
    train_on: str = flag("assistant", "data", "what is learned: answers, the last, all", TRAINED)
    system_prompt: str | None = flag(None, "data", "before every conversation or prompt")
    packing: str = flag("auto", "data", "on: fill context_length with several rows", PACKINGS)
    context_length: int = flag(512, "data", "longest row in tokens", rule=">= 2")
    token_cache: str = flag("auto", "data", "kept tokens: auto, off or DIR", rule=TEXT)
    eval_every: str | None = flag(None, "data", "steps from loss to loss, or epoch", rule=EVERY)
    sample_prompt: str | None = flag(None, "data", "prompt answered before and after training")
    sample_prompts: str = flag("auto", "data", PROMPTS_HELP, rule=TEXT)
    sample_tokens: int = flag(48, "data", "longest such answer in tokens", rule=">= 1")

    batch_size: int = flag(1, "training", "rows per rank and micro-batch", rule=">= 1")
    gradient_accumulation_steps: int = flag(1, "training", "micro-batches per step", rule=">= 1")
    num_epochs: int = flag(1, "training", "passes over the data", rule=">= 1")
    max_steps: int = flag(-1, "training", "optimizer steps in all; -1: by epochs", rule=COUNT)
    lr: float = flag(1e-5, "training", "highest learning rate", rule="> 0")
    lr_scheduler: str = flag("constant", "training", "learning rate over time", SCHEDULERS)
    warmup_ratio: float = flag(0.1, "training", "share of steps to warm up", rule="from 0 to 1")
    optimizer: str = flag("adamw", "training", "optimizer of the adapters", any_of(*OPTIMIZERS))
    wd: float = flag(0.1, "training", "weight decay", rule=">= 0")
    apply_gradient_clipping: bool = flag(False, "training", "clip the global gradient norm")
    grad_norm: float = flag(0.3, "training", "largest norm when clipping", rule="> 0")
    max_skipped_steps: int = flag(
        3, "training", "steps in a row without a finite loss, then stop", rule=">= 1"
    )
    seed: int = flag(42, "training", "data order, adapters, dropout", rule="from 0 to 2**32 - 1")
    deterministic: bool = flag(False, "training", "equal bits from run to run, on cards too")

    world_size: int = flag(-1, "sharding", "ranks; -1: one per GPU", rule=COUNT)
    sharding_strategy: str = flag(
        "full_shard", "sharding", "ZeRO-3, ZeRO-2 or DDP; hybrid: per machine", any_of(*STRATEGIES)
    )
    no_sync: bool = flag(False, "sharding", "reduce gradients once a step, not a micro-batch")
    use_cpu_offload: bool = flag(True, "sharding", "frozen base on the host")
    offload_impl: str = flag("auto", "sharding", "how it comes from there", OFFLOADS)
    resident_layers: int = flag(0, "sharding", "layers kept whole on each card", rule=">= 0")
    use_gradient_checkpointing: bool = flag(True, "sharding", "recompute layers in backward")
    reentrant_checkpointing: bool = flag(False, "sharding", "the older way of recomputing")
    selective_layers: int = flag(
        0, "sharding", "layers that keep attention and products", rule=">= 0"
    )
    uncheckpointed_layers: int = flag(0, "sharding", "layers that keep everything", rule=">= 0")
    compile: bool = flag(False, "sharding", "torch.compile per layer: says why not")
    cuda_graphs: str = flag("auto", "sharding", "small batches by graph", any_of("auto", "off"))
    use_activation_cpu_offload: bool = flag(False, "sharding", "inputs of layers on the host")
    fit: str = flag("auto", "sharding", "the plan chooses what you leave open", FITS)
    plan: str = flag("check", "sharding", "ignore: run what should not fit", PLANS)
    dry_run: str = flag(
        "auto", "sharding", "longest rows once, before step 1; auto: on cards", RUNS
    )
    gpu_budget_gib: float | None = flag(None, "sharding", "cap per card in GiB", rule="> 0")
    host_budget_gib: float | None = flag(
        None, "sharding", "host memory of all ranks in GiB", rule="> 0"
    )
    verify_bytes: bool = flag(True, "sharding", "check 4-bit bytes at the start")
    master_port: int | None = flag(None, "sharding", "0: a free one", rule="from 0 to 65535")
    hang_timeout: float | None = flag(None, "sharding", "s without a sign; 0: never", rule=">= 0")
    max_restarts: int = flag(0, "sharding", "new starts after a crash or a hang", rule=">= 0")

    output_dir: str | None = flag(None, "output", "[output/MODEL-TYPE-TIME]", rule=TEXT)
    overwrite: bool = flag(False, "output", "write into a directory that holds a run")
    save_model: bool = flag(True, "output", "save the adapter at the end")
    save_every: str = flag("30m", "output", "checkpoints: steps, or minutes; 0: none", rule=PERIOD)
    keep_checkpoints: int = flag(2, "output", "last ones that stay, besides the best", rule=">= 1")
    resume: str | None = flag(None, "output", RESUME_HELP, rule=TEXT)
    allow_data_change: bool = flag(False, "output", "resume with other rows, seed or batch")
    push_to_hub: str | None = flag(None, "output", "OWNER/NAME the adapter is sent to", rule=TEXT)
    log_to: str = flag("tqdm", "output", "bar, plain lines, or bar and a tracker", LOGS)

    profile: bool = flag(False, "profiler", "write traces of torch.profiler")
    profiling_output: str = flag("profiles", "profiler", "their directory, in that of the run")
    profiling_frequency: int = flag(10, "profiler", "steps from trace to trace", rule=">= 1")
    wait_steps: int = flag(1, "profiler", "of a cycle, left out, if repeat is given", rule=">= 0")
    warmup_steps: int = flag(1, "profiler", "of a cycle, watched but not kept", rule=">= 0")
    active_steps: int = flag(4, "profiler", "of a cycle, in the trace", rule=">= 1")
    repeat: int = flag(0, "profiler", "cycles; 0: to the end", rule=">= 0")
    export_trace: bool = flag(True, "profiler", "write the time line, for Perfetto")
    export_memory_timeline: bool = flag(False, "profiler", "write allocations over time")
    with_stack: bool = flag(False, "profiler", "record where in the program")
    with_shapes: bool = flag(False, "profiler", "record shapes of the operands")
    profile_memory: bool = flag(False, "profiler", "write torch's memory snapshot of a card")

    low_memory: bool = idle(True, "weights are always streamed layer by layer")
    loading_workers: int = idle(-1, "the ranks share the loading")
    verbose: bool = idle(False, "what matters is always printed")
    master_addr: str = idle("localhost", "ranks of this machine meet on 127.0.0.1")
    project_name: str = flag("fsdp_qlora", "wandb", "project of the run there", rule=TEXT)
    name: str | None = flag(None, "wandb", "of the run there [its directory]", rule=TEXT)
    group: str | None = flag(None, "wandb", "group of runs there", rule=TEXT)
    entity: str | None = flag(None, "wandb", "user or team there", rule=TEXT)

    @property
    def format_name(self) -> str:
        """Name of the format the frozen linears are stored in, such as "nf4_dq"."""
        base = TRAIN_TYPES[self.train_type].base
        bnb = self.quant_type + ("_dq" if self.double_quant and self.quant_type != "int8" else "")
        hqq = hqq_name(self.n_bits, self.group_size, self.hqq_axis)
        return {"bnb": bnb, "hqq": hqq, "none": "bf16"}[base]

    @property
    def compute_dtype(self) -> str:
        """Torch name of the dtype of products and activations."""
        return PRECISIONS[self.precision].compute

    @property
    def master_dtype(self) -> str:
        """Torch name of the dtype of adapters and optimizer states."""
        return PRECISIONS[self.precision].master

    def levels(self, num_layers: int) -> tuple[str, ...]:
        """What each decoder layer keeps for the backward pass, rows of packed.LEVELS.

        The last layers keep most: theirs is needed first and freed first.

        Args:
            num_layers: decoder layers.
        """
        if not self.use_gradient_checkpointing:
            return ("none",) * num_layers
        num_none = min(self.uncheckpointed_layers, num_layers)
        num_selective = min(self.selective_layers, num_layers - num_none)
        num_full = num_layers - num_none - num_selective
        return ("full",) * num_full + ("selective",) * num_selective + ("none",) * num_none

    @property
    def saves_checkpoints(self) -> bool:
        """Whether the run writes checkpoints: `save_every` is neither 0 steps nor 0 minutes."""
        return int(self.save_every.removesuffix("m")) > 0

    @property
    def resolved_output_dir(self) -> Path:
        """Directory of the run; `parse` has put its name, with the time of the start, in here."""
        name = self.output_dir or default_output_dir(self.model_name, self.train_type)
        return Path(os.path.expanduser(name))


def default_output_dir(model_name: str, train_type: str) -> str:
    """Return output/<model>-<train_type>-<yyyymmdd-hhmmss> for a run that starts now."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip(".-") or "model"
    return f"output/{model}-{train_type}-{time.strftime('%Y%m%d-%H%M%S')}"


def parse(argv: Sequence[str]) -> Config:
    """Return the resolved configuration of a command line.

    Args:
        argv: arguments without the program's name.

    Returns:
        A configuration that obeys all rules, with its output directory filled in.

    Raises:
        UserError: every fault of names, types, choices, ranges and combinations, at once.
        SystemExit: code 0 after printing the help.
    """
    cli.show_help_if_asked(argv, Config, USAGE)
    values, faults = cli.read(argv, Config, ALIASES, RECIPES_DIR)
    cfg = Config(**values)
    faults += find_conflicts(cfg, frozenset(values))
    if faults:
        raise join(faults)
    is_expanded = cfg.llama_pro_path and TRAIN_TYPES[cfg.train_type].adapter == "llama_pro"
    return dataclasses.replace(
        cfg,
        model_name=str(cfg.llama_pro_path) if is_expanded else cfg.model_name,
        use_cpu_offload=cfg.use_cpu_offload and cfg.sharding_strategy != "ddp",
        output_dir=str(cfg.resolved_output_dir),
    )


def given(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options that a command line, or the recipe it names, sets.

    Args:
        argv: arguments without the program's name, see `parse`.
    """
    return frozenset(cli.read(argv, Config, ALIASES, RECIPES_DIR)[0])


def to_dict(cfg: Config) -> dict[str, Any]:
    """Return every option by name, in the order of the help."""
    return dataclasses.asdict(cfg)


def save(cfg: Config, path: str | os.PathLike[str], versions: Mapping[str, str]) -> None:
    """Write every option, and under "versions" what the run runs on, as JSON, whole or not at all.

    Args:
        cfg: the configuration.
        path: file to write; its directory exists.
        versions: name -> version.
    """
    atomic.write_json(Path(path), to_dict(cfg) | {"versions": dict(versions)})


def check_own_code(stored: Mapping[str, Any], given: Collection[str], place: Path | str) -> None:
    """Refuse Python that only a directory names: it runs when the command line names it, too.

    Args:
        stored: options as an adapter or a checkpoint keeps them, by name.
        given: names of the options that the user's own command line sets.
        place: the directory, for the error.

    Raises:
        UserError: `dataset` or `eval_split` is `file.py[:function]` and was not given (code 2).
    """
    values = {key: str(stored.get(key) or "") for key in DATA_OPTIONS if key not in given}
    code = {
        key: value
        for key, value in values.items()
        if any(OWN_CODE.fullmatch(name.strip()) for name in (value, *value.split(",")))
    }
    if code:
        got = ", ".join(f"{key} {value}" for key, value in code.items())
        flags = " ".join(f"--{key} {shlex.quote(value)}" for key, value in code.items())
        rule = f"is Python that only {place} names, which never runs"
        raise UserError(got, rule, f"if you trust it, add {flags}")
