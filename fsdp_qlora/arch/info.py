"""What a model is: its decoder layers, their linears, all shapes; read without torch.

No weight is read, only config.json and the headers of the safetensors files. LAYOUTS has one row
per model type: what the sizes in config.json leave open, such as which projections have a bias.
For those types files and config must agree tensor by tensor; of another type the files tell what
each layer holds, and the model that transformers builds must hold the same. Layers with the same
names and shapes are of one kind. Values of config.json that are no sizes are checked too, so that
no rank fails over one. tests/arch compares every row with the model that transformers builds.
"""

import contextlib
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fsdp_qlora.arch import files
from fsdp_qlora.arch.files import MXFP4, QuantizedRef, Refs, Shapes, Stored
from fsdp_qlora.errors import UserError

INDEXED = re.compile(r"(?P<prefix>.+?)\.(?P<index>\d+)\.(?P<name>.+)")
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
JOINED = "gate_up_proj"  # of an expert, both projections in one
FUSED = re.compile(files.TABLE["patterns"]["fused"])
EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj", JOINED), ("w1", "w3", "w2"))
# Matrices that stay in 16 bit beside routers: gates of linear attention, one row a head.
SMALL = ("in_proj_a", "in_proj_b", "in_proj_ba")
SLIDING = "sliding_attention"
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDING = "model.embed_tokens.weight"  # of the types in LAYOUTS
# Start of the layers' names in files of a model saved without its head -> what all names lack.
BARE = {"layers.0.": "model.", "h.0.": "transformer.", "decoder.layers.0.": "model."}
# Names of the text half in the files of a model that sees or hears too -> those of a text model.
WRAPPED = re.compile(files.TABLE["patterns"]["wrapped"])
FORETELLING = re.compile(r"(model\.)?mtp(_\w+)?\.")
OWN_CONFIG = "take the model's own config.json"


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer, to be quantized.

    Args:
        name: inside the layer, "self_attn.q_proj".
        out_features: rows of its weight.
        in_features: columns of its weight.
        has_bias: a bias of out_features exists; it is not quantized.
        format: row of planning.sizes.FORMATS in which the files have it, where that is kept
            whatever the format of the run.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    format: str = ""

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
        """Which matrix of which expert it is, see _expert_part; None for a linear."""
        return _expert_part(f"{self.name}.weight")


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers that hold tensors of the same names and shapes.

    Args:
        linears: in the order in which a layer computes.
        params: (name inside the layer, shape) of all that is not quantized: norms, biases,
            routers, convolutions; sorted by name.
        layers: numbers of the layers.
    """

    linears: tuple[Linear, ...]
    params: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[int, ...]

    @cached_property
    def num_params(self) -> int:
        """Parameters of one such layer."""
        weights = sum(linear.num_weights for linear in self.linears)
        return weights + sum(math.prod(shape) for _, shape in self.params)


@dataclass(frozen=True)
class Structure:
    """The parameters of a model as names and shapes.

    Args:
        layers_prefix: "model.layers"; layer 3 is "model.layers.3".
        layers: parameters of each decoder layer, by the name inside it.
        root: parameters outside the layers, by full name; without lm_head when it is tied.
    """

    layers_prefix: str
    layers: Sequence[Shapes]
    root: Shapes

    def all_shapes(self) -> Shapes:
        """Expand the layers.

        Returns:
            Full name -> shape of every parameter of the model.
        """
        return self.root | {
            f"{self.layers_prefix}.{index}.{name}": shape
            for index, layer in enumerate(self.layers)
            for name, shape in layer.items()
        }

    def kinds(self, kept: Mapping[str, str]) -> tuple[LayerKind, ...]:
        """Sort the layers by what they hold; the kinds in the order of their first layers.

        Args:
            kept: full name of a weight -> its format, where that of the files is kept.

        Raises:
            UserError: see `find_linears`.
        """
        found: dict[tuple, list[int]] = {}
        for index, layer in enumerate(self.layers):
            names = ((name, f"{self.layers_prefix}.{index}.{name}") for name in sorted(layer))
            own = tuple((name, kept[full]) for name, full in names if full in kept)
            found.setdefault((tuple(sorted(layer.items())), own), []).append(index)
        kinds = []
        for (items, own), indices in found.items():
            linears = tuple(
                dataclasses.replace(linear, format=dict(own).get(f"{linear.name}.weight", ""))
                for linear in find_linears(self.layers[indices[0]])
            )
            weights = {f"{linear.name}.weight" for linear in linears}
            params = tuple(item for item in items if item[0] not in weights)
            kinds.append(LayerKind(linears, params, tuple(indices)))
        return tuple(kinds)


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
        defaults: of other sizes, which wrappers leave to the class of the config.
    """

    norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm")
    has_head_norms: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    is_fused: bool = False
    is_tied: bool = False
    head_dim: int | None = None
    defaults: dict[str, int] = field(default_factory=dict)


