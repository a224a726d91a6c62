"""The numbers a plan is made of: packed bytes, widths of a layer, and what a run is set to."""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora import arch
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.config import Config

GIB = 1024**3
ALIGN_BYTES = 256  # see model/layout.py
GROUP = 64  # weights that share one constant
NESTED = 256  # constants that share one constant of the second level
PLACEMENTS = ("sharded", "offloaded", "streamed", "resident")
LEVELS = ("full", "selective", "none")
IN_MEMORY = ("/dev/shm/", "/run/")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Format:
    """How a frozen weight is stored; tests compare every row with model/quantize.py.

    Args:
        weight_bits: bits of a packed weight.
        fields: constants as (bytes of one, weights that share it, their number's multiple).
        scratch_bytes: held per weight of a linear while it is unpacked.
        constant_bytes: held per group of the layer at work, once its constants are usable.
    """

    weight_bits: int
    fields: tuple[tuple[int, int, int], ...] = ()
    scratch_bytes: int = 2
    constant_bytes: int = 0


_NESTED = ((1, GROUP, NESTED), (4, GROUP * NESTED, 1), (4, GROUP * NESTED, 1))
_HQQ = ((2, GROUP, 1), (2, GROUP, 1))
FORMATS = {
    "nf4": Format(4, ((4, GROUP, 1),)),
    "nf4_dq": Format(4, _NESTED, constant_bytes=4),
    "fp4": Format(4, ((4, GROUP, 1),)),
    "fp4_dq": Format(4, _NESTED, constant_bytes=4),
    "hqq4": Format(4, _HQQ, scratch_bytes=3),
    "bf16": Format(16, scratch_bytes=0),
}


