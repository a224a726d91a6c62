"""Weights that are quantized on disk: which tensors are the parts of one, and what each holds.

Bytes of bitsandbytes in 4 bit and of MXFP4 are kept as they are. FP8 and compressed-tensors become
16-bit weights as they are read, tensor by tensor, and go to the run's format. Scales of activations
are left out: activations are computed in 16 bit.

A linear of bitsandbytes is "X.weight" (codes), "X.weight.absmax", "X.weight.quant_map", with double
quantization also "nested_absmax" and "nested_quant_map", and JSON under "quant_state...". Experts
in MXFP4 are "X_blocks" [experts, out, in / 32, 16] and "X_scales" [experts, out, in / 32].

Source: bitsandbytes, functional.py, QuantState.as_dict; transformers, integrations/mxfp4.py and
finegrained_fp8.py; compressed-tensors, compressors/pack_quantized.
"""

import json
import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from fsdp_qlora.arch.files import GROUP, ITEM_BYTES, NESTED, ORIGINAL, TensorRef, damaged, refuse
from fsdp_qlora.errors import INTEGRITY, UserError

INDEXED = re.compile(r"(?P<prefix>.+?)\.(?P<index>\d+)\.(?P<name>.+)")
STATE = ".quant_state.bitsandbytes__"
MXFP4 = "mxfp4"
FP8 = ("fp8", "fbgemm_fp8")  # transformers' names
COMPRESSED = "compressed-tensors"
COMPRESSED_FORMATS = "pack-quantized int-quantized float-quantized naive-quantized dense"
COMPRESSED_FORMATS += " mixed-precision"
SCALED = {"weight_packed": "weight", "weight_scale": "scale", "weight_scale_inv": "scale"}
SCALED |= {"weight_zero_point": "zero", "weight_g_idx": "order", "weight_shape": "shape"}
OF_ACTIVATIONS = re.compile(r"(activation|input|output|[qkv])_(scale|zero_point)|input_scale_ub")
JOINED = "gate_up_proj"  # of an expert, both projections in one
FUSED = re.compile(
    r"(?P<block>.+?)(\.experts)?\.((?P<up>gate_up_proj|up_proj|input_linear\.weight)"
    r"|(?P<down>down_proj|output_linear\.weight))"
)

# Names of the text half in the files of a model that sees or hears too -> those of a text model.
WRAPPED = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.(?=layers\.|embed_tokens|norm\.))(.+)"
)
FORETELLING = re.compile(r"(model\.)?mtp(_\w+)?\.")
WRAPPED_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


class QuantizedRef(NamedTuple):
    """Where the parts of a weight that is quantized on disk lie.

    Args:
        refs: of bitsandbytes "weight", "absmax" and so on; of MXFP4 "weight", "exponents"; of a
            weight with scales "weight", "scale", "zero", "order" -> place.
        format: whose bytes are kept, "nf4_dq" or "mxfp4"; "" for a weight with scales.
        offset: of the constants, with double quantization.
        block: rows and columns that share a scale; 0: as many as the number of scales says.
    """

    refs: dict[str, TensorRef]
    format: str = ""
    offset: float | None = None
    block: tuple[int, int] = (0, 0)


class Stored(NamedTuple):
    """How a model lies on disk.

    Args:
        method: "nf4_dq" or the like, "mxfp4", "fp8", "compressed-tensors"; "" for 16 or 32 bit.
        block: see QuantizedRef.
    """

    method: str = ""
    block: tuple[int, int] = (0, 0)

    @property
    def is_kept(self) -> bool:
        """Whether bytes are trained over as they are."""
        return self.whole is not None or self.method == MXFP4

    @property
    def whole(self) -> str | None:
        """The format of all linears, when it is bitsandbytes'."""
        return self.method if self.method.startswith(("nf4", "fp4")) else None


