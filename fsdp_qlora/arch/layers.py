"""The parameters of a decoder layer and of a model: names and shapes, linears, experts.

LAYOUTS has one row per model type. A row says what the sizes in config.json leave open: which
projections have a bias, whether they are fused, which norms a decoder layer has. tests/arch
compares every row with the model that transformers builds. Other types are read from the names of
the tensors in their files.
"""

import re
from dataclasses import dataclass, replace

from fsdp_qlora.errors import UserError

INDEXED = re.compile(r"(?P<prefix>.+?)\.(?P<index>\d+)\.(?P<name>.+)")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Quantized bytes lie in the order in which a layer computes, whatever the order of its files.
EXECUTION_ORDER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "o_proj", "dense"]
EXECUTION_ORDER += ["gate_proj", "up_proj", "gate_up_proj", "down_proj"]
EXECUTION_ORDER += ["dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer, to be quantized.

    Args:
        name: inside the layer, "self_attn.q_proj".
        out_features: rows of its weight.
        in_features: columns of its weight.
        has_bias: a bias of out_features exists; it is not quantized.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its weight."""
        return self.out_features, self.in_features

    @property
    def num_weights(self) -> int:
        """Elements of its weight."""
        return self.out_features * self.in_features

    @property
    def last_name(self) -> str:
        """Last part of its name, "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def expert(self) -> tuple[str, int, int] | None:
        """Which matrix of which expert it is, see expert_part; None for a linear."""
        return expert_part(f"{self.name}.weight")


@dataclass(frozen=True)
class Structure:
    """The parameters of a model as names and shapes.

    Args:
        layers_prefix: "model.layers"; layer 3 is "model.layers.3".
        num_layers: decoder layers.
        layer: parameters of one decoder layer, by the name inside it.
        root: parameters outside the layers, by full name; without lm_head when it is tied.
    """

    layers_prefix: str
    num_layers: int
    layer: Shapes
    root: Shapes

    def all_shapes(self) -> Shapes:
        """Expand the layers.

        Returns:
            Full name -> shape of every parameter of the model.
        """
        layers = (f"{self.layers_prefix}.{index}." for index in range(self.num_layers))
        return self.root | {
            prefix + name: shape for prefix in layers for name, shape in self.layer.items()
        }


@dataclass(frozen=True)
class LayerShape:
    """What a model type adds to the sizes in its config.json.

    Args:
        norms: names of the norms of a decoder layer, each of the hidden size.
        has_head_norms: also q_norm and k_norm of the head size.
        qkv_bias: True, False, or the config key that says so.
        o_bias: the same for the output projection.
        mlp_bias: the same for the three projections of the MLP.
        is_fused: q, k, v lie in one qkv_proj, gate and up in one gate_up_proj.
        is_tied: default of tie_word_embeddings.
        head_dim: default of head_dim; None is hidden size / heads.
    """

    norms: tuple[str, ...] = PRE_NORMS
    has_head_norms: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    is_fused: bool = False
    is_tied: bool = False
    head_dim: int | None = None


OPTIONAL_BIAS = LayerShape(qkv_bias="attention_bias", o_bias="attention_bias")
GEMMA = replace(OPTIONAL_BIAS, is_tied=True, head_dim=256)
LAYOUTS = {
    "llama": replace(OPTIONAL_BIAS, mlp_bias="mlp_bias"),
    "mistral": LayerShape(),
    "qwen2": LayerShape(qkv_bias=True),
    "qwen3": replace(OPTIONAL_BIAS, has_head_norms=True, head_dim=128),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms=SANDWICH_NORMS),
    "gemma3_text": replace(GEMMA, norms=SANDWICH_NORMS, has_head_norms=True),
    "phi3": LayerShape(is_fused=True),
}


def from_config(config: dict) -> Structure:
    """Derive the parameters from the sizes in config.json.

    Args:
        config: content of config.json, of a model type in LAYOUTS.

    Returns:
        Names and shapes.

    Raises:
        UserError: a size is absent or no positive integer (code 2).
    """
    num_layers = size(config, "num_hidden_layers")
    return Structure("model.layers", num_layers, _layer_shapes(config), _root_shapes(config))


def from_headers(shapes: Shapes) -> Structure:
    """Find the decoder layers as the one prefix that repeats with an index.

    Args:
        shapes: full name -> shape of all tensors of a model with one stack of layers.

    Returns:
        Names and shapes. The layer is layer 0: compare `all_shapes()` with the tensors to know
        that the others repeat it.

    Raises:
        UserError: no stack of layers, several stacks, or experts (code 2).
    """
    matches = [match for name in shapes if (match := INDEXED.fullmatch(name))]
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) != 1:
        rule = f"need one stack of decoder layers, found {len(prefixes)}"
        remedy = "take a text-only causal language model"
        raise UserError(f"weights with {', '.join(prefixes[:3])}", rule, remedy)
    layer = {match["name"]: shapes[match[0]] for match in matches if match["index"] == "0"}
    for name, shape in layer.items():
        part = expert_part(name)
        if len(shape) not in (1, 2) or (INDEXED.fullmatch(name) and part is None):
            rule = "is no linear, no vector and no expert as Mixtral or Qwen has them"
            raise UserError(f"{prefixes[0]}.0.{name}", rule, "take another model")
    num_layers = 1 + max(int(match["index"]) for match in matches)
    root = {name: shape for name, shape in shapes.items() if not INDEXED.fullmatch(name)}
    return Structure(prefixes[0], num_layers, layer, root)


