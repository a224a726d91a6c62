"""What a decoder layer keeps for its backward, what that holds besides, and its CUDA graphs."""

import functools
from collections.abc import Sequence

from fsdp_qlora.arch.files import GROUP
from fsdp_qlora.config import Config
from fsdp_qlora.planning.limits import (
    FORMATS,
    MAX_GRAPH_SHAPES,
    MAX_GRAPH_WORK,
    PAD_MULTIPLES,
    WHOLE_LAYER_BYTES,
)
from fsdp_qlora.planning.rows import LAYER, SCRATCH, SLACK, Rows, Term, term, total_bytes
from fsdp_qlora.planning.sizes import Setting, Sizes

INPUT = "layer's input"
AT_WORK = 2  # of the inputs that wait on the host, back on the GPU: one in use, one on its way


@functools.lru_cache
def kept_bytes(s: Sizes, cfg: Config, tokens: int, level: str, kind: str = "cuda") -> list[Term]:
    """What one layer keeps between forward and backward.

    Derived for a Llama layer with fused norms, rotary embedding and activation (Liger's), flash
    attention and this project's LoRA matmul, which keeps its input only.

    Args:
        s: of the model.
        cfg: lora_dropout, context_length, liger.
        tokens: of a micro-batch on a rank.
        level: row of LEVELS.
        kind: "cuda" or "cpu", where Liger's kernels are not used.

    Returns:
        The terms, for one layer.
    """
    kept = [term(INPUT, tokens=tokens, hidden=s.hidden, bytes=s.item)]
    if level == "full":
        return kept
    kept += [
        term("outputs of all matmuls but the last", tokens=tokens, features=s.outs, bytes=s.item),
        term("attention's output", tokens=tokens, features=s.attention, bytes=s.item),
        term("its log-sum-exp", tokens=tokens, heads=s.heads, bytes=4),
    ]
    if level == "selective":
        return kept
    if cfg.lora_dropout and s.lora:
        mask = 1 if kind == "cuda" else s.item
        wide = {"tokens": tokens, "features": s.dropped_features, "bytes": s.item + mask}
        kept.append(term("dropped inputs, masks", **wide))
    else:
        what = "norms' outputs, activation product"
        kept.append(term(what, tokens=tokens, features=s.input_features, bytes=s.item))
    kept.append(term("matmuls with A", tokens=tokens, ranks=s.lora_ranks, bytes=s.item))
    if s.magnitudes:
        kept.append(
            term("outputs to be scaled", tokens=tokens, features=s.magnitudes, bytes=s.item)
        )
    others = (s.norms - 2) * s.hidden + s.head_norms
    if others:
        kept.append(term("inputs of more norms", tokens=tokens, features=others, bytes=s.item))
    if kind == "cpu" or cfg.liger == "off":
        what = "norms' inputs in float32 instead (not fused)"
        wide = {"tokens": tokens, "hidden": s.hidden, "norms": s.norms, "bytes": 4 - s.item}
        kept.append(term(what, **wide))
        what = "activation function's output (not fused)"
        kept.append(term(what, tokens=tokens, features=s.product, bytes=s.item))
    if s.is_eager:
        pairs = {"tokens": tokens, "context": cfg.context_length, "heads": s.heads}
        kept.append(term("attention's scores (not fused)", **pairs, bytes=s.item + 4))
    return kept


def at_work(s: Sizes, cfg: Config) -> list[Term]:
    """What is held of a layer's frozen weights, dequantized, while it is at work.

    All of a small layer, once for all its matmuls, and until another layer takes its place: after
    the last one too. Of a larger layer one linear at a time.

    Args:
        s: of the model.
        cfg: format_name.
    """
    fmt = FORMATS[cfg.format_name]
    if is_kept_whole(s, cfg):
        return [term("all linears", weights=s.weights, bytes=s.item)]
    return [term("largest linear", weights=s.largest, bytes=fmt.scratch_bytes)]


def is_kept_whole(s: Sizes, cfg: Config) -> bool:
    """Whether a layer is so small that it is dequantized at once."""
    has_scratch = FORMATS[cfg.format_name].scratch_bytes > 0
    return has_scratch and s.active == s.weights and s.weights * s.item <= WHOLE_LAYER_BYTES


