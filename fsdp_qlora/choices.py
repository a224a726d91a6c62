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


TRAIN_TYPES = {
    "qlora": TrainType("bnb", "lora", True),
    "custom_qlora": TrainType("bnb", "lora", True),
    "hqq_lora": TrainType("hqq", "lora", True),
    "lora": TrainType("none", "lora", True),
    "custom_lora": TrainType("none", "lora", True),
    "full": TrainType("none", "full", False),
    "bnb_dora": TrainType("bnb", "dora", False),
    "hqq_dora": TrainType("hqq", "dora", False),
    "bnb_llama_pro": TrainType("bnb", "llama_pro", False),
    "hqq_llama_pro": TrainType("hqq", "llama_pro", False),
}
PRECISIONS = {
    "bf16": Precision("bfloat16", "float32", True),
    "bf16_autocast": Precision("bfloat16", "float32", True),
    "bf16_buffers_autocast": Precision("bfloat16", "float32", True),
    "fp32": Precision("float32", "float32", True),
    "fp16_autocast": Precision("float16", "float32", False),
}
STRATEGIES = {
    "full_shard": True,
    "shard_grad_op": True,
    "ddp": True,
    "hybrid_full_shard": False,
    "hybrid_shard_grad_op": False,
}
OPTIMIZERS = {"adamw": True, "adam": False, "sgd": False, "adadelta": False}
SCHEDULERS = {"constant": True, "linear": True, "cosine": True}
PACKINGS = any_of("auto", "on", "off")
OFFLOADS = any_of("auto", "fsdp", "stream")
ATTENTIONS = any_of("auto", "sdpa", "flash_attention_2", "eager")
LOGS = {"tqdm": True, "stdout": True, "wandb": False}
BITS = {4: True, 2: False, 3: False, 8: False}
ONLY_FALSE = {False: True, True: False}
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
NO_WANDB = "wandb is not built yet"
TEXT = "printable text"
COUNT = "-1 or >= 1"
TRAINED = any_of("assistant", "completion", "last", "all")
DATASET_HELP = "files or directory, ORG/NAME[:CONFIG[:SPLIT]] of the hub, x.py:FUNCTION, or one of "
DATASET_HELP += "alpaca alpaca_sample dummy guanaco sql orca_math"


def built(table: Mapping[str, TrainType] | Mapping[str, Precision]) -> dict[str, bool]:
    """Return the choices of a table: its names, and whether each is built."""
    return {name: row.built for name, row in table.items()}