def stored_as(config: dict, model_name: str) -> Stored:
    """Say in which format a model lies on disk.

    Args:
        config: content of config.json.
        model_name: for the message.

    Raises:
        UserError: it is quantized in a way that is not read (code 2).
    """
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        return Stored()
    found = _dict(found)
    is_double = bool(found.get("bnb_4bit_use_double_quant"))
    name = f"{found.get('bnb_4bit_quant_type')}{'_dq' * is_double}"
    if found.get("load_in_4bit") and name.removesuffix("_dq") in ("nf4", "fp4"):
        return Stored(name)
    method = str(found.get("quant_method") or "unknown")
    groups = [_dict(group) for group in _dict(found.get("config_groups")).values()]
    blocks = [_dict(group.get("weights")).get("block_structure") for group in groups]
    sizes = next(filter(None, [found.get("weight_block_size"), *blocks]), (0, 0))
    is_pair = isinstance(sizes, list | tuple) and [type(n) for n in sizes] == [int, int]
    others = set() if is_pair else {f"blocks of {sizes}"}
    if method == COMPRESSED:
        forms = {str(at.get("format") or "dense") for at in (found, *groups)}
        others |= forms - {*COMPRESSED_FORMATS.split()}
        others |= {str(_dict(found.get("sparsity_config")).get("format", "dense"))} - {"dense"}
        others |= {"transform_config"} if found.get("transform_config") else set()
    if method in (MXFP4, COMPRESSED, *FP8) and not others:
        return Stored(method, (sizes[0], sizes[1]))
    method += " in 8 bit" if found.get("load_in_8bit") else ""
    method += f": {', '.join(sorted(others))}" if others else ""
    rule = f"is quantized already ({method}); of such models bitsandbytes in 4 bit, MXFP4, FP8 "
    rule += "and compressed-tensors of whole numbers or FP8 are read"
    raise UserError(model_name, rule, ORIGINAL)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def fold(
    tensors: dict[str, TensorRef], stored: Stored, model_name: str
) -> tuple[dict[str, TensorRef], dict[str, QuantizedRef]]:
    """Make one entry of the parts of each quantized weight.

    Args:
        tensors: of the files.
        stored: of `stored_as`.
        model_name: for the message.

    Returns:
        The tensors, those of quantized weights in their true shape; and the places of the parts.

    Raises:
        UserError: another block size or type, or parts that do not fit (code 5).
    """
    if stored.whole:
        return _fold_bnb(tensors, stored.whole, model_name)
    split = _split_blocks if stored.method == MXFP4 else _fold_scaled
    folded, quantized = split(tensors, stored)
    others = [n for n, ref in folded.items() if n not in quantized and ref.dtype not in ITEM_BYTES]
    refuse({f"no part of a weight as {stored.method} has it": others}, model_name, ORIGINAL)
    return folded, quantized


def _piece(ref: TensorRef, index: int) -> TensorRef:
    """One expert's part of a tensor of all."""
    nbytes = ref.nbytes // ref.shape[0]
    start = ref.start + index * nbytes
    return ref._replace(shape=ref.shape[1:], start=start, nbytes=nbytes)


def _split_blocks(
    tensors: dict[str, TensorRef], stored: Stored
) -> tuple[dict[str, TensorRef], dict[str, QuantizedRef]]:
    """An entry of the matrix of each expert in place of MXFP4's blocks and scales."""
    folded, quantized = dict(tensors), {}
    for name, ref in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if stem == name or scales is None or (ref.dtype, scales.dtype) != ("U8", "U8"):
            continue
        if len(ref.shape) != 4 or ref.shape != (*scales.shape, 16):
            raise damaged(ref.file, f"{name} {list(ref.shape)} is no [experts, out, in / 32, 16]")
        del folded[name], folded[f"{stem}_scales"]
        block, _, part = stem.rpartition(".")
        for i in range(ref.shape[0]):
            own, at = f"{block}.{i}.{part}.weight", _piece(ref, i)
            shape = (ref.shape[1], ref.shape[2] * 32)
            # In 16 bit it lies in one tensor with the others', as [in, out].
            folded[own] = at._replace(shape=shape, is_transposed=True, joint=stem)
            parts = {"weight": at, "exponents": _piece(scales, i)}
            quantized[own] = QuantizedRef(parts, stored.method)
    return folded, quantized


def _fold_scaled(
    tensors: dict[str, TensorRef], stored: Stored
) -> tuple[dict[str, TensorRef], dict[str, QuantizedRef]]:
    """An entry of each weight in place of its numbers of 4 or 8 bits and their scales."""
    parts: dict[str, dict[str, TensorRef]] = {}
    folded: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        stem, _, part = name.rpartition(".")
        is_number = part == "weight" and ref.dtype in ("F8_E4M3", "I8")
        if part in SCALED or is_number:
            parts.setdefault(stem, {})[SCALED.get(part, part)] = ref
        elif not OF_ACTIVATIONS.fullmatch(part):
            folded[name] = ref
    quantized = {}
    for stem, refs in parts.items():
        weight, scale, name = refs.get("weight"), refs.get("scale"), f"{stem}.weight"
        shape = weight.shape if weight else ()
        if weight and weight.dtype == "I32":
            shape = _read_shape(refs.pop("shape", None))
        bits = weight.nbytes * 8 // math.prod(shape) if weight and len(shape) == 2 else 0
        if weight is None or scale is None or bits not in (4, 8):
            rule = f"parts {', '.join(sorted(refs))} are no matrix of 4 or 8 bits with its scales"
            where = next(iter(refs.values())).file
            raise UserError(f"{stem} in {where}", rule, ORIGINAL, INTEGRITY)
        folded[name] = weight._replace(shape=shape)
        quantized[name] = QuantizedRef(refs, block=stored.block)
    return folded, quantized