_TABLE = {name: row for name, row in files.TABLE.items() if name != "patterns"}
EXECUTION_ORDER, OTHER_NAMES = _TABLE.pop("execution_order"), _TABLE.pop("other_names")
RENAMED, OUTER = _TABLE.pop("renamed"), {"llama4": "language_model.model."}
ACTIVATIONS, DTYPES, ROPES = map(_TABLE.pop, ("activations", "dtypes", "ropes"))
RECURRENT, LEFT_OUT, POSITION_TABLES = map(_TABLE.pop, ("recurrent", "left_out", "position_tables"))
LAYOUTS = {name: LayerShape(**row) for name, row in _TABLE.items()}


def from_config(config: dict) -> Structure:
    """Derive the parameters from the sizes in config.json.

    Args:
        config: content of config.json, of a model type in LAYOUTS.

    Returns:
        Names and shapes.

    Raises:
        UserError: a size is absent or no positive integer (code 2).
    """
    hidden, vocab = read_size(config, "hidden_size"), read_size(config, "vocab_size")
    root: Shapes = {EMBEDDING: (vocab, hidden), "model.norm.weight": (hidden,)}
    if not _is_tied(config):
        root["lm_head.weight"] = (vocab, hidden)
    layers = [_layer_shapes(config)] * read_size(config, "num_hidden_layers")
    return Structure("model.layers", layers, root)


def from_headers(shapes: Shapes) -> Structure:
    """Find the decoder layers as the one prefix that repeats with an index.

    Args:
        shapes: full name -> shape of all tensors of a model with one stack of layers.

    Returns:
        Names and shapes.

    Raises:
        UserError: no stack of layers, several stacks, or tensors that no layer has (code 2).
    """
    matches = [match for name in shapes if (match := INDEXED.fullmatch(name))]
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) != 1:
        rule = f"need one stack of decoder layers, found {len(prefixes)}"
        remedy = "take a causal language model that has one"
        raise UserError(f"weights with {', '.join(prefixes[:3])}", rule, remedy)
    layers: list[Shapes] = [{} for _ in range(1 + max(int(m["index"]) for m in matches))]
    for match in matches:
        layers[int(match["index"])][match["name"]] = shape = shapes[match[0]]
        if len(shape) > 2 and shape[1] != 1:  # as convolutions of each feature by itself have it
            rule = "is no linear, no vector and no expert as Mixtral or Qwen has them"
            raise UserError(match[0], rule, "take another model")
    root = {name: shape for name, shape in shapes.items() if not INDEXED.fullmatch(name)}
    return Structure(prefixes[0], layers, root)


def _is_tied(config: dict) -> bool:
    """Whether config or layout say that the output head is the embedding."""
    layout = LAYOUTS.get(config["model_type"], LayerShape())
    return bool(config.get("tie_word_embeddings", layout.is_tied))


def read_size(config: dict, key: str, default: int | None = None) -> int:
    """Read one size of a config.json; the default counts when the key is absent or null."""
    names = (key, *OTHER_NAMES.get(key, ()))
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if key == "num_hidden_layers" and value is None:  # Nemotron-H
        value = len(config.get("layers_block_type") or ()) or None
    limit = {"num_hidden_layers": 10_000}.get(key, 2**31)
    if type(value) is not int or not 1 <= value <= limit:
        rule = f"must be a positive integer of at most {limit:,} in config.json"
        raise UserError(f"{key} = {value!r}", rule, OWN_CONFIG)
    return value