def is_tied(config: dict) -> bool | None:
    """Say whether the output head is the embedding.

    Args:
        config: content of config.json.

    Returns:
        True or False; None when neither the config nor a layout says so.
    """
    layout = LAYOUTS.get(config["model_type"])
    value = config.get("tie_word_embeddings", layout.is_tied if layout else None)
    return None if value is None else bool(value)


def size(config: dict, key: str, default: int | None = None) -> int:
    """Read one size of a config.json.

    Args:
        config: content of config.json.
        key: for example "hidden_size".
        default: used when the key is absent or null.

    Returns:
        A positive integer.

    Raises:
        UserError: absent without a default, or no positive integer (code 2).
    """
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        rule = "must be a positive integer in config.json"
        raise UserError(f"{key} = {value!r}", rule, "take the model's own config.json")
    return value


def _layer_shapes(config: dict) -> Shapes:
    layout = LAYOUTS[config["model_type"]]
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    heads = size(config, "num_attention_heads")
    head_dim = size(config, "head_dim", layout.head_dim or hidden // heads)
    query, key = heads * head_dim, size(config, "num_key_value_heads", heads) * head_dim
    qkv = {"q_proj": query, "k_proj": key, "v_proj": key}
    gates = {"gate_proj": inner, "up_proj": inner}
    if layout.is_fused:
        qkv, gates = {"qkv_proj": query + 2 * key}, {"gate_up_proj": 2 * inner}

    shapes: Shapes = {f"{name}.weight": (hidden,) for name in layout.norms}
    if layout.has_head_norms:
        shapes |= {f"self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
    for name, width in qkv.items():
        shapes |= _linear(f"self_attn.{name}", width, hidden, layout.qkv_bias, config)
    shapes |= _linear("self_attn.o_proj", hidden, query, layout.o_bias, config)
    for name, width in gates.items():
        shapes |= _linear(f"mlp.{name}", width, hidden, layout.mlp_bias, config)
    return shapes | _linear("mlp.down_proj", hidden, inner, layout.mlp_bias, config)


def _linear(name: str, num_out: int, num_in: int, bias: bool | str, config: dict) -> Shapes:
    has_bias = bool(config.get(bias)) if isinstance(bias, str) else bias
    shapes: Shapes = {f"{name}.weight": (num_out, num_in)}
    return shapes | {f"{name}.bias": (num_out,)} if has_bias else shapes


def _root_shapes(config: dict) -> Shapes:
    hidden, vocab = size(config, "hidden_size"), size(config, "vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return shapes if is_tied(config) else shapes | {"lm_head.weight": (vocab, hidden)}


def expert_part(name: str) -> tuple[str, int, int] | None:
    """Tell an expert's matrix by its name.

    Args:
        name: of a tensor inside a decoder layer.

    Returns:
        (path of the mixture, number of the expert, 0 for gate, 1 for up or 2 for down); None when
        it is something else.
    """
    match = EXPERT.fullmatch(name)
    for parts in EXPERT_PARTS:
        if match and match["part"] in parts:
            return match["block"], int(match["index"]), parts.index(match["part"])
    return None


def linears(layer: Shapes) -> tuple[Linear, ...]:
    """Find the linears of a decoder layer.

    Args:
        layer: parameters of one decoder layer, by the name inside it.

    Returns:
        The linears, in the order in which the layer computes; routers of experts are none.

    Raises:
        UserError: a matrix that is no linear (code 2).
    """
    found = []
    mixtures = {part[0] for name in layer if (part := expert_part(name))}
    routers = {f"{block}.gate.weight" for block in mixtures}  # small, and they choose: 16 bit
    for name, shape in layer.items():
        if len(shape) != 2 or name in routers:
            continue
        module = name.removesuffix(".weight")
        bias = layer.get(f"{module}.bias")
        if module == name or bias not in (None, shape[:1]):
            rule = f"shape {list(shape)} with bias {bias} is no linear of [out, in]"
            raise UserError(name, rule, "take a model whose decoder layers are linears and norms")
        found.append(Linear(module, shape[0], shape[1], bias is not None))
    return tuple(sorted(found, key=_execution_key))


def _execution_key(linear: Linear) -> tuple[int, str]:
    order = [*EXECUTION_ORDER, linear.last_name]
    return order.index(linear.last_name), linear.name
