"""What a model is: its decoder layers, their linears, all shapes; read without torch.

No weight is read, only config.json and the headers of the safetensors files. For the model types
of layers.LAYOUTS the two must agree tensor by tensor; another type is accepted with weights when
its layers repeat exactly. Values of config.json that are no sizes are checked too, so that no rank
fails over one.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.arch import files, layers
from fsdp_qlora.arch.files import QuantizedRef, TensorRef
from fsdp_qlora.arch.layers import LAYOUTS, Linear, Shapes, Structure
from fsdp_qlora.errors import INTEGRITY, UserError

ALL_LINEARS = {"all", "all-linear", "all_linear", "default"}
HEADS = ("lm_head.weight", "embed_out.weight")
FUSED = {"gate_up_proj": (0, 1), "down_proj": (2,)}
FUSED_NAME = re.compile(r"(?P<layer>.+\.\d+)\..+\.experts\.(?P<fused>gate_up_proj|down_proj)")
ACTIVATIONS = {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu"}
ACTIVATIONS |= {"gelu_python", "gelu_10", "relu", "relu2", "relu6", "mish", "tanh", "linear"}
DTYPES = {"float32", "float16", "bfloat16", "float64", "auto"}
ROPES = {"default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional"}
OWN_CONFIG = "take the model's own config.json"
SAME_PLACE = "copy config.json and the weights from the same place"


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
        stored_format: of the linears on disk when they are quantized there, such as "nf4_dq".
        quantized: full name of such a linear's weight -> its parts; empty without `tensors`.
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
    quantized: dict[str, QuantizedRef] = field(default_factory=dict)

    @property
    def softcaps_attention(self) -> bool:
        """Whether attention scores are soft-capped (Gemma 2)."""
        return bool(self.config.get("attn_logit_softcapping"))


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
    config = _checked_config(raw, model_name)
    stored = files.stored_format(raw, model_name)
    is_known = config["model_type"] in LAYOUTS
    tensors: dict[str, TensorRef] = {}
    quantized: dict[str, QuantizedRef] = {}
    if reads_headers := path and (need_weights or not is_known):
        item_bytes = files.QUANTIZED_ITEM_BYTES if stored else files.ITEM_BYTES
        tensors = files.read_tensors(path, item_bytes)
        if stored:
            tensors, quantized = files.fold(tensors, stored, model_name)
        tensors = _without_copies(tensors, config)
    shapes = {name: ref.shape for name, ref in tensors.items()}
    structure = layers.from_config(config) if is_known else layers.from_headers(shapes)
    if reads_headers:
        _check_tensors(structure, shapes, config, model_name)

    linears = layers.linears(structure.layer)
    weights = {f"{linear.name}.weight" for linear in linears}
    if stored and tensors:
        prefixes = [f"{structure.layers_prefix}.{i}" for i in range(structure.num_layers)]
        names = {f"{prefix}.{name}" for prefix in prefixes for name in weights}
        files.check_quantized(quantized, names, model_name)
    return ModelInfo(
        path=path,
        model_type=config["model_type"],
        config=config,
        num_layers=structure.num_layers,
        hidden_size=layers.size(config, "hidden_size"),
        vocab_size=layers.size(config, "vocab_size"),
        is_tied=not structure.root.keys() & set(HEADS),
        layers_prefix=structure.layers_prefix,
        linears=linears,
        layer_params=tuple(sorted(it for it in structure.layer.items() if it[0] not in weights)),
        root_params=tuple(sorted(structure.root.items())),
        tensors=tensors,
        stored_format=stored,
        quantized=quantized,
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
    both_names = {linear: {linear.name, linear.last_name} for linear in linears}
    unmatched = names.difference(*both_names.values())
    if unmatched or not names:
        rule = f"0 modules match {', '.join(sorted(unmatched)) or 'it'}"
        remedy = f"use all, or some of {','.join(linear.last_name for linear in linears)}"
        raise UserError(f"lora_target_modules {target_modules!r}", rule, remedy)
    return tuple(linear for linear in linears if names & both_names[linear])


def unquantized(info: ModelInfo) -> dict[str, int]:
    """The matrices that stay in 16 bit.

    Args:
        info: the model.

    Returns:
        Name ("*" for the number of the layer) -> elements in all.
    """
    shapes = {name: (shape, 1) for name, shape in info.root_params}
    for name, shape in info.layer_params:
        shapes[f"{info.layers_prefix}.*.{name}"] = shape, info.num_layers
    return {name: math.prod(at) * num for name, (at, num) in shapes.items() if len(at) > 1}


def active_linears(info: ModelInfo) -> tuple[tuple[Linear, ...], int]:
    """The linears that one token passes in a layer.

    Args:
        info: the model.

    Returns:
        The linears, those of an expert as often as a token has experts; and how many it has, 1 in
        a dense model.
    """
    dense = tuple(linear for linear in info.linears if linear.expert is None)
    of_first = [linear for linear in info.linears if linear.expert and not linear.expert[1]]
    one = sorted(of_first, key=lambda linear: linear.expert or ())
    if not one:
        return dense, 1
    num = layers.size(info.config, "num_experts_per_tok")
    return dense + tuple(linear for linear in one for _ in range(num)), num


def num_linear_params(info: ModelInfo) -> int:
    """Count the weights that are quantized.

    Args:
        info: the model.

    Returns:
        Elements of the linears of all decoder layers, without biases.
    """
    return info.num_layers * sum(linear.num_weights for linear in info.linears)


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
        raise UserError(got, "config.json must name one", OWN_CONFIG)
    if "text_config" in config or "vision_config" in config:
        raise UserError(got, "is multi-modal; only text is built", "take its text-only variant")
    if "auto_map" in config and model_type not in LAYOUTS:
        rule = "wants its own code run (auto_map), which is never done"
        raise UserError(got, rule, f"take one of {', '.join(LAYOUTS)}")
    _check_values(config)
    left_out = ("auto_map", "quantization_config")
    return {key: config[key] for key in config if key not in left_out and not key.startswith("_")}


def _without_copies(tensors: dict[str, TensorRef], config: dict) -> dict[str, TensorRef]:
    """Leave out what is stored twice or can be computed: a tied head, old rotary tables."""
    left_out = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * bool(layers.is_tied(config))
    return {name: ref for name, ref in tensors.items() if not name.endswith(left_out)}


def _check_tensors(structure: Structure, shapes: Shapes, config: dict, model_name: str) -> None:
    """Every parameter must be in the files, in the right shape, and nothing else."""
    num_layers = layers.size(config, "num_hidden_layers")
    num_found = layers.from_headers(shapes).num_layers
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
    files.refuse(faults, model_name, SAME_PLACE, INTEGRITY)


def stored_name(info: ModelInfo, name: str) -> str:
    """Name in the files, where transformers calls a parameter otherwise.

    Mixtral's experts lie in `block_sparse_moe` there and in `mlp` in the model; GPT-NeoX's head is
    `embed_out` there.

    Args:
        info: the model.
        name: full name of a parameter that the built model has and that is not fused.

    Source: transformers, src/transformers/conversion_mapping.py.
    """
    if name in HEADS:
        return next((head for head, _ in info.root_params if head in HEADS), name)
    stored = next((linear.expert[0] for linear in info.linears if linear.expert), "mlp")
    return name.replace(".mlp.", f".{stored}.")


def expert_matrices(info: ModelInfo, name: str) -> list[list[str]]:
    """Names in the files of what a fused 3-D parameter holds.

    transformers holds the experts of a layer in `experts.gate_up_proj` and `experts.down_proj`;
    files have a matrix for each projection of each expert.

    Args:
        info: the model.
        name: full name in the built model, "model.layers.0.mlp.experts.gate_up_proj".

    Returns:
        For each expert the matrices that lie one below the other; empty for another parameter.
    """
    match = FUSED_NAME.fullmatch(name)
    if match is None:
        return []
    wanted = FUSED[match["fused"]]
    parts = {linear.expert[1:]: linear.name for linear in info.linears if linear.expert}
    num = 1 + max((number for number, _ in parts), default=-1)
    return [[f"{match['layer']}.{parts[i, part]}.weight" for part in wanted] for i in range(num)]


Check = Callable[[Any], bool]


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
    numbers = [table.get(key, 1) for table in tables for key in ("rope_theta", "factor")]
    return all(isinstance(kind, str) and kind in ROPES for kind in kinds) and all(
        number is None or _is_positive(number) for number in numbers
    )


def _one_of(names: set[str]) -> tuple[Check, str]:
    words = f"one of {' '.join(sorted(names))}"
    return lambda value: isinstance(value, str) and value in names, words


def _are_ids(value: Any) -> bool:
    return all(type(entry) is int for entry in (value if isinstance(value, list) else [value]))


POSITIVE, BOOL = (_is_positive, "a positive number"), (lambda v: type(v) is bool, "true or false")
ROPE = (_is_rope, f"a table whose rope_type is one of {' '.join(sorted(ROPES))}")
RULES: dict[str, tuple[Check, str]] = {
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "max_position_embeddings": (lambda v: type(v) is int and v > 0, "a positive integer"),
    "initializer_range": (_is_number, "a number"),
    "attention_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "from 0 to below 1"),
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "hidden_act": _one_of(ACTIVATIONS),
    "hidden_activation": _one_of(ACTIVATIONS),
    "dtype": _one_of(DTYPES),
    "torch_dtype": _one_of(DTYPES),
    "pad_token_id": (lambda v: type(v) is int, "a whole number or null"),
    "bos_token_id": (_are_ids, "a whole number or null"),
    "eos_token_id": (_are_ids, "a whole number, a list of them, or null"),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), BOOL),
}
NEEDED = ("rms_norm_eps", "max_position_embeddings")  # null is no value for these


def _check_values(config: dict[str, Any]) -> None:
    """Refuse a value that transformers does not take."""
    for key, (is_good, rule) in RULES.items():
        value = config.get(key)
        is_left_out = value is None and (key not in NEEDED or key not in config)
        if not is_left_out and not is_good(value):
            got = f"{key} = {value!r} in config.json"
            raise UserError(got, f"must be {rule}", OWN_CONFIG)
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
        rule = f"the embedding has {rows} rows"
        raise UserError(f"pad_token_id = {pad} in config.json", rule, "set it to null there")
