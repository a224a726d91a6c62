"""What a model is: its decoder layers, their linears, all shapes; read without torch.

No weight is read, only config.json and the headers of the safetensors files. For the model types
of layouts.py the two must agree tensor by tensor; another type is accepted with weights when its
layers repeat exactly.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from fsdp_qlora import config_values, layouts, lookup, prequantized, stored_names
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.layouts import LAYOUTS, Shapes, Structure
from fsdp_qlora.weights_files import (
    ITEM_BYTES,
    PACKED_ITEM_BYTES,
    TensorRef,
    describe,
    read_json,
    read_tensors,
)

ALL_LINEARS = {"all", "all-linear", "all_linear", "default"}
# Packed bytes are laid out in the order in which a layer computes, whatever the order of its files.
EXECUTION_ORDER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "o_proj", "dense"]
EXECUTION_ORDER += ["gate_proj", "up_proj", "gate_up_proj", "down_proj"]
EXECUTION_ORDER += ["dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"]
SAME_PLACE = "copy config.json and the weights from the same place"


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer, to be quantised.

    Args:
        name: inside the layer, "self_attn.q_proj".
        out_features: rows of its weight.
        in_features: columns of its weight.
        has_bias: a bias of out_features exists; it is not quantised.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def expert(self) -> tuple[str, int, int] | None:
        """Which matrix of which expert it is, see stored_names.expert_part; None for a linear."""
        return stored_names.expert_part(f"{self.name}.weight")


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
        linears: the linears of ONE decoder layer, in the order in which it computes.
        layer_params: (name inside the layer, shape) of its norms and biases, sorted by name.
        root_params: (full name, shape) of embedding, last norm, untied lm_head, sorted by name.
        tensors: full name -> where its bytes lie; empty when no weights were asked for.
        stored_format: of the linears on disk when they are quantised there, such as "nf4_dq".
        packed: full name of such a linear's weight -> its parts; empty without `tensors`.
    """

    path: Path | None
    model_type: str
    config: dict
    num_layers: int
    hidden_size: int
    vocab_size: int
    is_tied: bool
    layers_prefix: str
    linears: tuple[Linear, ...]
    layer_params: tuple[tuple[str, tuple[int, ...]], ...]
    root_params: tuple[tuple[str, tuple[int, ...]], ...]
    tensors: dict[str, TensorRef]
    stored_format: str | None = None
    packed: dict[str, prequantized.Packed] = field(default_factory=dict)

    @property
    def softcaps_attention(self) -> bool:
        """Whether attention scores are soft-capped (Gemma 2)."""
        return bool(self.config.get("attn_logit_softcapping"))


def read(model_name: str, need_weights: bool) -> ModelInfo:
    """Describe a model given by directory, hub name or the name of a well-known shape.

    Args:
        model_name: a local directory, a hub name, or one of lookup.known_shapes().
        need_weights: find (or download) the weights too; their headers must fit config.json.

    Returns:
        The description.

    Raises:
        UserError: no such model, or one that cannot be loaded whole and safely (codes 2, 3, 5).
    """
    found = lookup.locate(model_name, need_weights)
    path = found if found.is_dir() else None
    raw = read_json(path / "config.json" if path else found)
    config = _checked_config(raw, model_name)
    stored = prequantized.stored_format(raw, model_name)
    is_known = config["model_type"] in LAYOUTS
    tensors: dict[str, TensorRef] = {}
    packed: dict[str, prequantized.Packed] = {}
    reads_headers = path is not None and (need_weights or not is_known)
    if path and reads_headers:
        tensors = read_tensors(path, PACKED_ITEM_BYTES if stored else ITEM_BYTES)
        if stored:
            tensors, packed = prequantized.fold(tensors, stored, model_name)
        tensors = _without_copies(tensors, config)
    shapes = {name: ref.shape for name, ref in tensors.items()}
    structure = layouts.from_config(config) if is_known else layouts.from_headers(shapes)
    if reads_headers:
        _check_tensors(structure, shapes, config, model_name)

    linears = _linears(structure.layer)
    if stored and tensors:
        prefixes = [f"{structure.layers_prefix}.{i}" for i in range(structure.num_layers)]
        names = {f"{prefix}.{linear.name}.weight" for prefix in prefixes for linear in linears}
        prequantized.check_linears(packed, names, model_name)
    quantised = {f"{linear.name}.weight" for linear in linears}
    others = [item for item in structure.layer.items() if item[0] not in quantised]
    return ModelInfo(
        path=path,
        model_type=config["model_type"],
        config=config,
        num_layers=structure.num_layers,
        hidden_size=layouts.size(config, "hidden_size"),
        vocab_size=layouts.size(config, "vocab_size"),
        is_tied=not structure.root.keys() & set(stored_names.HEADS),
        layers_prefix=structure.layers_prefix,
        linears=linears,
        layer_params=tuple(sorted(others)),
        root_params=tuple(sorted(structure.root.items())),
        tensors=tensors,
        stored_format=stored,
        packed=packed,
    )