def _layer_shapes(config: dict) -> Shapes:
    layout = LAYOUTS[config["model_type"]]
    hidden, inner = read_size(config, "hidden_size"), read_size(config, "intermediate_size")
    heads = read_size(config, "num_attention_heads")
    head_dim = read_size(config, "head_dim", layout.head_dim or hidden // heads)
    query, key = heads * head_dim, read_size(config, "num_key_value_heads", heads) * head_dim
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


def _expert_part(name: str) -> tuple[str, int, int] | None:
    """Of an expert's matrix: its mixture, its number; 0 gate, 1 up, 2 down, 3 gate and up."""
    match = EXPERT.fullmatch(name)
    for parts in EXPERT_PARTS:
        if match and match["part"] in parts:
            return match["block"], int(match["index"]), parts.index(match["part"])
    return None


def find_linears(layer: Shapes) -> tuple[Linear, ...]:
    """Find the linears of a decoder layer.

    Args:
        layer: parameters of one decoder layer, by the name inside it.

    Returns:
        The linears, in the order in which the layer computes; routers of experts are none.

    Raises:
        UserError: a matrix that is no linear (code 2).
    """
    found, routers = [], _routers(layer)  # small, and they choose: 16 bit
    for name, shape in layer.items():
        module = name.removesuffix(".weight")
        is_small = name in routers or module.endswith(("norm", *SMALL))
        if len(shape) != 2 or is_small or module == name:
            continue
        bias = layer.get(f"{module}.bias")
        if bias not in (None, shape[:1]):
            rule = f"shape {list(shape)} with bias {bias} is no linear of [out, in]"
            if bias == shape[1:]:
                rule = f"is stored as [in, out] {list(shape)}, as GPT-2's Conv1D; [out, in] is read"
            raise UserError(name, rule, "take a model whose decoder layers are linears and norms")
        found.append(Linear(module, shape[0], shape[1], bias is not None))
    return tuple(sorted(found, key=_execution_place))


def _execution_place(linear: Linear) -> tuple[int, str]:
    order = {name: place for place, name in enumerate(EXECUTION_ORDER)}
    return order.get(linear.last_name, len(order)), linear.name


def _routers(layer: Shapes) -> set[str]:
    """Weights beside the experts of a mixture that give each expert a number."""
    num_experts: dict[str, int] = {}
    for block, number, _ in filter(None, map(_expert_part, layer)):
        num_experts[block] = max(num_experts.get(block, 0), number + 1)
    return {
        name
        for name, shape in layer.items()
        for block, num in num_experts.items()
        if name.startswith(f"{block}.") and len(shape) == 2 and shape[0] == num
        if _expert_part(name) is None
    }


@dataclass(frozen=True)
class ModelInfo:
    """All that planning, building and loading need to know of a model before its weights are read.

    Args:
        path: its directory; None for a shape known by name only.
        model_type: as in config.json.
        config: content of config.json, without the keys that could name code to run.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding.
        is_tied: the output head is the embedding.
        layers_prefix: "model.layers"; layer 3 is "model.layers.3".
        kinds: of decoder layers; most models have one.
        root_params: (full name, shape) of embedding, last norm, untied lm_head, sorted by name.
        tensors: full name -> where its bytes lie; empty when no weights were asked for.
        wrapper: model_type of the model whose text half it is, or "".
        towers: full name -> where the bytes of parts lie that are not trained: the others of a
            wrapper, layers that foretell further tokens.
        stored: how it lies on disk.
        quantized: full name of a weight that is quantized there -> its parts; empty without
            `tensors`.
    """

    path: Path | None
    model_type: str
    config: dict
    num_layers: int
    hidden_size: int
    vocab_size: int
    is_tied: bool
    layers_prefix: str
    kinds: tuple[LayerKind, ...]
    root_params: tuple[tuple[str, tuple[int, ...]], ...]
    tensors: Refs
    wrapper: str = ""
    towers: Refs = field(default_factory=dict)
    stored: Stored = field(default_factory=Stored)
    quantized: dict[str, QuantizedRef] = field(default_factory=dict)

    @cached_property
    def by_layer(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        kinds = {index: kind for kind in self.kinds for index in kind.layers}
        return tuple(kinds[index] for index in range(self.num_layers))

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of all kinds, each name once."""
        every = {linear.name: linear for kind in self.kinds for linear in kind.linears}
        return tuple(sorted(every.values(), key=_execution_place))

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all tensors in the files, whether there are such or not."""
        params = {
            f"{self.layers_prefix}.{index}.{name}"
            for index, kind in enumerate(self.by_layer)
            for name, _ in kind.params
        }
        return frozenset(params | self.linear_places().keys() | dict(self.root_params).keys())

    @property
    def attention_extra(self) -> str:
        """What PyTorch's attention leaves out, or "".

        "soft-capped" (Gemma 2), "indexed" (MiniMax M3), "sinks" (gpt-oss), which a kernel for rows
        computes unless the size of the heads is odd: "sinks of heads of 60".
        """
        if self.config.get("attn_logit_softcapping"):
            return "soft-capped"
        if any(key.startswith("index_topk") for key in self.config):
            return "indexed"
        names = (name for kind in self.kinds for name, _ in kind.params)
        size = self.config.get("head_dim") or 8
        found = "sinks" if size % 8 == 0 and size <= 256 else f"sinks of heads of {size}"
        return found if any("sink" in n or "softmax_offset" in n for n in names) else ""

    def formats(self, format_name: str) -> str:
        """The formats of the linears where a run has `format_name`: "nf4_dq + mxfp4"."""
        return " + ".join([format_name, *sorted({x.format for x in self.linears} - {""})])

    def outer_name(self, name: str, is_whole: bool = True) -> str:
        """What transformers calls a module or parameter, in a wrapper where the model is of one.

        Args:
            name: in the text model, "model.layers.0.self_attn.q_proj".
            is_whole: False: as it is called within the text model.
        """
        old, new = RENAMED.get(self.model_type, ("", ""))
        name, outer = name.replace(old, new, 1), OUTER.get(self.wrapper, "model.language_model.")
        is_inside = self.wrapper and is_whole and name.startswith("model.")
        return outer + name[6:] if is_inside else name

    def digest(self, num_places: int = files.NUM_SAMPLES) -> str | None:
        """Tell this base from others, see `files.sample_digest`; all parts of 4-bit weights count.

        Args:
            num_places: of every tensor; 0: every byte; 1: as adapters of older versions record it,
                by the codes of 4-bit weights alone.
        """
        tensors = dict(self.tensors)
        for name, stored in self.quantized.items() if num_places != 1 else ():
            tensors |= {f"{name}.{part} {stored.offset}": r for part, r in stored.refs.items()}
        return files.sample_digest(tensors, num_places)

    @cached_property
    def whole_digest(self) -> str | None:
        """`digest` by every byte, for which all files are read once."""
        return self.digest(0)

    def linear_places(self, layers: Iterable[int] | None = None) -> dict[str, tuple[int, int]]:
        """Find the weights of the linears.

        Args:
            layers: numbers of decoder layers; None: all.

        Returns:
            Name in the files -> (layer, place among the linears of its kind), in the order of both.
        """
        return {
            f"{self.layers_prefix}.{layer}.{linear.name}.weight": (layer, index)
            for layer in (range(self.num_layers) if layers is None else layers)
            for index, linear in enumerate(self.by_layer[layer].linears)
        }

    def rope_note(self, context_length: int) -> str:
        """Say where a row's rotary table depends on the longest row of its batch.

        Args:
            context_length: tokens of the longest row that can come.

        Returns:
            One line, or "".
        """
        table = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = table.get("rope_type", table.get("type"))
        names = "original_max_position_embeddings", "max_position_embeddings"
        sizes = [at[name] for name in names for at in (table, self.config) if at.get(name)]
        if kind not in ("dynamic", "longrope") or not sizes or context_length <= sizes[0]:
            return ""
        where = f"a row in one batch with one of more than {sizes[0]} tokens"
        return f"rope      {kind}: {where} is computed as if it were as long"

    def positions_note(self, what: str, num_tokens: int) -> str:
        """Say that a text is longer than those the model was made for.

        Args:
            what: it is, before its length: "a prompt of".
            num_tokens: its length.

        Returns:
            One line, or "".
        """
        known = self.config.get("max_position_embeddings") or num_tokens
        note = f"note      {what} {num_tokens:,} tokens: the model was made for {known:,}"
        return note * (num_tokens > known)

    @property
    def num_positions(self) -> int | None:
        """Rows of its table of positions, which no row may exceed; None: it computes them."""
        size = self.config.get("n_positions", self.config.get("max_position_embeddings"))
        return size if self.model_type in POSITION_TABLES and isinstance(size, int) else None

    def recurrent_note(self) -> str:
        """Name the package with kernels for recurrent layers, where it is missing; or ""."""
        names = " ".join(name for kind in self.kinds for name, _ in kind.params)
        for part, (module, package) in RECURRENT.items():
            if part in names and importlib.util.find_spec(module) is None:
                return f"note      recurrent layers run by PyTorch, slower: {package} is missing"
        return ""


def read(model_name: str, need_weights: bool) -> ModelInfo:
    """Describe a model given by directory, hub name or the name of a well-known shape.

    Args:
        model_name: a local directory, a hub name, or one of files.known_shapes().
        need_weights: find (or download) the weights too; their headers must fit config.json.

    Returns:
        The description.

    Raises:
        UserError: no such model, or one that cannot be loaded whole and safely (codes 2, 3, 5).
    """
    found = files.locate(model_name, need_weights)
    path = found if found.is_dir() else None
    raw = files.read_json(path / "config.json" if path else found)
    text, wrapper = _text_half(raw)
    config, stored = _checked_config(text, model_name), files.stored_as(text | raw, model_name)
    is_known = config["model_type"] in LAYOUTS
    tensors, towers, quantized = Refs(), Refs(), dict[str, QuantizedRef]()
    reads_headers = need_weights or not is_known
    has_files = path and reads_headers and (need_weights or any(path.glob("*.safetensors")))
    if reads_headers:
        if path and has_files:
            tensors, towers, quantized = stored_tensors(path, config, wrapper, stored)
        else:
            found_at = files.without_bytes(raw.get("_tensors"), text)
            config["tie_word_embeddings"] = HEADS[0] not in found_at
            tensors = _own_names(found_at, config)
        tensors = _without_copies(tensors, config)
    elif path and _is_tied(config):  # whole files know better; a plan can do without
        with contextlib.suppress(UserError):
            _without_copies(stored_tensors(path, config, wrapper, stored)[0], config)
    shapes = {name: ref.shape for name, ref in tensors.items()}
    structure = from_config(config) if is_known else from_headers(shapes)
    if reads_headers:
        _check_tensors(structure, shapes, config, model_name)
    in_blocks = quantized if has_files else filter(_expert_part, shapes)
    kept = dict.fromkeys(in_blocks, MXFP4) if stored.method == MXFP4 else {}
    info = ModelInfo(
        path=path,
        model_type=config["model_type"],
        config=config,
        num_layers=len(structure.layers),
        hidden_size=read_size(config, "hidden_size"),
        vocab_size=read_size(config, "vocab_size"),
        is_tied=not structure.root.keys() & set(HEADS),
        layers_prefix=structure.layers_prefix,
        kinds=structure.kinds(kept),
        root_params=tuple(sorted(structure.root.items())),
        tensors=tensors if has_files else {},
        wrapper=wrapper,
        towers=towers,
        stored=stored,
        quantized=quantized,
    )
    if stored.whole and has_files:
        _check_whole(info.linear_places().keys(), quantized.keys(), model_name)
    return info


def _check_whole(linears: Set[str], quantized: Set[str], model_name: str) -> None:
    """Of files in 4 bit, all linears of the layers are, and nothing else is."""
    faults = {"not in 4 bit, where others are": sorted(linears - quantized)}
    faults["in 4 bit, but no linear of a decoder layer"] = sorted(quantized - linears)
    files.refuse(faults, model_name, files.ORIGINAL)


def _text_half(config: dict) -> tuple[dict, str]:
    """The config of the part that is trained, and of which wrapper it is one, or ""."""
    text = config.get("text_config")
    if not isinstance(text, dict) or "model_type" not in text:
        return config, ""
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    outer: dict[str, Any] = {} if tied is None else {"tie_word_embeddings": tied}
    if config.get("model_type") == "gemma3":  # it computes none, whatever its text half says
        outer["final_logit_softcapping"] = None
    return text | outer, str(config.get("model_type"))


def stored_tensors(
    path: Path, config: dict, wrapper: str, stored: Stored
) -> tuple[Refs, Refs, dict[str, QuantizedRef]]:
    """Read what the files of a model hold.

    Args:
        path: its directory.
        config: of its text half; of a wrapper it is told whether the head is tied.
        wrapper: see ModelInfo.
        stored: how it lies there.

    Returns:
        See ModelInfo: tensors, towers, quantized.
    """
    item_bytes = files.QUANTIZED_ITEM_BYTES if stored.method else files.ITEM_BYTES
    every = files.read_tensors(path, item_bytes)
    text = {name: text_name(name, config, wrapper) for name in every}
    tensors = {own: every[name] for name, own in text.items() if own}
    towers = {name: every[name] for name, own in text.items() if not own}
    if wrapper:
        config["tie_word_embeddings"] = HEADS[0] not in tensors
    tensors, quantized = _own_names(tensors, config), dict[str, QuantizedRef]()
    if stored.method:
        tensors, quantized = files.fold(tensors, stored, str(path))
    if towers and stored.method and not stored.whole:
        towers, others = files.fold(towers, stored, str(path))
        quantized |= others
    return tensors, towers, quantized


def text_name(name: str, config: dict, wrapper: str) -> str:
    """What a text model calls a tensor; "" for one of another part.

    Other parts are the towers of a wrapper, and layers that foretell further tokens, which
    transformers leaves too.

    Args:
        name: in the files.
        config: of the text half.
        wrapper: "" for a text model.
    """
    sizes = (config.get(k) for k in ("num_nextn_predict_layers", "num_hidden_layers"))
    num, first = (size if type(size) is int else 0 for size in sizes)
    index = int(match["index"]) if (match := INDEXED.fullmatch(name)) else -1
    if first <= index < first + num or FORETELLING.match(name):
        return ""
    return inner_name(name) if wrapper else name


def inner_name(name: str) -> str:
    """What a text model calls a tensor of a wrapper's files; "" for one of another part."""
    if match := WRAPPED.fullmatch(name):
        return f"model.{match[1]}"
    return HEADS[0] if name in ("lm_head.weight", "language_model.lm_head.weight") else ""


def _checked_config(config: dict, model_name: str) -> dict:
    """Refuse what cannot be trained here, and drop the keys that could name code to run."""
    model_type = config.get("model_type")
    got = f"{model_name}: model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise UserError(got, "config.json must name one", OWN_CONFIG)
    if "text_config" in config or "vision_config" in config:
        raise UserError(got, "is multi-modal; only text is built", "take its text-only variant")
    if "auto_map" in config and model_type not in LAYOUTS:
        rule = "wants its own code run (auto_map), which is never done"
        raise UserError(got, rule, f"take one of {', '.join(LAYOUTS)}")
    config = LAYOUTS.get(model_type, LayerShape()).defaults | config
    if "index_topk" in config or any(key.startswith("indexer_") for key in config):
        rule = "chooses the keys of each token by an indexer, which is not computed here"
        raise UserError(got, rule, "take another model")
    _check_values(config)
    if config.get("sliding_window") in (0, -1):  # older releases wrote "none" so
        config = config | {"sliding_window": None}
    if SLIDING in str(config.get("layer_types")) and config.get("sliding_window", 1) is None:
        raise UserError(got, f"has {SLIDING}, and its window is none", "say how long it is")
    return {key: config[key] for key in config if key not in LEFT_OUT and not key.startswith("_")}


def _own_names(tensors: Refs, config: dict) -> Refs:
    """Name the tensors of a model saved without its head, or its embedding as its head, in full."""
    lacks = [own for start, own in BARE.items() if any(name.startswith(start) for name in tensors)]
    bare = {name if name in HEADS else "".join(lacks) + name: ref for name, ref in tensors.items()}
    if _is_tied(config) and HEADS[0] in bare and config["model_type"] in LAYOUTS:
        bare.setdefault(EMBEDDING, bare[HEADS[0]])
    return split_experts(bare, read_size(config, "hidden_size"))


def split_experts(tensors: Refs, hidden: int) -> Refs:
    """Make an entry of the matrix of each expert where a tensor holds those of a layer.

    Some files hold matrices as [out, in], some (gpt-oss, Llama 4) as [in, out]; both projections of
    a layer together tell which.

    Args:
        tensors: of the files.
        hidden: width of the residual stream.

    Returns:
        "...mlp.experts.3.gate_up_proj.weight" and so on in place of "...mlp.experts.gate_up_proj".
    """
    cubes = (name for name, ref in tensors.items() if len(ref.shape) == 3)
    found = {name: match for name in cubes if (match := FUSED.fullmatch(name))}
    turned = {m["block"] for n, m in found.items() if m["down"] and tensors[n].shape[2] == hidden}
    turned -= {m["block"] for n, m in found.items() if m["up"] and tensors[n].shape[1] != hidden}
    split: Refs = {}
    for name, ref in tensors.items():
        match = found.get(name)
        if match is None:
            split[name] = ref
            continue
        part = "down_proj" if match["down"] else "up_proj" if match["up"] == "up_proj" else JOINED
        is_turned = match["block"] in turned
        for i in range(ref.shape[0]):
            stem, own = f"{match['block']}.experts.{i}.{part}.weight", files.piece(ref, i)
            shape = own.shape[::-1] if is_turned else own.shape
            split[stem] = own._replace(shape=shape, is_transposed=is_turned, joint=name)
    return split


def _without_copies(tensors: Refs, config: dict) -> Refs:
    """Leave out what is stored twice: a tied head.

    A head of other bytes than the embedding's is none: `config` is untied, in place.
    """
    head, is_tied = tensors.get(HEADS[0]), _is_tied(config)
    if head is not None and is_tied:
        others = [ref for n, ref in tensors.items() if n != HEADS[0] and ref.shape == head.shape]
        is_tied = not others or any(files.same_bytes(head, ref, head.nbytes) for ref in others)
        config["tie_word_embeddings"] = is_tied
    return {name: ref for name, ref in tensors.items() if not is_tied or name != HEADS[0]}


def _check_tensors(structure: Structure, shapes: Shapes, config: dict, model_name: str) -> None:
    """Every parameter must be in the files, in the right shape, and nothing else."""
    num_layers, num_found = read_size(config, "num_hidden_layers"), len(from_headers(shapes).layers)
    if num_layers != num_found:
        rule = f"config.json says {num_layers} decoder layers, the files hold {num_found}"
        raise UserError(model_name, rule, files.SAME_PLACE)
    expected = structure.all_shapes()
    has_head = any("head" in name or name in HEADS for name in structure.root)
    if config.get("tie_word_embeddings") is False and not has_head:
        expected[HEADS[0]] = ()
    files.check_shapes(expected, shapes, model_name)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rope(value: Any) -> bool:
    """One table, or one for each type of layer."""
    if not isinstance(value, dict):
        return False
    tables = [entry for entry in value.values() if isinstance(entry, dict)] or [value]
    kinds = [table.get("rope_type", table.get("type", "default")) for table in tables]
    numbers = [table.get(key) for table in tables for key in ("rope_theta", "factor")]
    are_numbers = all(number is None or _is_positive(number) for number in numbers)
    return are_numbers and all(kind in ROPES.split() for kind in kinds)


def _are_ids(value: Any) -> bool:
    return all(type(entry) is int for entry in (value if isinstance(value, list) else [value]))


SWITCHES = "tie_word_embeddings attention_bias mlp_bias use_cache"
# What a value must be, and of which keys.
RULES = (
    (_is_positive, "a positive number", "rms_norm_eps rope_theta"),
    (lambda v: type(v) is int and v > 0, "a positive integer", "max_position_embeddings"),
    (_is_number, "a number", "initializer_range"),
    (lambda v: _is_number(v) and 0 <= v < 1, "from 0 to below 1", "attention_dropout"),
    (_is_rope, f"a table whose rope_type is one of {ROPES}", "rope_scaling rope_parameters"),
    (lambda v: v in (False, "vision"), "false or vision", "use_bidirectional_attention"),
    (lambda v: v is True, "true", "is_causal"),
    (lambda v: v in ACTIVATIONS.split(), f"one of {ACTIVATIONS}", "hidden_act hidden_activation"),
    (lambda v: v in DTYPES.split(), f"one of {DTYPES}", "dtype torch_dtype"),
    (lambda v: type(v) is int, "a whole number or null", "pad_token_id"),
    (_are_ids, "a whole number, a list of them, or null", "bos_token_id eos_token_id"),
    (lambda v: type(v) is bool, "true or false", SWITCHES),
)
NEEDED = ("rms_norm_eps", "max_position_embeddings")  # null is no value for these


def _check_values(config: dict[str, Any]) -> None:
    """Refuse a value that transformers does not take."""
    needed = NEEDED if config["model_type"] in LAYOUTS else ()
    for is_good, rule, key in ((*row[:2], key) for row in RULES for key in row[2].split()):
        value = config.get(key)
        is_left_out = value is None and (key not in needed or key not in config)
        if not is_left_out and not is_good(value):
            raise UserError(f"{key} = {value!r} in config.json", f"must be {rule}", OWN_CONFIG)
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
        rule = f"the embedding has {rows} rows"
        raise UserError(f"pad_token_id = {pad} in config.json", rule, "set it to null there")
