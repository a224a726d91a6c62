"""Every option of a run, once: name, type, default, meaning, values, and what goes with what."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsdp_qlora import atomic, cli
from fsdp_qlora.cli import Alias, Given, flag
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError, join, read_table, redact, refuse

USAGE = "usage: python train.py --model_name NAME [--recipe NAME|FILE] [--option value ...]"
PROJECT_DIR = Path(__file__).resolve().parents[1]
PACKAGE = "fsdp_qlora"
RECIPES_DIR = Path(__file__).resolve().parent / "recipes"  # a link to that of the project
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OWN_CODE = re.compile(r"(.+\.py)(?::(\w+))?")  # rows from a function of the user's own


class TrainType(NamedTuple):
    """A train_type: how the frozen base weights are stored, and what is trained on top."""

    base: Literal["bnb", "hqq", "none"]
    adapter: Literal["lora", "dora", "llama_pro", "full"]


class Strategy(NamedTuple):
    """A sharding_strategy: how the ranks share the weights.

    Args:
        replicates: every rank keeps everything; only gradients are exchanged.
        is_hybrid: sharded over the ranks of a machine, replicated over machines.
        reshards: gathered layers are freed between forward and backward.
    """

    replicates: bool = False
    is_hybrid: bool = False
    reshards: bool = True


class Optimizer(NamedTuple):
    """An optimizer.

    Args:
        kind: its class.
        decays: weight decay is part of its method.
        state_bytes: of a trained parameter on the GPU; paged state can leave it.
        is_fused: its kernel reads on the device whether the step is to be skipped.
    """

    kind: str
    decays: bool
    state_bytes: int
    is_fused: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on CPU ranks too."""
        return self.kind.startswith("torch.")


class Objective(NamedTuple):
    """An objective: what a run learns from a row.

    Args:
        num_answers: 2: a chosen and a rejected one; 1: one, with a label; 0: the row itself.
        has_reference: answers are compared with those of the model before the first step.
        nll_on_prompt: the cross entropy of chosen answers counts their prompts too.
    """

    num_answers: int = 2
    has_reference: bool = True
    nll_on_prompt: bool = False


_TABLE = read_table(__file__)
MAIN, EXAMPLES, HELP = _TABLE["main"], _TABLE["examples"], _TABLE["help"]
TRAIN_TYPES = {name: TrainType(*row) for name, row in _TABLE["train_types"].items()}
STRATEGIES = {name: Strategy(**row) for name, row in _TABLE["strategies"].items()}
OPTIMIZERS = {name: Optimizer(**row) for name, row in _TABLE["optimizers"].items()}
PRECISIONS: dict[str, str] = _TABLE["precisions"]
IN_8_BIT = ("fp8", "int8")  # neither worse than seeds differ: recipes/measured.md
MATMULS = ("bf16", "fp16", *IN_8_BIT, "auto")
TRACKERS = tuple(_TABLE["trackers"])
OBJECTIVES = {name: Objective(**row) for name, row in _TABLE["objectives"].items()}
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
HQQ_BITS, GROUP_SIZES, HQQ_AXES = (2, 3, 4, 8), (32, 64, 128), (0, 1)
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")
TRAINED = ("assistant", "completion", "last", "all")
ON_OFF, AUTO_OFF = ("auto", "on", "off"), ("auto", "off")
HOME_PATHS = ("output_dir", "quant_cache", "token_cache", "template", "eval_split")
REFERENCES, HALF = ("auto", "pass", "cached"), "from 0 to below 0.5"
TEXT, COUNT, EVERY, PORT = "printable text", "-1 or >= 1", "epoch or >= 1", "from 0 to 65535"
JSON, LAYERS, VISIT = "a JSON object", "layers as in 0,8-15", "auto or >= 1"
PERIOD, WARMUP = "a number of steps, or minutes as in 30m", "a number of steps, or from 0.0 to 1.0"
OFFLOADS = ("auto", "fsdp", "stream", "file")
DISK, INPUTS_HELP = "disk", "layer inputs on the host, or in a file in output_dir"
FEWEST_ROWS, MOST_HELD_OUT = 100, 100  # of `eval_split` auto