def select_linears(info: ModelInfo, target_modules: str) -> tuple[Linear, ...]:
    """Choose the linears that get an adapter.

    Args:
        info: the model.
        target_modules: "all" ("all-linear", "default"), or a comma-separated list of names as in
            "q_proj" or "self_attn.q_proj".

    Returns:
        The chosen linears of one layer, in the order of info.linears.

    Raises:
        UserError: a name matches no linear (code 2).
    """
    names = {name.strip() for name in target_modules.split(",")} - {""}
    linears = tuple(linear for linear in info.linears if linear.expert is None)
    if len(names) == 1 and names <= ALL_LINEARS:
        return linears
    both_names = {linear: {linear.name, _last(linear.name)} for linear in linears}
    unmatched = names.difference(*both_names.values())
    if unmatched or not names:
        rule = f"0 modules match {', '.join(sorted(unmatched)) or 'it'}"
        remedy = f"use all, or some of {','.join(_last(linear.name) for linear in linears)}"
        raise UserError(f"lora_target_modules {target_modules!r}", rule, remedy)
    return tuple(linear for linear in linears if names & both_names[linear])


def lora_params(info: ModelInfo, rank: int, target_modules: str) -> int:
    """Count the trainable parameters of LoRA.

    Args:
        info: the model.
        rank: r.
        target_modules: see select_linears.

    Returns:
        Sum over the chosen linears of rank * (in + out), over all layers.

    Raises:
        UserError: a name matches no linear (code 2).

    Source: LoRA, arXiv:2106.09685, section 4.1: A is [r, in], B is [out, r].
    """
    chosen = select_linears(info, target_modules)
    widths = sum(linear.in_features + linear.out_features for linear in chosen)
    return info.num_layers * rank * widths


def unquantised(info: ModelInfo) -> dict[str, int]:
    """The matrices that stay in 16 bit.

    Args:
        info: the model.

    Returns:
        Name ("*" for the number of the layer) -> elements in all.
    """
    found = {name: math.prod(shape) for name, shape in info.root_params if len(shape) > 1}
    return found | {
        f"{info.layers_prefix}.*.{name}": math.prod(shape) * info.num_layers
        for name, shape in info.layer_params
        if len(shape) > 1
    }


def _place(linear: Linear) -> tuple[str, int, int]:
    assert linear.expert is not None
    return linear.expert


def active_linears(info: ModelInfo) -> tuple[tuple[Linear, ...], int]:
    """The linears that one token passes in a layer.

    Args:
        info: the model.

    Returns:
        The linears, those of an expert as often as a token has experts; and how many it has, 1 in
        a dense model.
    """
    dense = tuple(linear for linear in info.linears if linear.expert is None)
    one = sorted((n for n in info.linears if n.expert and not n.expert[1]), key=_place)
    if not one:
        return dense, 1
    num = layouts.size(info.config, "num_experts_per_tok")
    return dense + tuple(linear for linear in one for _ in range(num)), num