def packed_bytes(shapes: Sequence[tuple[int, int]], format_name: str) -> tuple[int, int]:
    """Count the bytes of one decoder layer's frozen linears.

    Args:
        shapes: (out features, in features) of each linear.
        format_name: row of FORMATS.

    Returns:
        (packed weights, quantisation constants), each with its padding to ALIGN_BYTES.
    """
    fmt = FORMATS[format_name]
    counts = [out_features * in_features for out_features, in_features in shapes]
    weights = sum(_up(-(-count * fmt.weight_bits // 8), ALIGN_BYTES) for count in counts)
    constants = 0
    for item_bytes, share, multiple in fmt.fields:
        items = sum(_up(-(-count // share), multiple) for count in counts)
        constants += _up(items * item_bytes, ALIGN_BYTES)
    return weights, constants


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be chosen about a run without changing what it computes.

    Args:
        num_ranks: cards, or CPU ranks, of one host.
        batch_size: rows of a micro-batch on a rank.
        accumulation: micro-batches of an optimizer step.
        placements: of the packed bytes of each decoder layer, see PLACEMENTS.
        levels: what each decoder layer keeps for its backward, see LEVELS.
        strategy: row of choices.STRATEGIES.
    """

    num_ranks: int
    batch_size: int
    accumulation: int
    placements: tuple[str, ...]
    levels: tuple[str, ...]
    strategy: str = "full_shard"

    @property
    def shares(self) -> int:
        """Ranks that share what is sharded: 1 when every rank keeps everything."""
        return 1 if self.strategy == "ddp" else self.num_ranks

    def count(self, *names: str) -> int:
        """Count the decoder layers in some placements (or on some levels)."""
        return sum(self._counts[name] for name in names)

    @functools.cached_property
    def _counts(self) -> collections.Counter[str]:
        return collections.Counter((*self.placements, *self.levels))


def place(num_layers: int, rest: str, num_resident: int) -> tuple[str, ...]:
    """Placements with some layers whole on each card, evenly spread, and the others alike.

    Args:
        num_layers: decoder layers.
        rest: placement of the layers that are not resident.
        num_resident: layers that are; what is too many is cut.

    Returns:
        One placement a layer.
    """
    num_resident = min(num_resident, num_layers)
    return tuple(
        "resident"
        if (i + 1) * num_resident // num_layers > i * num_resident // num_layers
        else rest
        for i in range(num_layers)
    )


def setting_of(cfg: Config, num_layers: int, num_ranks: int) -> Setting:
    """What a command line sets.

    Args:
        cfg: the run.
        num_layers: decoder layers of its model.
        num_ranks: cards, or CPU ranks.

    Returns:
        The setting; `--offload_impl auto` means streamed, as on one host.
    """
    hosted = "offloaded" if cfg.offload_impl == "fsdp" else "streamed"
    num_resident = num_layers if cfg.sharding_strategy == "ddp" else cfg.resident_layers
    return Setting(
        num_ranks=num_ranks,
        batch_size=cfg.batch_size,
        accumulation=cfg.gradient_accumulation_steps,
        placements=place(num_layers, hosted if cfg.use_cpu_offload else "sharded", num_resident),
        levels=cfg.levels(num_layers),
        strategy=cfg.sharding_strategy,
    )


def applied(cfg: Config, setting: Setting) -> Config:
    """The run that a setting makes of a run: `setting_of` the other way round.

    Args:
        cfg: the run as it was.
        setting: chosen for it.

    Returns:
        The run with the setting's options; what they already say stays as it is.
    """
    num_layers = len(setting.levels)
    changed: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "gradient_accumulation_steps": setting.accumulation,
        "sharding_strategy": setting.strategy,
    }
    own = setting_of(cfg, num_layers, setting.num_ranks)
    if (own.placements, own.strategy) != (setting.placements, setting.strategy):
        num_resident = setting.count("resident") if setting.strategy != "ddp" else 0
        is_fsdp = setting.count("offloaded") > 0
        is_sharded = setting.count("sharded") == num_layers
        changed["use_cpu_offload"] = not is_sharded and setting.strategy != "ddp"
        changed |= {"resident_layers": num_resident, "offload_impl": "fsdp" if is_fsdp else "auto"}
    if own.levels != setting.levels:
        changed["use_gradient_checkpointing"] = True
        changed["selective_layers"] = setting.count("selective")
        changed["uncheckpointed_layers"] = setting.count("none")
    return dataclasses.replace(cfg, **changed)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of one decoder layer and of the model, for a run's adapters and precision.

    Args:
        layers, hidden, vocab: of the model.
        heads: attention heads.
        outs: features of all products of a layer but the last (down_proj).
        attention: width of the attention's output.
        gates: features of the products that feed the activation function.
        product: width of the activation product, which the last linear reads.
        norms: norms over the hidden size in a layer.
        head_norms: features that pass through norms of the head size (Qwen 3, Gemma 3).
        weights: frozen weights of a layer's linears.
        largest: weights of its largest linear.
        last: weights of its last linear, whose product a recomputation leaves out.
        packed, constants: bytes of a layer's linears as stored.
        root, small: elements outside the layers (embedding, head), of a layer's norms and biases.
        head: elements of the output head.
        lora, lora_ranks: trained parameters of a layer, and the ranks of all its adapters.
        input_features: features that the adapted linears read and keep: each input once.
        dropped_features: the same for every adapted linear by itself.
        item: bytes of an activation.
        is_eager: attention is not fused.
        file_bytes: of the model's files, where they lie in memory.
    """

    layers: int
    hidden: int
    vocab: int
    heads: int
    outs: int
    attention: int
    gates: int
    product: int
    norms: int
    head_norms: int
    weights: int
    largest: int
    last: int
    packed: int
    constants: int
    root: int
    small: int
    head: int
    lora: int
    lora_ranks: int
    input_features: int
    dropped_features: int
    item: int
    is_eager: bool
    file_bytes: int


def sizes(info: ModelInfo, cfg: Config) -> Sizes:
    """Collect the numbers of a model and a run.

    Args:
        info: the model.
        cfg: lora_rank, lora_target_modules, format_name, compute_dtype.

    Returns:
        The numbers.

    Raises:
        UserError: an adapter's name matches no linear (code 2).
    """
    linears = info.linears
    counts = [linear.out_features * linear.in_features for linear in linears]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    packed, constants = packed_bytes(shapes, cfg.format_name)
    adapted = arch.select_linears(info, cfg.lora_target_modules)
    o_proj = next((n for n in linears if n.name.endswith("o_proj")), linears[0])
    vectors = [
        (name, shape[0]) for name, shape in info.layer_params if name.endswith("norm.weight")
    ]
    gates = [n for n in linears[:-1] if n.name.rpartition(".")[2].startswith(("gate", "up"))]
    qkv = linears[: linears.index(o_proj)]
    # Attention keeps its own output; the other inputs are norms' outputs and the last product.
    readers = {"qkv": qkv, "mlp": gates, "last": linears[-1:]}
    read = [group[0].in_features for group in readers.values() if set(group) & set(adapted)]
    has_head_norms = any(width != info.hidden_size for _, width in vectors)
    return Sizes(
        layers=info.num_layers,
        hidden=info.hidden_size,
        vocab=info.vocab_size,
        heads=info.config.get("num_attention_heads", 1),
        outs=sum(linear.out_features for linear in linears[:-1]),
        attention=o_proj.in_features,
        gates=sum(linear.out_features for linear in gates),
        product=linears[-1].in_features,
        norms=sum(width == info.hidden_size for _, width in vectors),
        head_norms=sum(n.out_features for n in qkv[:2]) if has_head_norms else 0,
        weights=sum(counts),
        largest=max(counts),
        last=counts[-1],
        packed=packed,
        constants=constants,
        root=sum(math.prod(shape) for _, shape in info.root_params),
        small=sum(math.prod(shape) for _, shape in info.layer_params),
        head=info.vocab_size * info.hidden_size,
        lora=sum(cfg.lora_rank * (n.in_features + n.out_features) for n in adapted),
        lora_ranks=cfg.lora_rank * len(adapted),
        input_features=sum(read),
        dropped_features=sum(linear.in_features for linear in adapted),
        item=DTYPE_BYTES[cfg.compute_dtype],
        is_eager=cfg.attn == "eager" or (cfg.attn == "auto" and info.softcaps_attention),
        file_bytes=_bytes_in_memory(info.path),
    )


def _bytes_in_memory(path: Path | None) -> int:
    if path is None or not str(path.resolve()).startswith(IN_MEMORY):
        return 0
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
