"""Models that lie on disk in 4 bit as bitsandbytes saves them: their format, their bytes' places.

Such a linear is "X.weight" (packed), "X.weight.absmax", "X.weight.quant_map", with double
quantisation also "nested_absmax" and "nested_quant_map", and JSON under "quant_state...".

Source: bitsandbytes, functional.py, QuantState.as_dict.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.config import TRAIN_TYPES, Config
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.weights_files import TensorRef, describe

STATE = ".quant_state.bitsandbytes__"
BLOCK, NESTED_BLOCK = 64, 256  # as model/quantize.py has them
ORIGINAL = "take the 16-bit original of this model"


@dataclass(frozen=True)
class Packed:
    """Where a linear that is stored in 4 bit lies.

    Args:
        refs: "weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map" -> place.
        offset: of the constants, with double quantisation.
    """

    refs: dict[str, TensorRef]
    offset: float | None


def stored_format(config: dict, model_name: str) -> str | None:
    """Say in which format a model lies on disk.

    Args:
        config: content of config.json.
        model_name: for the message.

    Returns:
        "nf4", "nf4_dq", "fp4" or "fp4_dq"; None for 16 or 32 bit.

    Raises:
        UserError: it is quantised in another way (code 2).
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    found = found if isinstance(found, dict) else {}
    name = (
        f"{found.get('bnb_4bit_quant_type')}{'_dq' * bool(found.get('bnb_4bit_use_double_quant'))}"
    )
    if found.get("load_in_4bit") and name.removesuffix("_dq") in ("nf4", "fp4"):
        return name
    method = found.get("quant_method") or "unknown"
    method += " in 8 bit" if found.get("load_in_8bit") else ""
    rule = f"is quantised already ({method}); of such models only bitsandbytes in 4 bit is read"
    raise UserError(model_name, rule, ORIGINAL)


def fold(
    tensors: dict[str, TensorRef], format_name: str, model_name: str
) -> tuple[dict[str, TensorRef], dict[str, Packed]]:
    """Make one entry of the parts of each packed linear.

    Args:
        tensors: of the files.
        format_name: of `stored_format`.
        model_name: for the message.

    Returns:
        The tensors, those of packed weights in their true shape; and the places of the parts.

    Raises:
        UserError: another block size or type, or parts that do not fit (code 5).
    """
    states = {name: name.partition(STATE)[0] for name in tensors if STATE in name}
    folded, packed = dict(tensors), {}
    for state_name, name in states.items():
        state = _read_state(tensors[state_name], state_name)
        refs = {"weight": tensors[name]} if name in tensors else {}
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if f"{name}.{part}" in tensors:
                refs[part] = folded.pop(f"{name}.{part}")
        del folded[state_name]
        _check(f"{name} in {model_name}", state, refs, format_name)
        packed[name] = Packed(refs, state.get("nested_offset"))
        folded[name] = dataclasses.replace(refs["weight"], shape=tuple(state["shape"]))
    return folded, packed


def _read_state(ref: TensorRef, name: str) -> dict:
    try:
        with ref.file.open("rb") as file:
            file.seek(ref.start)
            state = json.loads(file.read(ref.nbytes))
        if [type(size) for size in state["shape"]] != [int, int]:
            raise ValueError("no shape of two sizes")
    except (ValueError, KeyError, TypeError) as error:
        rule = f"is no quantisation state ({error})"
        raise UserError(name, rule, "fetch the model again", INTEGRITY) from None
    return state


def _check(where: str, state: dict, refs: dict[str, TensorRef], format_name: str) -> None:
    num_weights, is_double = math.prod(state["shape"]), format_name.endswith("_dq")
    num_blocks = -(-num_weights // BLOCK)
    sizes = {"weight": -(-num_weights // 2), "quant_map": 16 * 4}
    sizes["absmax"] = num_blocks * (1 if is_double else 4)
    if is_double:
        sizes |= {"nested_absmax": -(-num_blocks // NESTED_BLOCK) * 4, "nested_quant_map": 256 * 4}
    found = {part: ref.nbytes for part, ref in refs.items()}
    own = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize"))
    wanted = (format_name.removesuffix("_dq"), BLOCK, NESTED_BLOCK if is_double else None)
    is_good = found == sizes and own == wanted
    if not is_good or is_double != isinstance(state.get("nested_offset"), float):
        rule = f"type and block sizes {own}, want {wanted} and the parts {', '.join(sizes)}"
        raise UserError(where, rule, ORIGINAL, INTEGRITY)


def check_linears(packed: dict[str, Packed], linears: set[str], model_name: str) -> None:
    """All linears of the decoder layers must be packed, and nothing else.

    Args:
        packed: of `fold`.
        linears: names of the weights of all decoder layers' linears.
        model_name: for the message.

    Raises:
        UserError: some are not (code 2).
    """
    faults = {
        "not in 4 bit, where others are": sorted(linears - packed.keys()),
        "in 4 bit, but no linear of a decoder layer": sorted(packed.keys() - linears),
    }
    for rule, names in faults.items():
        if names:
            raise UserError(f"{describe(names)} in {model_name}", rule, ORIGINAL)


def adopt(cfg: Config, stored: str | None, given: frozenset[str] | None = None) -> Config:
    """Take the format of the base from its files, where they are in 4 bit.

    Args:
        cfg: the run.
        stored: format of the files, or None.
        given: names of the options that the user wrote; None: those that are not as usual.

    Returns:
        The run with the format of the files.

    Raises:
        UserError: an option asks for another format (code 2).
    """
    if stored is None or cfg.format_name == stored:
        return cfg
    rule = f"the model is stored as {stored}, whose bytes are kept"
    if given is None:
        given = frozenset(
            f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default
        )
    own: dict[str, Any] = {"quant_type": stored.removesuffix("_dq")}
    own["double_quant"] = stored.endswith("_dq")
    if TRAIN_TYPES[cfg.train_type].base != "bnb":
        own["train_type"] = "qlora"
    for name, value in own.items():
        if name in given and getattr(cfg, name) != value:
            got = f"--{name} {str(getattr(cfg, name)).lower()}"
            raise UserError(got, rule, "leave it out, or take the 16-bit original")
    return dataclasses.replace(cfg, **own)
