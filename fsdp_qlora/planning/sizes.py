"""The numbers a plan is made of: limits, bytes of the formats, widths of a layer, what a run sets.

The model keeps to the same limits and formats; model/quantize.py adds to every format how a weight
is quantized and dequantized. No torch.
"""

import collections
import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fsdp_qlora import arch
from fsdp_qlora.arch import LayerKind, ModelInfo
from fsdp_qlora.arch.files import GROUP, NESTED
from fsdp_qlora.arch.targets import expert_sides, find_targets
from fsdp_qlora.config import DISK, HQQ_FORMATS, STRATEGIES, TRAIN_TYPES, TrainConfig
from fsdp_qlora.errors import UserError
from fsdp_qlora.hardware import GIB, Machine

MIN_TOKENS_8_BIT = 1024  # of a micro-batch; with fewer, matmuls in 8 bit gain nothing
WHOLE_LAYER_BYTES = 512 * 2**20  # a layer not larger is dequantized at once, for all its matmuls
VISIT_LAYER_BYTES = 2**31  # the same, where groups of rows pass the layer together
# Tokens of a micro-batch whose layers end tile by tile, and of a tile: shorter ones gain nothing.
LONG_TOKENS, TILE_TOKENS = 16_384, 4096
JOINED_TOKENS = 4096  # of micro-batches that GPUs take as one where they pass a layer together
LOGITS_BYTES = 256 * 2**20  # of float32 logits held at once
NUM_RING_SLOTS = 4  # of layers from disk: read two ahead of those that are copied to the GPUs
STREAMED = ("streamed", DISK)  # placements of layers that are copied as they are needed
NUM_SLOTS = 2  # one at work, one being filled; one more where resident layers leave gaps to bridge
ONE_GROUP_BYTES = 384 * 2**20  # adapters not larger are gathered and reduced all at once
ALIGN_BYTES = 256  # every array starts at a multiple of this, for wide loads
# Weights of a layer times tokens of a full micro-batch, for each sustained TFLOP/s: with more work
# the GPU is busy as it is, and a graph would only hold memory (measured on an H200 beside a slow
# host: 7B at 512 tokens is bound by the host, 70B at 1024 is not).
MAX_GRAPH_WORK = 5e11 / 640
MAX_GRAPH_SHAPES = 8  # a graph keeps the memory of a layer's pass
MOST_TOUCHED_BYTES = 4 * GIB  # copies for checkpoints: more is not taken before the first of them
PAD_MULTIPLES = {"cuda": 64, "cpu": 8}  # of a batch's length: fewer shapes, blocks are found again
DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
PER_WORD = 10  # values of 3 bits in an int32
KNOWN_ROWS = {"alpaca": 51_760, "guanaco": 9_846}
MAX_COUNTED_BYTES = 100 * 2**20
IN_MEMORY = ("/dev/shm/", "/run/")
NEW_LAYERS = "block_expansion_layers"  # key of config.json, written by `expand`
REFERENCE_DIRECTORY = re.compile(r".*blk_exp-(\d+)-(\d+)")  # how the reference names its result
# The end of a layer's forward, as most have it: modules one after the other, and the residual.
_STEP = r"\s*#[^\n]*\n|\s*\n|\s*hidden_states = self\.\w+\(hidden_states\)\n"
_END = r"\s*hidden_states = residual \+ hidden_states\n+\s+return hidden_states\n"
ENDING = re.compile(rf"residual = hidden_states\n((?:{_STEP})+){_END}")
ENDS = ("embed_tokens", "lm_head")
Layers = Sequence[int]  # their numbers
GATES = ("gate", "up", "w1", "w3", "dense_h", "fc1")  # what feeds an activation function


