"""What the options of a run may be: the tables of train types, precisions, strategies and more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.cli import any_of


@dataclass(frozen=True)
class TrainType:
    """A train_type: how the base is stored and what is trained on top.

    Args:
        base: store of the frozen weights.
        adapter: what is trained.
        built: False for a known name that is refused today.
    """

    base: Literal["bnb", "hqq", "none"]
    adapter: Literal["lora", "dora", "llama_pro", "full"]
    built: bool


@dataclass(frozen=True)
class Precision:
    """A precision: torch names of the dtype of products and of the trained weights.

    Args:
        compute: dtype of activations and unpacked weights.
        master: dtype of adapters and optimizer states.
        built: False for a known name that is refused today.
    """

    compute: str
    master: str
    built: bool


@dataclass(frozen=True)
class Strategy:
    """A sharding_strategy: who shares what is sharded, and when what was gathered is freed.

    Args:
        replicates: every rank keeps everything; only gradients are exchanged.
        is_hybrid: sharded over the ranks of a machine, replicated over machines.
        reshards: gathered layers are freed between forward and backward.
    """

    replicates: bool = False
    is_hybrid: bool = False
    reshards: bool = True


@dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Args:
        decays: weight decay is part of its method.
        state_bytes: of a trained parameter on the card; paged state can leave it.
        on_cpu: it runs on CPU ranks too.
    """

    decays: bool
    state_bytes: int
    on_cpu: bool = True


TRAIN_TYPES = {
    "qlora": TrainType("bnb", "lora", True),
    "custom_qlora": TrainType("bnb", "lora", True),
    "hqq_lora": TrainType("hqq", "lora", True),
    "lora": TrainType("none", "lora", True),
    "custom_lora": TrainType("none", "lora", True),
    "full": TrainType("none", "full", True),
    "dora": TrainType("none", "dora", True),
    "bnb_dora": TrainType("bnb", "dora", True),
    "hqq_dora": TrainType("hqq", "dora", True),
    "bnb_llama_pro": TrainType("bnb", "llama_pro", True),
    "hqq_llama_pro": TrainType("hqq", "llama_pro", True),
}
PRECISIONS = {
    "bf16": Precision("bfloat16", "float32", True),
    "bf16_autocast": Precision("bfloat16", "float32", True),
    "bf16_buffers_autocast": Precision("bfloat16", "float32", True),
    "bf16_pure": Precision("bfloat16", "bfloat16", True),
    "fp32": Precision("float32", "float32", True),
    "fp16_autocast": Precision("float16", "float32", True),
}
STRATEGIES = {
    "full_shard": Strategy(),
    "shard_grad_op": Strategy(reshards=False),
    "ddp": Strategy(replicates=True, reshards=False),
    "hybrid_full_shard": Strategy(is_hybrid=True),
    "hybrid_shard_grad_op": Strategy(is_hybrid=True, reshards=False),
}
OPTIMIZERS = {
    "adamw": Optimizer(True, 8),
    "adam": Optimizer(False, 8),
    "sgd": Optimizer(False, 0),
    "adadelta": Optimizer(False, 8),
    "adamw_8bit": Optimizer(True, 2, on_cpu=False),
    "paged_adamw": Optimizer(True, 8, on_cpu=False),
    "paged_adamw_8bit": Optimizer(True, 2, on_cpu=False),
}
SCHEDULERS = any_of("constant", "constant_with_warmup", "linear", "cosine")
INITS = any_of("default", "pissa", "loftq")
PACKINGS = any_of("auto", "on", "off")
OFFLOADS = any_of("auto", "fsdp", "stream")
ATTENTIONS = any_of("auto", "sdpa", "flash_attention_2", "eager")
TRACKERS = ("wandb", "tensorboard")  # packages of the same names
LOGS = any_of("tqdm", "stdout", *TRACKERS)
QUANT_TYPES = any_of("nf4", "fp4", "int8")
HQQ_BITS = dict.fromkeys((2, 3, 4, 8), True)
GROUP_SIZES = dict.fromkeys((32, 64, 128), True)
HQQ_AXES = dict.fromkeys((0, 1), True)
ALIASES = {
    "model_name_or_path": "model_name",
    "learning_rate": "lr",
    "weight_decay": "wd",
    "max_grad_norm": "grad_norm",
    "num_train_epochs": "num_epochs",
    "lora_r": "lora_rank",
    "max_seq_length": "context_length",
    "per_device_train_batch_size": "batch_size",
    "report_to": "log_to",
}
FITS = any_of("auto", "off")
PLANS = any_of("check", "ignore")
RUNS = any_of("auto", "on", "off")
PROFILER = (
    *("profiling_output", "profiling_frequency", "wait_steps", "warmup_steps", "active_steps"),
    *("repeat", "export_trace", "export_memory_timeline", "with_stack", "with_shapes"),
)
WANDB = ("project_name", "name", "group", "entity")
TEXT = "printable text"
PERIOD = "a number of steps, or minutes as in 30m"
RESUME_HELP = "go on: DIR of a run or checkpoint; bare: the latest of --output_dir"
COUNT = "-1 or >= 1"
EVERY = "epoch or >= 1"
PROMPTS_HELP = "more of them: a FILE, off, or auto: three held-out ones, if none is named"
TRAINED = any_of("assistant", "completion", "last", "all")
DATASET_HELP = "files or directory, ORG/NAME[:CONFIG[:SPLIT]] of the hub, x.py:FUNCTION, or one of "
DATASET_HELP += "alpaca alpaca_sample dummy guanaco sql orca_math"


def hqq_name(bits: int, group_size: int, axis: int) -> str:
    """Return the name of an HQQ format: "hqq4", "hqq3_g128", "hqq4_a0"."""
    group = "" if group_size == 64 else f"_g{group_size}"
    return f"hqq{bits}{group}" + ("" if axis else "_a0")


def built(table: Mapping[str, TrainType] | Mapping[str, Precision]) -> dict[str, bool]:
    """Return the choices of a table: its names, and whether each is built."""
    return {name: row.built for name, row in table.items()}
