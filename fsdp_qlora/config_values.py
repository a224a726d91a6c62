"""Values of config.json that are no sizes: what each may be, so that no rank stumbles over one."""

import math
from collections.abc import Callable
from typing import Any

from fsdp_qlora.errors import UserError

ACTIVATIONS = {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu"}
ACTIVATIONS |= {"gelu_python", "gelu_10", "relu", "relu2", "relu6", "mish", "tanh", "linear"}
DTYPES = {"float32", "float16", "bfloat16", "float64", "auto"}
ROPES = {"default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional"}

Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_id(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(type(entry) is int for entry in ids)


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
    return (
        lambda value: isinstance(value, str) and value in names,
        f"one of {' '.join(sorted(names))}",
    )


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
    "bos_token_id": (_is_id, "a whole number or null"),
    "eos_token_id": (_is_id, "a whole number, a list of them, or null"),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), BOOL),
}
NEEDED = ("rms_norm_eps", "max_position_embeddings")  # null is no value for these


def check(config: dict[str, Any]) -> None:
    """Check the values that are there.

    Args:
        config: content of config.json.

    Raises:
        UserError: one is not what transformers takes (code 2).
    """
    for key, (is_good, rule) in RULES.items():
        value = config.get(key)
        is_left_out = value is None and (key not in NEEDED or key not in config)
        if not is_left_out and not is_good(value):
            remedy = "take the model's own config.json"
            raise UserError(f"{key} = {value!r} in config.json", f"must be {rule}", remedy)
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
        rule = f"the embedding has {rows} rows"
        raise UserError(f"pad_token_id = {pad} in config.json", rule, "set it to null there")