def _read_shape(ref: TensorRef | None) -> tuple[int, ...]:
    if ref is None or ref.dtype != "I64":
        return ()
    with ref.file.open("rb") as file:
        file.seek(ref.start)
        raw = file.read(ref.nbytes)
    return tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))


def _fold_bnb(
    tensors: dict[str, TensorRef], format_name: str, model_name: str
) -> tuple[dict[str, TensorRef], dict[str, QuantizedRef]]:
    """As `fold`."""
    states = {name: name.partition(STATE)[0] for name in tensors if STATE in name}
    folded, quantized = dict(tensors), {}
    for state_name, name in states.items():
        state = _read_state(tensors[state_name], state_name)
        refs = {"weight": tensors[name]} if name in tensors else {}
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if f"{name}.{part}" in tensors:
                refs[part] = folded.pop(f"{name}.{part}")
        del folded[state_name]
        _check(f"{name} in {model_name}", state, refs, format_name)
        quantized[name] = QuantizedRef(refs, format_name, state.get("nested_offset"))
        folded[name] = refs["weight"]._replace(shape=tuple(state["shape"]))
    return folded, quantized


def split_experts(tensors: dict[str, TensorRef], hidden: int) -> dict[str, TensorRef]:
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
    split: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        match = found.get(name)
        if match is None:
            split[name] = ref
            continue
        part = "down_proj" if match["down"] else "up_proj" if match["up"] == "up_proj" else JOINED
        num, *shape = ref.shape
        is_turned, nbytes = match["block"] in turned, ref.nbytes // max(num, 1)
        for i in range(num):
            own = (*shape[::-1],) if is_turned else (*shape,)
            own_ref = ref._replace(shape=own, start=ref.start + i * nbytes, nbytes=nbytes)
            stem = f"{match['block']}.experts.{i}.{part}.weight"
            split[stem] = own_ref._replace(is_transposed=is_turned, joint=name)
    return split


def _read_state(ref: TensorRef, name: str) -> dict:
    try:
        with ref.file.open("rb") as file:
            file.seek(ref.start)
            state = json.loads(file.read(ref.nbytes))
        if [type(size) for size in state["shape"]] != [int, int]:
            raise ValueError("no shape of two sizes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(ref.file, f"{name} is no quantization state ({error})") from None
    return state


def _check(where: str, state: dict, refs: dict[str, TensorRef], format_name: str) -> None:
    num_weights, is_double = math.prod(state["shape"]), format_name.endswith("_dq")
    num_blocks = -(-num_weights // GROUP)
    sizes = {"weight": -(-num_weights // 2), "quant_map": 16 * 4}
    sizes["absmax"] = num_blocks * (1 if is_double else 4)
    if is_double:
        sizes |= {"nested_absmax": -(-num_blocks // NESTED) * 4, "nested_quant_map": 256 * 4}
    found = {part: ref.nbytes for part, ref in refs.items()}
    own = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize"))
    wanted = (format_name.removesuffix("_dq"), GROUP, NESTED if is_double else None)
    is_good = found == sizes and own == wanted
    if not is_good or is_double != isinstance(state.get("nested_offset"), float):
        rule = f"type and block sizes {own}, want {wanted} and the parts {', '.join(sizes)}"
        raise UserError(where, rule, ORIGINAL, INTEGRITY)


def check_whole(linears: Collection[str], quantized: Collection[str], model_name: str) -> None:
    """Of files in 4 bit, all linears of the layers are, and nothing else is.

    Args:
        linears: names of their weights.
        quantized: names of what is in 4 bit.
        model_name: for the message.

    Raises:
        UserError: one is not, or something else is (code 2).
    """
    faults = {
        "not in 4 bit, where others are": sorted({*linears} - {*quantized}),
        "in 4 bit, but no linear of a decoder layer": sorted({*quantized} - {*linears}),
    }
    refuse(faults, model_name, ORIGINAL)


def text_name(name: str, config: dict, wrapper: str) -> str:
    """What a text model calls a tensor; "" for one of another part.

    Other parts are the towers of a wrapper, and layers that foretell further tokens, which
    transformers leaves too.

    Args:
        name: in the files.
        config: of the text half.
        wrapper: "" for a text model.
    """
    match, num = INDEXED.fullmatch(name), config.get("num_nextn_predict_layers") or 0
    first = config.get("num_hidden_layers")
    is_behind = match and num and first and first <= int(match["index"]) < first + num
    if is_behind or FORETELLING.match(name):
        return ""
    return inner_name(name) if wrapper else name


def inner_name(name: str) -> str:
    """What a text model calls a tensor of a wrapper's files; "" for one of another part."""
    if match := WRAPPED.fullmatch(name):
        return f"model.{match[1]}"
    return "lm_head.weight" if name in WRAPPED_HEADS else ""