@functools.lru_cache
def layer_moments(s: Sizes, cfg: Config, tokens: int, level: str, kind: str) -> list[Rows]:
    """What a layer's backward holds beside what was kept: its fullest moments.

    Args:
        s: of the model.
        cfg: format_name, reentrant_checkpointing, and see kept_bytes.
        tokens, level, kind: see kept_bytes.

    Returns:
        Rows of each such moment.
    """
    fmt, wide = FORMATS[cfg.format_name], {"tokens": tokens, "bytes": s.item}
    grads = [
        term("gradient of its output", features=s.hidden, **wide),
        term("gradient of the activation product", features=s.product, **wide),
    ]
    constants = {"weights": s.weights, "bytes": fmt.constant_bytes, "per_group": GROUP}
    scratch = [*at_work(s, cfg), term("constants of the layer", **constants)]
    rest = scratch[1:]  # before its first matmul
    if is_kept_whole(s, cfg):
        scratch = rest = scratch[:1]
    matmul_before: Rows = {LAYER: grads, SCRATCH: scratch}
    if level == "none":
        return [matmul_before]
    kept = {item.what for item in kept_bytes(s, cfg, tokens, level, kind)}
    made = [t for t in kept_bytes(s, cfg, tokens, "none", kind) if t.what not in kept]
    made = [item._replace(what=f"recomputed: {item.what}") for item in made]
    output = term("LoRA output of the last linear", features=s.hidden, **wide)
    if level == "selective":
        residual = term("recomputed: residual", features=s.hidden, **wide)
        between: Rows = {LAYER: [*made, residual, output, *grads]}
        return [matmul_before, between | ({SCRATCH: rest} if is_kept_whole(s, cfg) else {})]
    if cfg.reentrant_checkpointing:  # recomputed to the end, before the backward begins
        return [{LAYER: [*made, output, *grads], SCRATCH: scratch}]
    # The backward of the last matmul runs first and keeps nothing; then the layer is recomputed.
    waiting = term("activation product, not yet made", features=-s.product, **wide)
    return [
        {LAYER: [*made, output, *grads], SCRATCH: rest},
        {LAYER: [*made, waiting, *grads], SCRATCH: scratch},
    ]


def kept_by_level(
    s: Sizes, cfg: Config, tokens: int, levels: tuple[str, ...], kind: str
) -> list[Term]:
    """Sum `kept_bytes` over layers.

    Args:
        s, cfg, tokens, kind: see kept_bytes.
        levels: of the layers.

    Returns:
        The terms, over the layers of each level.
    """
    terms = []
    for level in dict.fromkeys(levels):
        for item in kept_bytes(s, cfg, tokens, level, kind):
            num = levels.count(level)
            if item.what == INPUT and cfg.use_activation_cpu_offload and level != "none":
                num = min(num, AT_WORK)
            factors = (*item.factors, ("layers", num))
            terms.append(Term(f"{level}: {item.what}", factors, item.nbytes * num))
    return terms


def num_offloaded(cfg: Config, levels: Sequence[str]) -> int:
    """Layers whose inputs wait on the host: those that are recomputed, but for the very last.

    Args:
        cfg: use_activation_cpu_offload.
        levels: of all layers.
    """
    return sum(level != "none" for level in levels[:-1]) * cfg.use_activation_cpu_offload


def uses_graphs(s: Sizes, cfg: Config, setting: Setting, kind: str) -> bool:
    """Whether recomputed layers run by graphs, as the model chooses.

    Rows of several lengths in one micro-batch are laid one after the other, which no graph follows.

    Args:
        s: numbers of the model and its adapters.
        cfg: cuda_graphs, dropout, packing, data.
        setting: batch, levels.
        kind: "cuda" or "cpu".
    """
    is_plain = s.lora > 0 and not s.magnitudes and s.active == s.weights
    is_plain = is_plain and not setting.count("trained")
    has_one_length = cfg.dataset == "dummy" or setting.batch_size == 1 or cfg.packing == "off"
    tokens = setting.batch_size * cfg.context_length
    return (
        kind == "cuda"
        and cfg.cuda_graphs == "auto"
        and is_plain
        and cfg.lora_dropout == 0
        and not cfg.reentrant_checkpointing
        and setting.count("full") > 0
        and cfg.packing != "on"
        and has_one_length
        and s.weights * tokens <= MAX_GRAPH_WORK
    )


def graph_rows(s: Sizes, cfg: Config, setting: Setting) -> Rows:
    """What the graphs hold from the second step to the end.

    Tensors that a layer's are copied into, of weights once, of the rest once a shape of batch; and
    a pool that all shapes share, as large as the fullest moment of a layer, which nothing else may
    use.

    Args:
        s, cfg, setting: see `uses_graphs`.
    """
    tokens = setting.batch_size * cfg.context_length
    shapes = min(MAX_GRAPH_SHAPES, -(-cfg.context_length // PAD_MULTIPLES["cuda"]))
    shapes = 1 if cfg.dataset == "dummy" else shapes
    moments = layer_moments(s, cfg, tokens, "full", "cuda")
    layer_bytes = s.layer_bytes + (s.lora + s.small) * s.item
    wide = {"tokens": tokens, "hidden": s.hidden, "n": 4, "bytes": s.item}
    return {
        LAYER: [
            term("graphs: bytes, adapters, norms", bytes=layer_bytes),
            term("graphs: gradients of adapters", shapes=shapes, params=s.lora, bytes=s.item),
            term("graphs: input, output, their gradients", shapes=shapes, **wide),
        ],
        SLACK: [
            term("graphs: their pool", bytes=max(map(total_bytes, moments))),
            term("left by the steps before them", bytes=total_bytes({SLACK: at_work(s, cfg)})),
        ],
    }