def hqq_name(bits: int, group_size: int, axis: int) -> str:
    """Return the name of an HQQ format: "hqq4", "hqq3_g128", "hqq4_a0"."""
    return f"hqq{bits}" + f"_g{group_size}" * (group_size != 64) + "_a0" * (not axis)


HQQ_FORMATS = {hqq_name(*row): row for row in itertools.product(HQQ_BITS, GROUP_SIZES, HQQ_AXES)}


def _alias(option: str = "", values: Any = (), form: str = "{}", **rest: Any) -> Alias:
    def write(text: str) -> str:
        words: dict[str, str] = dict(values)
        return words.get(text, words.get(cli.plain(text).lower(), form.format(text)))

    return Alias(option, write, **rest)


_NAMES = read_table(__file__, "names.toml")
_UNKNOWN: dict[str, Any] = {"reason": "no such option", "is_refused": True}
# Names that are no options (any more): read from command lines, recipes and records of old runs.
ALIASES = {name: _alias(option) for name, option in _NAMES["same"].items()}
ALIASES |= {name: _alias(*row) for name, row in _NAMES["values"].items()}
ALIASES |= {name: _alias(reason=reason) for name, reason in _NAMES["idle"].items()}
ALIASES |= {name: _alias(**_UNKNOWN, remedy=text) for name, text in _NAMES["refused"].items()}
ALIASES |= {name: _alias(**row) for name, row in _NAMES["former"].items()}
ANSWER_NAMES = {name: _alias(option) for name, option in _NAMES["answer"].items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run, which fine-tunes a language model on 4-bit weights sharded over GPUs.

    --option true and a bare --option are the same; --recipe reads options from a TOML or YAML file,
    and the command line overrides it; --print_config shows what comes of both. Names of other
    trainers (per_device_train_batch_size, max_seq_length, load_in_4bit ...) mean what they mean
    there: --help all has them.

    Raises:
        UserError: a value of the wrong type or out of range, or options that exclude each other.
    """

    model_name: str = flag("meta-llama/Llama-2-7b-hf", "model", "directory or hub name", rule=TEXT)
    revision: str | None = flag(None, "model", "of the hub; as NAME@REVISION", rule=TEXT)
    train_type: str = flag("qlora", "model", "frozen base and adapter", TRAIN_TYPES)
    precision: str = flag("bf16", "model", "dtype of matmuls; adapters are fp32", PRECISIONS)
    quant_type: str = flag("nf4", "model", "bitsandbytes format", ("nf4", "fp4", "int8"))
    double_quant: bool = flag(True, "model", "quantize the block scales too (bitsandbytes)")
    n_bits: int = flag(4, "model", "bits of an HQQ weight", HQQ_BITS)
    group_size: int = flag(64, "model", "HQQ weights that share a scale", GROUP_SIZES)
    hqq_axis: int = flag(1, "model", "1: groups lie in a row; 0: across rows", HQQ_AXES)
    quant_cache: str = flag("auto", "model", "cache of 4-bit weights: auto, off or DIR", rule=TEXT)
    verify_base: str = flag("auto", "model", "full: hash all bytes of the model", ("auto", "full"))
    weights: str = flag("load", "model", "random: take only the model's shape", ("load", "random"))
    attn: str = flag("auto", "model", "attention kernel", ATTENTIONS)
    matmul: str = flag("bf16", "model", "frozen matmuls of a 4-bit base", MATMULS)
    liger: str = flag("auto", "model", "Liger kernels, when installed", AUTO_OFF)

    lora_rank: int = flag(16, "adapter", "rank r of the LoRA matrices", rule=">= 1")
    lora_alpha: int | float = flag(32, "adapter", "scale is alpha / r", rule="> 0")
    lora_dropout: float = flag(0.0, "adapter", "on the adapter's input", rule="from 0 to below 1")
    lora_target_modules: str = flag("all", "adapter", "all, a,comma,list or pattern", rule=TEXT)
    lora_exclude_modules: str | None = flag(None, "adapter", "list or pattern", rule=TEXT)
    layers_to_transform: str | None = flag(None, "adapter", "layers with adapters", rule=LAYERS)
    rank_pattern: str | None = flag(None, "adapter", "pattern of linears -> rank", rule=JSON)
    alpha_pattern: str | None = flag(None, "adapter", "pattern of linears -> alpha", rule=JSON)
    expert_lora_rank: bool | int = flag(False, "adapter", HELP["experts"], rule=">= 0")
    expert_names: str = flag("fused", "adapter", "each: also files per expert", ("fused", "each"))
    init_adapter: str | None = flag(None, "adapter", "PEFT adapter to go on from", rule=TEXT)
    use_rslora: bool = flag(False, "adapter", "scale is alpha / sqrt(r)")
    loraplus_ratio: float = flag(1.0, "adapter", "lr of the B matrices / lr (LoRA+)", rule="> 0")
    modules_to_save: str | None = flag(None, "adapter", "trained in full: embed_tokens,lm_head")

    dataset: str = flag("alpaca_sample", "data", HELP["dataset"], rule=TEXT)
    dataset_samples: int = flag(512, "data", "rows of dummy, *_sample and orca_math", rule=">= 1")
    train_split: str | None = flag(None, "data", "split to train on, or share of the rows (0.8)")
    eval_split: str | None = flag("auto", "data", HELP["held_out"], rule=TEXT)
    template: str | None = flag(None, "data", "row format, x.jinja, or text with {columns}")
    train_on: str = flag("assistant", "data", "trained: answers, the last one, all", TRAINED)
    system_prompt: str | None = flag(None, "data", "before every conversation or prompt")
    chat_template_kwargs: str | None = flag(None, "data", "for the template", rule=JSON)
    allow_dropped_text: bool = flag(False, "data", "train what the chat template leaves of a row")
    packing: str = flag("auto", "data", "on: fill context_length with several rows", ON_OFF)
    context_length: int = flag(512, "data", "longest row in tokens", rule=">= 2")
    token_cache: str = flag("auto", "data", "cache of tokens: auto, off or DIR", rule=TEXT)
    eval_every: str | None = flag(None, "data", "steps between losses, or epoch", rule=EVERY)
    sample_prompt: str | None = flag(None, "data", "prompt answered before and after training")
    sample_prompts: str = flag("auto", "data", "FILE of more; off; auto: held-out rows", rule=TEXT)
    sample_tokens: int = flag(48, "data", "longest such answer in tokens", rule=">= 1")

    objective: str = flag("sft", "training", "what is learned from a row", OBJECTIVES)
    beta: float = flag(0.1, "training", "of a preference objective", rule="> 0")
    simpo_gamma: float = flag(0.5, "training", "margin of SimPO's rewards", rule=">= 0")
    cpo_alpha: float | None = flag(None, "training", "weight of the NLL [1; simpo: 0]", rule=">= 0")
    sft_weight: float = flag(0.0, "training", "weight of the chosen answers' NLL", rule=">= 0")
    label_smoothing: float = flag(0.0, "training", "robust: share of wrong pairs", rule=HALF)
    reference: str = flag("auto", "training", "each step, or once: cached", REFERENCES)
    batch_size: int = flag(1, "training", "rows per rank and micro-batch", rule=">= 1")
    gradient_accumulation_steps: int = flag(1, "training", "micro-batches per step", rule=">= 1")
    num_epochs: int | float = flag(1, "training", "passes over the data", rule="> 0")
    max_steps: int = flag(-1, "training", "optimizer steps in total; -1: by epochs", rule=COUNT)
    lr: float | None = flag(None, "training", HELP["lr"], rule="> 0")
    lr_scheduler: str = flag("linear", "training", "learning rate over time", SCHEDULERS)
    warmup_steps: int | float = flag(0.05, "training", "steps, or share, to warm up", rule=WARMUP)
    optimizer: str = flag("adamw", "training", "optimizer of what is trained", OPTIMIZERS)
    wd: float = flag(0.01, "training", "weight decay", rule=">= 0")
    apply_gradient_clipping: bool = flag(True, "training", "clip the global gradient norm")
    grad_norm: float = flag(1.0, "training", "largest norm when clipping", rule="> 0")
    max_skipped_steps: int = flag(3, "training", "most non-finite steps in a row", rule=">= 1")
    seed: int = flag(42, "training", "data order, adapters, dropout", rule="from 0 to 2**32 - 1")
    deterministic: bool = flag(False, "training", "equal bits from run to run, on GPUs too")

    world_size: int = flag(-1, "memory", "ranks; -1: one per GPU", rule=COUNT)
    sharding_strategy: str = flag("full_shard", "memory", "ZeRO-3, ZeRO-2 or DDP", STRATEGIES)
    no_sync: bool = flag(False, "memory", "reduce gradients once a step")
    accumulate_by_layer: str = flag("auto", "memory", "micro-batches a visit of layers", rule=VISIT)
    context_parallel: int = flag(1, "memory", "ranks that share the tokens of a row", (1, 2, 4))
    use_cpu_offload: bool = flag(True, "memory", "keep the frozen base on the host")
    offload_impl: str = flag("auto", "memory", "how it is copied; file: from disk", OFFLOADS)
    resident_layers: int = flag(0, "memory", "layers kept whole on each GPU", rule=">= 0")
    use_gradient_checkpointing: bool = flag(True, "memory", "recompute layers in backward")
    reentrant_checkpointing: bool = flag(False, "memory", "by torch's older implementation")
    selective_layers: int = flag(0, "memory", "layers that keep some activations", rule=">= 0")
    uncheckpointed_layers: int = flag(0, "memory", "layers that keep all", rule=">= 0")
    cuda_graphs: str = flag("auto", "memory", "CUDA graphs for small batches", AUTO_OFF)
    use_activation_cpu_offload: bool | str = flag(False, "memory", INPUTS_HELP, (False, True, DISK))
    fit: str = flag("auto", "memory", "the plan chooses what you leave open", AUTO_OFF)
    plan: str = flag("check", "memory", "ignore: run what should not fit", ("check", "ignore"))
    dry_run: str = flag("auto", "memory", "longest rows once; auto: on GPUs", ON_OFF)
    gpu_budget_gib: float | None = flag(None, "memory", "limit per GPU in GiB", rule="> 0")
    host_budget_gib: float | None = flag(None, "memory", "limit of all ranks in GiB", rule="> 0")
    master_port: int | None = flag(None, "memory", "0: a free one", rule=PORT)

    output_dir: str | None = flag(None, "output", "[output/MODEL-TYPE-TIME]", rule=TEXT)
    overwrite: bool = flag(False, "output", "write into a directory that holds a run")
    save_model: bool = flag(True, "output", "save the adapter at the end")
    push_to_hub: str | None = flag(None, "output", "OWNER/NAME to upload the adapter to", rule=TEXT)
    log_to: str = flag("tqdm", "output", f"tqdm, stdout, and {', '.join(TRACKERS)}", rule=TEXT)
    watch: bool = flag(False, "output", "show the run live at 127.0.0.1; prints the address")
    project_name: str = flag("fsdp_qlora", "output", "project of the tracker", rule=TEXT)
    tracker_args: str | None = flag(None, "output", "for them: name=N,group=G,entity=E", rule=TEXT)
    profile: bool | int = flag(False, "output", "trace 3 steps; N: warm up N before", rule=">= 0")
    profile_memory: bool = flag(False, "output", "write torch's memory snapshot of a GPU")

    save_every: str = flag("30m", "saving", "steps, or minutes; 0: none", rule=PERIOD)
    keep_checkpoints: int = flag(2, "saving", "last ones kept, and the best", rule=">= 1")
    resume: str | None = flag(None, "saving", "DIR of a run; bare: --output_dir", rule=TEXT)
    allow_data_change: bool = flag(False, "saving", "resume with other rows, seed or batch")
    max_restarts: int = flag(0, "saving", "restarts after a crash or a hang", rule=">= 0")
    hang_timeout: float | None = flag(None, "saving", "s without progress; 0: never", rule=">= 0")

    def __post_init__(self) -> None:
        """Check every value, and the values together."""
        rows = [(name, getattr(self, name), row) for name, row in cli.options(TrainConfig).items()]
        found = [cli.find_fault(value, row, f"{name} = {value!r}") for name, value, row in rows]
        refuse([fault for fault in found if fault is not None] or find_conflicts(self))
        if self.sharding_strategy == "ddp" and self.offload_impl not in ("stream", "file"):
            object.__setattr__(self, "use_cpu_offload", False)
        if self.revision is not None:  # from here on one name tells both
            name = self.model_name.partition("@")[0]
            object.__setattr__(self, "model_name", f"{name}@{self.revision}")
            object.__setattr__(self, "revision", None)

    @property
    def format_name(self) -> str:
        """Name of the format the frozen linears are stored in, such as "nf4_dq"."""
        base = TRAIN_TYPES[self.train_type].base
        bnb = self.quant_type + ("_dq" if self.double_quant and self.quant_type != "int8" else "")
        hqq = hqq_name(self.n_bits, self.group_size, self.hqq_axis)
        return {"bnb": bnb, "hqq": hqq, "none": "bf16"}[base]

    @property
    def compute_dtype(self) -> str:
        """Torch name of the dtype of matmuls and activations."""
        return PRECISIONS[self.precision]

    @property
    def master_dtype(self) -> str:
        """Torch name of the dtype of adapters and optimizer states."""
        return "bfloat16" if self.precision == "bf16_pure" else "float32"

    @property
    def base_lr(self) -> float:
        """Learning rate before the schedule; planning.run.make has chosen one for LoRA."""
        return 1e-5 if self.lr is None else self.lr

    def num_held_out(self, num_rows: int) -> int:
        """How many of the rows are held out, where `eval_split` is a number or auto; else 0.

        Args:
            num_rows: of the data.
        """
        if self.eval_split == "auto" and self.train_split is None and self.dataset != "dummy":
            return min(num_rows // 20, MOST_HELD_OUT) if num_rows >= FEWEST_ROWS else 0
        return int(self.eval_split) if self.eval_split and self.eval_split.isdecimal() else 0

    @property
    def num_answers(self) -> int:
        """Answers of a row of preferences: 2 or 1; 0 where rows are learned as they are."""
        return OBJECTIVES[self.objective].num_answers

    @property
    def has_cached_reference(self) -> bool:
        """Whether log-probabilities by the reference are computed once, before the first step."""
        is_cached = self.reference == "cached"
        is_cached |= self.reference == "auto" and not self.trains_new_adapters
        return is_cached and OBJECTIVES[self.objective].has_reference

    @property
    def trains_new_adapters(self) -> bool:
        """Whether the model without its adapters is the model before the first step."""
        has_adapters = TRAIN_TYPES[self.train_type].adapter in ("lora", "dora")
        return has_adapters and not self.modules_to_save and self.init_adapter is None

    @property
    def passes(self) -> int:
        """How often rows pass a layer in a forward pass: twice with a reference."""
        return 1 + (OBJECTIVES[self.objective].has_reference and not self.has_cached_reference)

    @property
    def nll_weight(self) -> float:
        """Weight of the mean cross entropy of chosen answers in a preference objective."""
        own = {"orpo": 1.0, "cpo": 1.0, "simpo": 0.0}.get(self.objective, self.sft_weight)
        return own if self.cpo_alpha is None else self.cpo_alpha

    @property
    def log_targets(self) -> tuple[str, ...]:
        """What `log_to` names: tqdm, stdout, and rows of TRACKERS."""
        return tuple(dict.fromkeys(name.strip() for name in self.log_to.split(",")))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The experiment trackers among them."""
        return tuple(name for name in self.log_targets if name in TRACKERS)

    @property
    def tracker_options(self) -> dict[str, Any]:
        """Name -> value of what `tracker_args` has for the trackers."""
        pairs = re.split(r",(?=\w+=)", self.tracker_args or "")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    @property
    def per_visit(self) -> int:
        """Micro-batches that pass each layer together."""
        asked = 1 if self.accumulate_by_layer == "auto" else int(self.accumulate_by_layer)
        return min(asked, self.gradient_accumulation_steps)

    def levels(self, num_layers: int) -> tuple[str, ...]:
        """What of each decoder layer is recomputed in the backward pass: full, selective, none.

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


def parse(
    argv: Sequence[str], say: Callable[[str], Any] = str, near: Collection[str] = ()
) -> TrainConfig:
    """Return the resolved configuration of a command line.

    Args:
        argv: arguments without the program's name.
        say: is told, in a line each, of names that have no effect.
        near: options of the command whose flags these are, for hints.

    Returns:
        A configuration that obeys all rules, with its output directory filled in.

    Raises:
        UserError: every fault of names, types, choices, ranges and combinations, at once.
        SystemExit: code 0 after printing the help.
    """
    _answer(argv)
    reader = _Reader(TrainConfig, ALIASES, RECIPES_DIR, near=near)
    values, faults = reader.read(argv)
    try:
        faults += _written(cfg := TrainConfig(**values), values)
    except UserError as fault:
        faults.append(fault)
    refuse(faults)
    for note in reader.notes:
        say(f"note      {note}")
    return dataclasses.replace(cfg, output_dir=str(cfg.resolved_output_dir))


def place(argv: Sequence[str]) -> TrainConfig:
    """Return where a command line lets a run be; all else, which --resume may change, is left out.

    Args:
        argv: arguments without the program's name, see `parse`.

    Raises:
        UserError, SystemExit: see `parse`.
    """
    _answer(argv)
    values, faults = _Reader(TrainConfig, ALIASES, RECIPES_DIR).read(argv)
    try:
        refuse(faults)
        return TrainConfig(**{name: values[name] for name in _TABLE["place"] if name in values})
    except UserError:
        parse(argv)  # tells all faults at once
        raise


def _answer(argv: Sequence[str]) -> None:
    """Show the help, the version or the configuration, where they are asked for, and end."""
    cli.show_help_if_asked(argv, TrainConfig, USAGE, MAIN, EXAMPLES, ALIASES)
    words = [word for word in argv if not re.fullmatch("--print[-_]config(=true)?", word)]
    if len(words) == len(argv):
        return
    named = given(words)
    for name, value in to_dict(parse(words, lambda note: print(f"# {note}"))).items():
        text = "" if value is None else json.dumps(value, ensure_ascii=False)
        print(f"{'' if name in named else '# '}{name} = {text}".rstrip())
    raise SystemExit(0)


def given(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options that a command line, or the recipe it names, sets.

    Args:
        argv: arguments without the program's name, see `parse`.
    """
    return frozenset(_Reader(TrainConfig, ALIASES, RECIPES_DIR).read(argv)[0])


class _Reader(cli.Reader):
    """Reads --warmup_steps N beside --profile as the profiler's, and --load_in_8bit as HF does."""

    def rename(self, given: Mapping[str, Given]) -> dict[str, Given]:
        """As cli.Reader; all that is in `given` stands on one command line, or in one recipe."""
        steps, profile = given.get("warmup_steps"), given.get("profile")
        is_on = profile is not None and cli.plain(profile.text) == "true"
        if steps and is_on and steps.text.isdecimal() and steps.text.strip("0"):
            why = "is the profiler's, as --profile is on; --lr_warmup_steps is the scheduler's"
            self.notes.append(f"--warmup_steps {steps.text} {why}")
            others = {name: given[name] for name in given if name != "warmup_steps"}
            given = others | {"profile": steps}
        eight = given.get("load_in_8bit")
        if eight is not None and cli.plain(eight.text) == "true":  # it means a quantized base, too
            given = {name: given[name] for name in given if name != "load_in_4bit"}
        return super().rename(given)


def from_record(record: Mapping[str, Any]) -> tuple[TrainConfig, tuple[str, ...]]:
    """Return the configuration that a run has stored, whatever version of the trainer wrote it.

    Args:
        record: option -> value as `to_dict` or `save` wrote it.

    Returns:
        The configuration; and the names of options that do not exist any more and were set to
        something other than their default, to be reported.

    Raises:
        UserError: a value that its option cannot have (code 5).
    """
    values, removed = renamed(record)
    try:  # runs that had no other choice accumulated micro-batch by micro-batch
        return TrainConfig(**{"accumulate_by_layer": "1"} | values), removed
    except UserError as fault:
        raise join([fault], INTEGRITY) from None


def renamed(record: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Put the options of today in the place of those of an older version; see `from_record`.

    Args:
        record: option -> value; any part of a configuration.

    Returns:
        The same by options of today; and the names of options that are no more and were set.

    Raises:
        UserError: a value that its option cannot have (code 5).
    """
    reader, options, held = cli.Reader(TrainConfig, ALIASES), cli.options(TrainConfig), dict(record)
    if "warmup_ratio" in held:  # written when warmup_steps was the profiler's
        held.pop("warmup_steps", None)
    if "llama_pro" not in str(held.get("train_type")):
        held.pop("llama_pro_path", None)  # it had no effect
    if held.get("matmul") == "auto":
        held["matmul"] = "bf16"  # which it was then; today the record has what was chosen
    texts, removed = {}, []
    for name, value in held.items():
        text = cli.to_text(value)
        is_option = name in options or bool(name in ALIASES and ALIASES[name].option)
        if is_option and value is not None:
            texts[name] = Given(text, f"{name} = {text} of the stored run")
        elif not is_option and name not in ("versions", "recipe"):
            removed += [name] * (name not in ALIASES or ALIASES[name].changes(text))
    values = {name: None for name in held if name in options and held[name] is None}
    values |= reader.convert(reader.rename(texts))
    refuse(reader.faults, INTEGRITY)
    return {name: values[name] for name in options if name in values}, tuple(removed)


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """Return every option by name, in the order of the help."""
    return dataclasses.asdict(cfg)


def save(cfg: TrainConfig, path: str | os.PathLike[str], versions: Mapping[str, str]) -> None:
    """Write every option, and under "versions" what the run runs on, as JSON, whole or not at all.

    Args:
        cfg: the configuration.
        path: file to write; its directory exists.
        versions: name -> version.
    """
    atomic.write_json(Path(path), to_dict(cfg) | {"versions": dict(versions)})


def own_project() -> dict[str, Any]:
    """Return [project] of this program's own pyproject.toml; empty for a package without it.

    What lies around an installed or copied package is another project's.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        table = tomllib.loads((PROJECT_DIR / "pyproject.toml").read_text(encoding="utf-8"))
        project: dict[str, Any] = table.get("project", {})
        return project if project.get("name") == PACKAGE else {}
    return {}


def check_own_code(stored: Mapping[str, Any], given: Collection[str], place: Path | str) -> None:
    """Refuse Python that only a directory names: it runs when the command line names it, too.

    Args:
        stored: options as an adapter or a checkpoint keeps them, by name.
        given: names of the options that the user's own command line sets.
        place: the directory, for the error.

    Raises:
        UserError: `dataset` or `eval_split` is `file.py[:function]` and was not given (code 2).
    """
    code = {}
    for key in ("dataset", "eval_split"):
        value = str(stored.get(key) or "")
        names = map(str.strip, (value, *value.split(",")))
        if key not in given and any(map(OWN_CODE.fullmatch, names)):
            code[key] = value
    if code:
        got = ", ".join(f"{key} {value}" for key, value in code.items())
        flags = " ".join(f"--{key} {shlex.quote(value)}" for key, value in code.items())
        rule = f"is Python that only {place} names, which never runs"
        raise UserError(got, rule, f"if you trust it, add {flags}")


def split_name(model_name: str) -> tuple[str, str]:
    """Split NAME@REVISION of the hub; of a directory the name is whole.

    Args:
        model_name: of a model.

    Returns:
        Name and revision, or "".
    """
    name, _, revision = model_name.partition("@")
    is_local = os.path.exists(os.path.expanduser(model_name)) or not _HUB_NAME.fullmatch(name)
    return (model_name, "") if is_local else (name, revision)


def find_conflicts(cfg: TrainConfig) -> list[UserError]:
    """Return the combinations of options that cannot work.

    Args:
        cfg: options, each valid by itself.

    Returns:
        One error per conflict, with the remedy.
    """
    faults = [UserError(**row) for row in _due(cfg, _TABLE["conflicts"])]
    for name, objectives in _TABLE["of_objectives"].items():
        value = getattr(cfg, name)
        if cfg.objective not in objectives and value != getattr(TrainConfig, name):
            got = f"--{name} {cli.to_text(value)} with --objective {cfg.objective}"
            rule = f"belongs to --objective {' '.join(objectives)}"
            faults.append(UserError(got, rule, "leave one of them out"))
    name, named = split_name(cfg.model_name)
    is_local = os.path.exists(os.path.expanduser(name)) or not _HUB_NAME.fullmatch(name)
    if cfg.revision is not None and (is_local or named not in ("", cfg.revision)):
        got = f"--revision {cfg.revision} with --model_name {cfg.model_name}"
        rule = "which is no name on the hub" if is_local else "which names another one"
        faults.append(UserError(got, rule, "leave one of them out"))
    return faults


def _due(cfg: TrainConfig, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The texts of the rows of config.toml that say something of a run."""
    values = vars(cfg) | TRAIN_TYPES[cfg.train_type]._asdict()
    values["has_answers"] = bool(cfg.num_answers)
    for name in ("trains_new_adapters", "has_cached_reference"):
        values[name] = getattr(cfg, name)
    values["num_rows"] = num_rows = cfg.batch_size * cfg.gradient_accumulation_steps
    values |= {"is_large": num_rows >= cli.TOO_LARGE, "every_tracker": ", ".join(TRACKERS)}
    values["is_known_log"] = {*cfg.log_targets} <= {"tqdm", "stdout", *TRACKERS}
    values["is_local"] = cfg.trackers in ((), ("tensorboard",))
    is_code = cfg.format_name.startswith(("nf4", "fp4", "hqq"))
    values["has_codes"] = is_code and cfg.compute_dtype == "bfloat16"
    shown = {name: cli.to_text(value) for name, value in values.items()}
    for row in rows:
        given, when = row.get("given", ()), row.get("when", {}).items()
        is_given = all(values[name] != getattr(TrainConfig, name) for name in given)
        if is_given and all(values[name] in wanted for name, wanted in when):
            texts = {key: text for key, text in row.items() if isinstance(text, str)}
            yield {key: text.format_map(shown) for key, text in texts.items()}


def _written(cfg: TrainConfig, values: Mapping[str, Any]) -> list[UserError]:
    """Faults of what the user wrote: what this run overrides, a home of nobody, a secret."""
    rows = [_TABLE["written"][name] for name in _TABLE["written"] if values.get(name)]
    faults = [UserError(**row) for row in _due(cfg, rows)]
    for name, text in values.items():
        if not isinstance(text, str):
            continue
        if text.startswith("~") and os.path.expanduser(text) == text:
            fault = UserError(f"--{name} {text}", "no such home directory", "give another path")
            faults += [fault] * (name in (*HOME_PATHS, "sample_prompts"))
        if redact(text) != text:  # every option stands in the record of the run
            rule = "looks like a secret, and would be stored in the record of the run"
            faults.append(UserError(f"--{name} {text}", rule, "set HF_TOKEN, or run hf auth login"))
    return faults


def check_optimizer(name: str, has_gpus: bool) -> None:
    """Refuse an optimizer that the ranks cannot run.

    Args:
        name: row of OPTIMIZERS.
        has_gpus: they compute on CUDA GPUs.

    Raises:
        UserError: it needs a GPU (code 3).
    """
    if not (has_gpus or OPTIMIZERS[name].on_cpu):
        rule = "is a kernel of bitsandbytes for CUDA GPUs, and the ranks compute on the CPU"
        raise UserError(f"--optimizer {name}", rule, "use adamw", ENVIRONMENT)


def cfg_notes(cfg: TrainConfig) -> list[str]:
    """Return one line for every option that is set but has no effect in this run.

    Args:
        cfg: a configuration.

    Returns:
        Lines to print once, on one rank.
    """
    return [row["text"] for row in _due(cfg, _TABLE["notes"])]
