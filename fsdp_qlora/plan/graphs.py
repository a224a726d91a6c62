"""What CUDA graphs of a decoder layer hold of a card (model/graphs.py), where they are used."""

from fsdp_qlora.config import Config
from fsdp_qlora.plan.activations import at_work, layer_moments
from fsdp_qlora.plan.limits import MAX_GRAPH_SHAPES, MAX_GRAPH_WORK, PAD_MULTIPLES
from fsdp_qlora.plan.rows import LAYER, SLACK, Rows, term, total_bytes
from fsdp_qlora.plan.sizes import Setting, Sizes


def are_used(s: Sizes, cfg: Config, setting: Setting, kind: str) -> bool:
    """Whether recomputed layers run by graphs, as model/skeleton.py and model/packed.py choose.

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


def held(s: Sizes, cfg: Config, setting: Setting) -> Rows:
    """What the graphs hold from the second step to the end.

    Tensors that a layer's are copied into, of weights once, of the rest once a shape of batch; and
    a pool that all shapes share, as large as the fullest moment of a layer, which nothing else may
    use.

    Args:
        s, cfg, setting: see `are_used`.
    """
    tokens = setting.batch_size * cfg.context_length
    shapes = min(MAX_GRAPH_SHAPES, -(-cfg.context_length // PAD_MULTIPLES["cuda"]))
    shapes = 1 if cfg.dataset == "dummy" else shapes
    moments = layer_moments(s, cfg, tokens, "full", "cuda")
    layer_bytes = s.packed + s.constants + (s.lora + s.small) * s.item
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