def num_linear_params(info: ModelInfo) -> int:
    """Count the weights that are quantised.

    Args:
        info: the model.

    Returns:
        Elements of the linears of all decoder layers, without biases.
    """
    return info.num_layers * sum(
        linear.out_features * linear.in_features for linear in info.linears
    )


def num_params(info: ModelInfo) -> int:
    """Count all parameters; a tied head counts once.

    Args:
        info: the model.

    Returns:
        Elements of all parameters.
    """
    per_layer = sum(math.prod(shape) for _, shape in info.layer_params)
    root = sum(math.prod(shape) for _, shape in info.root_params)
    return num_linear_params(info) + info.num_layers * per_layer + root


def _checked_config(config: dict, model_name: str) -> dict:
    """Refuse what cannot be trained here, and drop the keys that could name code to run."""
    model_type = config.get("model_type")
    got = f"{model_name}: model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise UserError(got, "config.json must name one", "take the model's own config.json")
    if "text_config" in config or "vision_config" in config:
        raise UserError(got, "is multi-modal; only text is built", "take its text-only variant")
    if "auto_map" in config and model_type not in LAYOUTS:
        rule = "wants its own code run (auto_map), which is never done"
        raise UserError(got, rule, f"take one of {', '.join(LAYOUTS)}")
    config_values.check(config)
    left_out = ("auto_map", "quantization_config")
    return {key: config[key] for key in config if key not in left_out and not key.startswith("_")}


def _without_copies(tensors: dict[str, TensorRef], config: dict) -> dict[str, TensorRef]:
    """Leave out what is stored twice or can be computed: a tied head, old rotary tables."""
    left_out = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * bool(layouts.is_tied(config))
    return {name: ref for name, ref in tensors.items() if not name.endswith(left_out)}


def _check_tensors(structure: Structure, shapes: Shapes, config: dict, model_name: str) -> None:
    """Every parameter must be in the files, in the right shape, and nothing else."""
    num_layers = layouts.size(config, "num_hidden_layers")
    num_found = layouts.from_headers(shapes).num_layers
    if num_layers != num_found:
        rule = f"config.json says {num_layers} decoder layers, the files hold {num_found}"
        raise UserError(model_name, rule, SAME_PLACE)
    expected = structure.all_shapes()
    wrong = [name for name in expected if shapes.get(name, expected[name]) != expected[name]]
    faults = {
        "absent from the files": [name for name in expected if name not in shapes],
        "in the files, but no part of this model type": [n for n in shapes if n not in expected],
        "of another shape than config.json says": wrong,
    }
    for fault, names in faults.items():
        if names:
            raise UserError(f"{describe(names)} in {model_name}", fault, SAME_PLACE, INTEGRITY)


def _linears(layer: Shapes) -> tuple[Linear, ...]:
    linears = []
    mixtures = {part[0] for name in layer if (part := stored_names.expert_part(name))}
    routers = {f"{block}.gate.weight" for block in mixtures}  # small, and they choose: 16 bit
    for name, shape in layer.items():
        if len(shape) != 2 or name in routers:
            continue
        module = name.removesuffix(".weight")
        bias = layer.get(f"{module}.bias")
        if module == name or bias not in (None, shape[:1]):
            rule = f"shape {list(shape)} with bias {bias} is no linear of [out, in]"
            raise UserError(name, rule, "take a model whose decoder layers are linears and norms")
        linears.append(Linear(module, shape[0], shape[1], bias is not None))
    return tuple(sorted(linears, key=_execution_key))


def _execution_key(linear: Linear) -> tuple[int, str]:
    order = [*EXECUTION_ORDER, _last(linear.name)]
    return order.index(_last(linear.name)), linear.name


def _last(name: str) -> str:
    return name.rpartition(".")[2]