@dataclasses.dataclass(frozen=True)
class Field:
    """One stored array of a linear.

    Attributes:
        name: of the field.
        dtype: torch name of the dtype of its elements.
        num_weights: weights that share one element; 0 = those of one row do.
        multiple: the number of elements is rounded up to a multiple of it.
    """

    name: str
    dtype: str
    num_weights: int
    multiple: int = 1

    def num_elements(self, shape: Sequence[int]) -> int:
        """Elements stored for a linear of `shape` (out features, in features)."""
        num = -(-math.prod(shape) // self.num_weights) if self.num_weights else shape[0]
        return -(-num // self.multiple) * self.multiple


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of FORMATS.

    Attributes:
        weight_bits: bits of one quantized weight.
        fields: the quantization constants stored per linear, beside its weight.
        scratch_bytes: held per weight of a linear while it is dequantized.
        constant_bytes: held per GROUP of the layer at work, once its constants are usable.
        group_size: weights that share a constant.
        axis: of HQQ: 1 groups neighbours of a row; 0 groups weights that lie a `group_size`-th of
            the matrix apart.
    """

    weight_bits: int
    fields: tuple[Field, ...] = ()
    scratch_bytes: int = 2
    constant_bytes: int = 0
    group_size: int = GROUP
    axis: int = 1

    def weight_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the quantized weight of a linear of `shape` (out features, in features)."""
        num_weights = math.prod(shape)
        if self.weight_bits != 3:
            return -(-num_weights * self.weight_bits // 8)
        # Ten rows of hqq's matrix of groups share one row of words; the last rows are padded.
        num_groups = -(-num_weights // self.group_size)
        rows, cols = (num_groups, self.group_size)[:: 1 if self.axis else -1]
        return -(-rows // PER_WORD) * cols * 4


def _hqq(bits: int, group_size: int, axis: int) -> Storage:
    # In 8 bits, constants rounded to bfloat16 would cost as much as the quantization itself.
    dtype = "float32" if bits == 8 else "bfloat16"
    fields = (Field("scale", dtype, group_size), Field("zero", dtype, group_size))
    return Storage(bits, fields, scratch_bytes=3, group_size=group_size, axis=axis)


_ABSMAX = (Field("absmax", "float32", GROUP),)
_NESTED = (Field(name, "float32", GROUP * NESTED) for name in ("nested_absmax", "offset"))
_NESTED_ABSMAX = (Field("qabsmax", "uint8", GROUP, multiple=NESTED), *_NESTED)
FORMATS: dict[str, Storage] = {
    "nf4": Storage(4, _ABSMAX),
    "nf4_dq": Storage(4, _NESTED_ABSMAX, constant_bytes=4),
    "fp4": Storage(4, _ABSMAX),
    "fp4_dq": Storage(4, _NESTED_ABSMAX, constant_bytes=4),
    "int8": Storage(8, (Field("row_absmax", "float32", 0),)),
    **{name: _hqq(*row) for name, row in HQQ_FORMATS.items()},
    "bf16": Storage(16, scratch_bytes=0),
}
# Of matrices whose bytes are kept as the files have them, whatever the format of the run.
STORAGES = FORMATS | {"mxfp4": Storage(4, (Field("exponents", "uint8", 32),), group_size=32)}


@functools.cache
def has_ending(model_type: str) -> bool:
    """Whether layers of a type end in a way that can be computed tile by tile.

    Args:
        model_type: of the config; its source is read, nothing is imported.
    """
    spec, name = importlib.util.find_spec("transformers"), model_type.removesuffix("_text")
    place = Path(spec.origin or "").parent if spec else Path()
    file = place / "models" / name / f"modeling_{name}.py"
    return file.is_file() and ENDING.search(file.read_text(encoding="utf-8")) is not None


def head_parts(num_key_heads: int) -> int:
    """Into how many parts the heads are cut in the backward of long rows' attention.

    Args:
        num_key_heads: of the layer.
    """
    return next((n for n in (4, 3, 2) if num_key_heads % n == 0), 1)


def whole_layer_bytes(per_visit: int = 1) -> int:
    """Largest dequantized layer that is held whole while it is at work.

    Args:
        per_visit: micro-batches that pass it together.
    """
    return VISIT_LAYER_BYTES if per_visit > 1 else WHOLE_LAYER_BYTES


def quantized_bytes(
    shapes: Sequence[tuple[int, int]], format_name: str, own: Sequence[str] = ()
) -> tuple[int, int]:
    """Count the bytes of one decoder layer's frozen linears.

    Args:
        shapes: (out features, in features) of each linear.
        format_name: row of FORMATS.
        own: row of STORAGES of each linear, "" for `format_name`; empty: all are in that.

    Returns:
        (quantized weights, quantization constants), each with its padding to ALIGN_BYTES.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for shape, name in zip(shapes, own or [""] * len(shapes), strict=True):
        groups.setdefault(name or format_name, []).append(shape)
    weights, constants = 0, 0
    for name, members in groups.items():
        fmt = STORAGES[name]
        weights += sum(_up(fmt.weight_bytes(shape), ALIGN_BYTES) for shape in members)
        fields = [DTYPE_BYTES[f.dtype] * sum(map(f.num_elements, members)) for f in fmt.fields]
        constants += sum(_up(nbytes, ALIGN_BYTES) for nbytes in fields)
    return weights, constants


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class TrainedWhole(NamedTuple):
    """What is trained itself, without adapters, unquantised.

    Args:
        layers: numbers of decoder layers.
        root: full names of parameters outside the layers.
    """

    layers: tuple[int, ...] = ()
    root: tuple[str, ...] = ()


class Counts(NamedTuple):
    """How many parameters a run trains.

    Args:
        adapters: of the adapters of a decoder layer, `magnitudes` included; of layers of several
            kinds their mean, as the next two.
        magnitudes: rows of a decoder layer whose length DoRA learns.
        layer: of a decoder layer, were it trained whole.
        root: outside the decoder layers.
        total: of the model.
    """

    adapters: float
    magnitudes: float
    layer: float
    root: int
    total: int


def has_adapters(cfg: TrainConfig) -> bool:
    """Whether a run trains adapters of linears."""
    return TRAIN_TYPES[cfg.train_type].adapter in ("lora", "dora")


def is_eager(cfg: TrainConfig, extra: str, kind: str) -> bool:
    """Whether attention is transformers' own, which keeps all scores.

    Args:
        cfg: attn, context_parallel, train_type, compute_dtype.
        extra: see ModelInfo.attention_extra.
        kind: where a run computes: "cuda", or "cpu" for all that has no kernel for rows.
    """
    has_kernel = extra == "sinks" and kind == "cuda" and has_adapters(cfg)
    has_kernel &= cfg.compute_dtype != "float32"
    has_kernel |= extra == "" or cfg.context_parallel > 1
    return cfg.attn == "eager" or (cfg.attn == "auto" and not has_kernel)


def trained_whole(info: ModelInfo, cfg: TrainConfig) -> TrainedWhole:
    """Find what a run trains whole.

    Args:
        info: the model.
        cfg: train_type, modules_to_save.

    Raises:
        UserError: the model has no new layers, or no such module (code 2).
    """
    kind = TRAIN_TYPES[cfg.train_type].adapter
    if info.wrapper and (kind in ("full", "llama_pro") or cfg.modules_to_save):
        rule = f"the model is the text half of a {info.wrapper}, of which adapters can be trained"
        raise UserError(f"--train_type {cfg.train_type}", rule, "use --train_type qlora or lora")
    if kind in ("full", "llama_pro") and any(linear.expert is not None for linear in info.linears):
        rule = "trains whole layers, and those with experts can have adapters only"
        raise UserError(f"--train_type {cfg.train_type}", rule, "use --train_type qlora or lora")
    if kind == "full":
        return TrainedWhole(tuple(range(info.num_layers)), tuple(dict(info.root_params)))
    layers = _new_layers(info) if kind == "llama_pro" else ()
    return TrainedWhole(layers, _saved(info, cfg.modules_to_save))


def new_layers(num_layers: int, num_new: int) -> tuple[int, ...]:
    """Numbers of the new layers in a block-expanded model.

    One stands behind each of the first `num_new` groups of num_layers // num_new old layers.

    Args:
        num_layers: of the old model.
        num_new: how many there are.

    Source: LLaMA Pro, arXiv 2401.02415, section 3.2; AnswerDotAI/fsdp_qlora, train.py.
    """
    group = num_layers // num_new
    return tuple(group + (group + 1) * number for number in range(num_new))


def count_trained(info: ModelInfo, cfg: TrainConfig) -> Counts:
    """Count the trained parameters.

    Args:
        info: the model.
        cfg: the run.

    Raises:
        UserError: see `trained_whole` and find_targets.
    """
    own, shapes = trained_whole(info, cfg), dict(info.root_params)
    targets = [*itertools.chain(*find_targets(info, cfg))] if has_adapters(cfg) else []
    is_dora = TRAIN_TYPES[cfg.train_type].adapter == "dora"
    magnitudes = sum(row.linear.out_features for row in targets) * is_dora
    adapters = sum(row.num_params for row in targets) + magnitudes
    every = sum(kind.num_params * len(kind.layers) for kind in info.kinds)
    root = sum(math.prod(shapes[name]) for name in own.root)
    whole = sum(info.by_layer[index].num_params for index in own.layers)
    means = [_mean(number, info.num_layers) for number in (adapters, magnitudes, every)]
    return Counts(means[0], means[1], means[2], root, adapters + whole + root)


def _mean(total: float, count: int) -> float:
    """A whole number where it is one."""
    return total // count if total % count == 0 else total / count


def _new_layers(info: ModelInfo) -> tuple[int, ...]:
    if NEW_LAYERS in info.config:
        return tuple(info.config[NEW_LAYERS])
    match = REFERENCE_DIRECTORY.fullmatch((info.path or Path()).name)
    numbers = tuple(map(int, match.groups())) if match else (0, 0)
    if not 0 < numbers[1] - numbers[0] <= numbers[0] or numbers[1] != info.num_layers:
        rule = "has no new blocks to train"
        remedy = "make them: python -m fsdp_qlora export expanded, then --llama_pro_path DIR"
        raise UserError(str(info.path or info.model_type), rule, remedy)
    return new_layers(numbers[0], numbers[1] - numbers[0])


def _saved(info: ModelInfo, modules: str | None) -> tuple[str, ...]:
    names = {name.strip() for name in (modules or "").split(",")} - {""}
    if unknown := sorted(names - set(ENDS)):
        remedy = f"use some of {','.join(ENDS)}"
        raise UserError(f"modules_to_save {unknown[0]!r}", "cannot be trained whole", remedy)
    if info.is_tied and names:
        names = {ENDS[0]}  # one parameter for both
    found = [name for name, _ in info.root_params if name.split(".")[-2] in names]
    assert len(found) == len(names), "embedding and head are named otherwise"
    return tuple(found)


def adopt_format(cfg: TrainConfig, stored: str | None, given: frozenset[str]) -> TrainConfig:
    """Take the format of the base from its files, where they are in 4 bit.

    Args:
        cfg: the run.
        stored: format of the files, or None.
        given: names of the options that the user wrote.

    Returns:
        The run with the format of the files.

    Raises:
        UserError: an option asks for another format (code 2).
    """
    if stored is None or cfg.format_name == stored:
        return cfg
    rule = f"the model is stored as {stored}, whose bytes are kept"
    nf4, is_double = stored.removesuffix("_dq"), stored.endswith("_dq")
    own: dict[str, Any] = {"quant_type": nf4, "double_quant": is_double}
    if TRAIN_TYPES[cfg.train_type].base != "bnb":
        own["train_type"] = {"dora": "bnb_dora"}.get(TRAIN_TYPES[cfg.train_type].adapter, "qlora")
    for name, value in own.items():
        got = getattr(cfg, name)
        if name in given and got != value:
            remedy = "leave it out, or take the 16-bit original"
            raise UserError(f"--{name} {str(got).lower()}", rule, remedy)
    return dataclasses.replace(cfg, **own)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be chosen about a run without changing what it computes.

    Args:
        num_ranks: GPUs, or CPU ranks, of all machines.
        batch_size: rows of a micro-batch on a rank.
        accumulation: micro-batches of an optimizer step.
        placements: of the quantized bytes of each decoder layer, see model/placement.
        levels: what each decoder layer recomputes for its backward: "full", "selective" or "none".
        strategy: row of choices.STRATEGIES.
        machines: with as many ranks each.
        per_visit: micro-batches that pass each layer together.
        hosts_inputs: inputs of recomputed layers wait on the host, or on "disk".
    """

    num_ranks: int
    batch_size: int
    accumulation: int
    placements: tuple[str, ...]
    levels: tuple[str, ...]
    strategy: str = "full_shard"
    machines: int = 1
    per_visit: int = 1
    hosts_inputs: bool | str = False

    @property
    def num_visits(self) -> int:
        """Passes of an optimizer step over the layers."""
        return -(-self.accumulation // self.per_visit)

    @property
    def shares(self) -> int:
        """Ranks that share what is sharded: 1 when every rank keeps everything."""
        row = STRATEGIES[self.strategy]
        return 1 if row.replicates else self.local_ranks if row.is_hybrid else self.num_ranks

    @property
    def local_ranks(self) -> int:
        """Ranks of a machine."""
        return self.num_ranks // self.machines

    @property
    def keeps_gathered(self) -> bool:
        """Whether layers that are sharded stay gathered between forward and backward."""
        row = STRATEGIES[self.strategy]
        return not (row.reshards or row.replicates)

    def count(self, *names: str) -> int:
        """Count the decoder layers in some placements (or on some levels)."""
        return sum(self._counts[name] for name in names)

    def tiered(self, num: int) -> "Setting":
        """The same with so many of the streamed layers in memory, the others on disk."""
        own = iter(place(self.count(*STREAMED), DISK, num))
        tiers = {"resident": "streamed", DISK: DISK}
        names = (tiers[next(own)] if name in STREAMED else name for name in self.placements)
        return dataclasses.replace(self, placements=tuple(names))

    @functools.cached_property
    def _counts(self) -> collections.Counter[str]:
        return collections.Counter((*self.placements, *self.levels))


def place(num_layers: int, rest: str, num_resident: int, whole: Layers = ()) -> tuple[str, ...]:
    """Placements with some layers whole on each GPU, evenly spread, and the others alike.

    Args:
        num_layers: decoder layers.
        rest: placement of the layers that are not resident.
        num_resident: layers that are; what is too many is cut.
        whole: numbers of the layers that are trained themselves.

    Returns:
        One placement a layer.
    """
    num_frozen = num_layers - len(whole)
    num_resident = min(num_resident, num_frozen)
    counts = [i * num_resident // max(num_frozen, 1) for i in range(num_frozen + 1)]
    frozen = ("resident" if low < high else rest for low, high in itertools.pairwise(counts))
    return tuple("trained" if i in whole else next(frozen) for i in range(num_layers))


def setting_of(cfg: TrainConfig, num_layers: int, num_ranks: int, whole: Layers = ()) -> Setting:
    """What a command line sets.

    Args:
        cfg: the run.
        num_layers: decoder layers of its model.
        num_ranks: GPUs, or CPU ranks.
        whole: layers that are trained themselves.

    Returns:
        The setting; `--offload_impl auto` means weight streaming, as on one host.
    """
    hosted = {"fsdp": "offloaded", "file": DISK}.get(cfg.offload_impl, "streamed")
    is_whole = cfg.sharding_strategy == "ddp" and not cfg.use_cpu_offload
    num_resident = num_layers if is_whole else cfg.resident_layers
    rest = hosted if cfg.use_cpu_offload else "sharded"
    placements = place(num_layers, rest, num_resident, whole)
    step = num_ranks, cfg.batch_size, cfg.gradient_accumulation_steps
    visit = cfg.per_visit, cfg.use_activation_cpu_offload
    return Setting(*step, placements, cfg.levels(num_layers), cfg.sharding_strategy, 1, *visit)


def setting_for(info: ModelInfo, cfg: TrainConfig, machine: Machine) -> Setting:
    """What a command line sets for a model: `setting_of`, with the layers that it trains whole."""
    setting = setting_of(cfg, info.num_layers, machine.num_ranks, trained_whole(info, cfg).layers)
    return dataclasses.replace(setting, machines=machine.num_machines)


def check_context(info: ModelInfo, cfg: TrainConfig, num_ranks: int) -> None:
    """Refuse rows that the model has no positions for, or to cut them where that is not exact.

    Args:
        info: the model.
        cfg: context_parallel, context_length.
        num_ranks: of all machines.

    Raises:
        UserError: the ranks or the model cannot do it (code 2).
    """
    num, rule, most = cfg.context_parallel, "", info.num_positions
    if most is not None and cfg.context_length > most:
        got, rule = f"--context_length {cfg.context_length}", f"knows positions of {most} tokens"
        raise UserError(got, f"a {info.model_type} model {rule}", f"use {most} or less")
    kinds = {*info.config.get("layer_types", ())} - {"full_attention", "sliding_attention"}
    if num > 1 and num_ranks % num:
        rule = f"shares each row among {num} ranks, and there are {num_ranks}"
    elif num > 1 and (extra := info.attention_extra.replace("sinks of ", "") or ", ".join(kinds)):
        rule = f"no kernel cuts the rows of a {info.model_type} model ({extra})"
    elif num > 1 and (note := info.rope_note(cfg.context_length)):
        rule = f"the ranks' rotary tables would differ: {note.split()[1]} of longer rows"
    if rule:
        remedy = "use --context_parallel 1"
        remedy += f", or --world_size {num}" * (num_ranks % num > 0)
        raise UserError(f"--context_parallel {num}", rule, remedy)


def applied(cfg: TrainConfig, setting: Setting) -> TrainConfig:
    """The run that a setting makes of a run: `setting_of` the other way round.

    Args:
        cfg: the run as it was.
        setting: chosen for it.

    Returns:
        The run with the setting's options; what they already say stays as it is.
    """
    num_layers = len(setting.levels)
    changed: dict[str, Any] = {"gradient_accumulation_steps": setting.accumulation}
    changed |= {"batch_size": setting.batch_size, "sharding_strategy": setting.strategy}
    if cfg.per_visit != setting.per_visit:
        changed["accumulate_by_layer"] = str(setting.per_visit)
    changed["use_activation_cpu_offload"] = setting.hosts_inputs
    whole = [i for i, name in enumerate(setting.placements) if name == "trained"]
    own = setting_of(cfg, num_layers, setting.num_ranks, whole)
    in_memory = [it.tiered(num_layers).placements for it in (own, setting)]  # the rest is found
    if in_memory[0] != in_memory[1] or own.strategy != setting.strategy:
        num_resident = setting.count("resident") if setting.strategy != "ddp" else 0
        kept = "file" if cfg.offload_impl == "file" else "auto"
        is_sharded = setting.count("sharded", "trained") == num_layers
        changed["use_cpu_offload"] = not is_sharded and setting.strategy != "ddp"
        changed["offload_impl"] = "fsdp" if setting.count("offloaded") else kept
        changed["resident_layers"] = num_resident
    if own.levels != setting.levels:
        changed["use_gradient_checkpointing"] = True
        changed["selective_layers"] = setting.count("selective")
        changed["uncheckpointed_layers"] = setting.count("none")
    return dataclasses.replace(cfg, **changed)


class Sizes:
    """Numbers of a decoder layer and of the model, for a run's adapters and precision.

    Of layers of several kinds they are means, from which sums over the layers are made, and
    `fullest` holds what the largest of them needs, each number by itself.

    Attributes:
        cfg, kind: see `__init__`.
        format: row of FORMATS.
        layers, hidden, vocab: of the model.
        heads: attention heads.
        outs: features of all matmuls of a layer but the last (down_proj) and those of experts.
        routed: features that the experts of a token make between their input and their output.
        redone: weights of a token's experts that read: no layer keeps their outputs selectively.
        attention: width of the attention's output.
        gates: features of the matmuls that feed the activation function.
        product: width of the activation product, which the last linear reads.
        norms: norms over the hidden size in a layer.
        head_norms: features that pass through norms of the head size (Qwen 3, Gemma 3).
        weights: frozen weights of a layer's linears.
        formatted: those in the run's format.
        largest: weights of its largest linear.
        grouped: weights of all its experts, of the side that has more; 0 in a dense layer.
        active: weights that one token passes: of a mixture, those of its experts.
        last: weights of its last linear, whose matmul a recomputation leaves out; 0 with experts.
        quantized, constants: bytes of a layer's linears as stored.
        root, small: elements outside the layers (embedding, head), of a layer's norms and biases.
        head: elements of the output head.
        is_tied: the embedding is the head, gathered once for both ends.
        lora, lora_ranks: trained parameters of a layer's adapters; the ranks that a token passes.
        lora_passed: parameters of the adapters that a token passes.
        magnitudes: features whose outputs DoRA scales.
        whole, trained_root: parameters of a layer; those outside the layers that are trained.
        input_features: features that the adapted linears read and keep: each input once.
        dropped_features: the same for every adapted linear by itself.
        item: bytes of an activation.
        is_eager: attention is not fused.
        caps_logits: the loss keeps the logits before their cap too (Gemma 2).
        file_bytes: of the model's files, where they lie in memory.
        master: bytes of a trained weight.
        is_kept_whole: a layer is so small that it is dequantized at once.
        graph_work: most weights times tokens of a layer that CUDA graphs help.
        is_uniform: all layers are of one kind and attend alike, as CUDA graphs want them.
        has_tiles: of long rows the end of a layer is computed tile by tile.
        one_group: factors of the adapters of all layers where they are so small that they are
            gathered and reduced at once; else empty.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float: ...  # those of `_numbers`

    def __init__(
        self, info: ModelInfo, cfg: TrainConfig, kind: str = "cuda", tflops: float = 0.0
    ) -> None:
        """Collect the numbers of a model and a run.

        Args:
            info: the model.
            cfg: the run.
            kind: where its ranks compute, "cuda" or "cpu".
            tflops: of its slowest GPU, see Device.bf16_tflops; 0: graphs are not asked about.

        Raises:
            UserError: an adapter's name matches no linear (code 2).
        """
        self.cfg, self.kind, self.format = cfg, kind, FORMATS[cfg.format_name]
        self.graph_work = MAX_GRAPH_WORK * tflops
        self.layers, self.hidden, self.vocab = info.num_layers, info.hidden_size, info.vocab_size
        self.heads: int = info.config.get("num_attention_heads", 1)
        of_kinds = [(self._numbers(info, cfg, own), len(own.layers)) for own in info.kinds]
        for name in of_kinds[0][0]:
            total = sum(numbers[name] * count for numbers, count in of_kinds)
            setattr(self, name, _mean(total, self.layers))
        for name in ("largest", "grouped"):
            setattr(self, name, max(numbers[name] for numbers, _ in of_kinds))
        self.root = sum(math.prod(shape) for _, shape in info.root_params)
        self.head = self.vocab * self.hidden
        self.is_tied = self.root < 2 * self.head
        counts = count_trained(info, cfg)
        self.lora, self.magnitudes = counts.adapters, counts.magnitudes
        self.whole, self.trained_root = counts.layer, counts.root
        self.item, self.master = DTYPE_BYTES[cfg.compute_dtype], DTYPE_BYTES[cfg.master_dtype]
        self.is_eager = is_eager(cfg, info.attention_extra, kind)
        self.caps_logits = bool(info.config.get("final_logit_softcapping"))
        self.file_bytes = _bytes_in_memory(info.path)
        self.is_kept_whole = self._keeps_whole(1)
        self.has_tiles = self.active == self.weights and has_ending(info.model_type)
        adapters = {"params": self.lora, "layers": self.layers}
        is_one_group = 0 < math.prod(adapters.values()) * self.item <= ONE_GROUP_BYTES
        self.one_group: dict[str, float] = dict(adapters) if is_one_group else {}
        self.fullest = self
        pattern = info.config.get("layer_types") or info.config.get("sliding_window_pattern") or 1
        types = range(pattern) if isinstance(pattern, int) else pattern  # 6, or "LLLG"
        self.is_uniform = len(of_kinds) == len({*types}) == 1
        if len(of_kinds) > 1:
            self.fullest = copy.copy(self)
            for name in of_kinds[0][0]:
                setattr(self.fullest, name, max(numbers[name] for numbers, _ in of_kinds))

    def _keeps_whole(self, per_visit: int) -> bool:
        is_small = self.weights * self.item <= whole_layer_bytes(per_visit)
        return self.active == self.weights and is_small and self.format.scratch_bytes > 0

    @functools.cached_property
    def visiting(self) -> "Sizes":
        """The same where groups of rows pass a layer together."""
        sizes = copy.copy(self)
        sizes.is_kept_whole = self._keeps_whole(2)
        sizes.fullest = sizes
        if self.fullest is not self:
            sizes.fullest = copy.copy(self.fullest)
            sizes.fullest.is_kept_whole = sizes.is_kept_whole
        return sizes

    def _numbers(self, info: ModelInfo, cfg: TrainConfig, kind: LayerKind) -> dict[str, float]:
        """The numbers of a layer of one kind, by the names of attributes."""
        linears, is_lora = kind.linears, has_adapters(cfg)
        shapes = [linear.shape for linear in linears]
        counts, own = [math.prod(shape) for shape in shapes], [linear.format for linear in linears]
        quantized, constants = quantized_bytes(shapes, cfg.format_name, own)
        active, num_experts = arch.active_linears(info, kind)
        o_proj = next((n for n in linears if n.name.endswith(("o_proj", ".dense"))), linears[0])
        qkv = linears[: linears.index(o_proj)]
        gates = [n for n in active if n.last_name.startswith(GATES)]
        layers = find_targets(info, cfg if is_lora else TrainConfig())
        targets = [row for index in kind.layers for row in layers[index]]
        adapted, sides = {row.linear for row in targets}, expert_sides(info, kind.layers[0])
        ranks = [(row, row.rank * min(row.num_experts, num_experts)) for row in targets]
        passed = sum(rank * sum(row.linear.shape) for row, rank in ranks)
        dense = [linear for linear in linears if linear.expert is None]
        product = sum(n.in_features for n, _ in sides[1:]) * num_experts
        norms = [shape[0] for name, shape in kind.params if name.endswith("norm.weight")]
        num_norms = norms.count(self.hidden)
        # Attention keeps its own output; else norms' outputs and the activation product are read.
        read = [g[0].in_features for g in (qkv, gates, linears[-1:]) if set(g) & adapted]
        return {
            "quantized": quantized,
            "constants": constants,
            "weights": sum(counts),
            "formatted": sum(linear.num_weights for linear in linears if not linear.format),
            "largest": max(counts),
            "grouped": max([n.num_weights * num for n, num in sides], default=0),
            "active": sum(linear.num_weights for linear in active),
            "last": counts[-1] if len(active) == len(linears) else 0,
            "outs": sum(n.out_features for n in (dense if sides else dense[:-1])),
            "routed": sum(n.out_features for n, _ in sides[:1]) * num_experts + 3 * product,
            "redone": sum(n.num_weights for n, _ in sides[:1]) * num_experts,
            "product": product or active[-1].in_features,
            "attention": o_proj.in_features,
            "gates": sum(linear.out_features for linear in gates),
            "norms": num_norms,
            "head_norms": sum(n.out_features for n in qkv[:2]) * (num_norms < len(norms)),
            "small": sum(math.prod(shape) for _, shape in kind.params),
            "lora_ranks": _mean(sum(rank for _, rank in ranks), len(kind.layers)) * is_lora,
            "lora_passed": _mean(passed, len(kind.layers)) * is_lora,
            "input_features": sum(read),
            "dropped_features": sum(linear.in_features for linear in adapted),
        }

    @property
    def layer_bytes(self) -> float:
        """Bytes of a layer's frozen linears and their constants, as stored."""
        return self.quantized + self.constants

    @functools.cached_property
    def num_rows(self) -> int | None:
        """Rows of the data set; None for one that would have to be read."""
        if self.cfg.dataset in ("dummy", "alpaca_sample", "orca_math"):
            return self.cfg.dataset_samples
        path = Path(os.path.expanduser(self.cfg.dataset))  # unlike pathlib's these raise nothing
        is_jsonl = path.suffix == ".jsonl" and os.path.isfile(path)
        if not is_jsonl or path.stat().st_size > MAX_COUNTED_BYTES:
            return KNOWN_ROWS.get(self.cfg.dataset)
        return sum(1 for line in path.read_bytes().splitlines() if line.strip())

    def tokens(self, setting: Setting) -> int:
        """Tokens of a full micro-batch of a rank; a pair has two rows."""
        rows = setting.batch_size * (1 + (self.cfg.num_answers == 2))
        return -(-rows * self.cfg.context_length // self.cfg.context_parallel)

    def joined(self, setting: Setting) -> Setting:
        """The same as GPUs compute it: small micro-batches of a visit are one."""
        most = min(setting.per_visit, JOINED_TOKENS // self.tokens(setting))
        is_plain = self.cfg.objective == "sft" and self.cfg.context_parallel == 1
        if self.kind != "cuda" or not is_plain or most < 2:
            return setting
        num = max(n for n in range(1, most + 1) if setting.per_visit % n == 0)
        joined = dataclasses.replace(setting, batch_size=setting.batch_size * num)
        left = -(-setting.accumulation // num)
        return dataclasses.replace(joined, accumulation=left, per_visit=setting.per_visit // num)

    def groups(self, setting: Setting) -> int:
        """Groups of rows that pass each layer together."""
        return setting.per_visit * self.cfg.passes

    def num_trained(self, setting: Setting) -> float:
        """Trained parameters of the model."""
        return self.lora * self.layers + self.whole * setting.count("trained") + self.trained_root


def _bytes_in_memory(path: Path | None) -> int:
    if path is None or not str(path.resolve()).startswith(IN_MEMORY):
        return 0
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
