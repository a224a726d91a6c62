"""Base formats: how a frozen weight becomes bytes, and bytes a weight again.

Each format is a row of FORMATS. A row knows which fields it stores per linear (quantized weights
and quantization constants), how to `quantize` a weight into them, how to make the constants of a
whole decoder layer usable at once (`constants`), and how to `dequantize` one linear. Only this
module knows bitsandbytes and hqq. HQQ's bytes become weights without hqq, by the fastest way there
is: hqq views a weight as a matrix of groups, [groups, group size] (axis 1) or [group size, groups]
(axis 0), and puts the values of rows that lie far apart into one word.

Shape letters: O out features, I in features, N = O*I weights of a linear.

Source: mobiusml/hqq, hqq/core/bitpack.py and quantize.py (Quantizer.dequantize).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType

import torch

from fsdp_qlora.arch.files import GROUP, NESTED
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError
from fsdp_qlora.planning.sizes import FORMATS as STORAGES
from fsdp_qlora.planning.sizes import PER_WORD, Storage


def dequantize_hqq(
    quantized: torch.Tensor,
    constants: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    storage: Storage,
) -> torch.Tensor:
    """Dequantize one linear to the bits of hqq's own dequantization.

    As there, difference and product are rounded to the wider one of the compute dtype and the
    dtype of the constants; what is wider than the compute dtype is then rounded to it.

    Args:
        quantized: uint8, 1-D.
        constants: zero and scale of each group, as stored.
        shape: (O, I).
        dtype: of the result.
        storage: bits, group size and axis.

    Returns:
        weight_OI.
    """
    zero, scale = constants
    cols = storage.group_size if storage.axis else math.prod(shape) // storage.group_size
    rows = math.prod(shape) // cols
    words = quantized.view(torch.int32 if storage.weight_bits == 3 else torch.uint8).view(-1, cols)
    math_dtype = torch.promote_types(dtype, zero.dtype)
    kernel = triton_kernels() if quantized.is_cuda else None
    if kernel is not None:
        out = torch.empty(rows, cols, dtype=dtype, device=quantized.device)
        kernel.dequantize_hqq(
            words, zero, scale, out, storage.weight_bits, storage.axis, math_dtype
        )
        return out.view(*shape)
    zero, scale = (part.unsqueeze(storage.axis) for part in constants)
    values = _values(words, storage.weight_bits, math_dtype)[:rows]
    return values.sub_(zero).mul_(scale).view(*shape).to(dtype)


def _values(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    num_slots = PER_WORD if bits == 3 else 8 // bits
    values = torch.empty((num_slots, *words.shape), dtype=dtype, device=words.device)
    for slot, part in enumerate(values):
        part.copy_((words >> bits * (num_slots - 1 - slot)).bitwise_and_((1 << bits) - 1))
    return values.flatten(0, 1)


@lru_cache
def triton_kernels() -> ModuleType | None:
    """The module triton_kernels.py; None where torch came without Triton."""
    try:
        return import_module("fsdp_qlora.model.triton_kernels")
    except ImportError:
        return None


Fields = dict[str, torch.Tensor]
NESTED_BLOCK = NESTED  # constants that share one second-level constant in double quantization
GROUP_SIZE = GROUP  # weights of a bitsandbytes block


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    Attributes:
        storage: its bytes: the quantized weight ("weight") and the fields of constants.
        quantize: weight_OI -> {field name: 1-D tensor}, at most `num_elements` long.
        constants: (fields of all linears of a layer, compute dtype) -> tensors, each indexed like
            `index_field`.
        index_field: the field whose element ranges cut the tensors of `constants` into linears
            ("" = no constants).
        is_sequential: the bytes and constants of several linears, one after the other, are those of
            one long linear.
        dequantize: (quantized bytes, constants of the linear, shape, compute dtype) -> weight_OI in
            the compute dtype.
    """

    storage: Storage
    quantize: Callable[[torch.Tensor], Fields]
    constants: Callable[[Fields, torch.dtype], Sequence[torch.Tensor]]
    index_field: str
    dequantize: Callable[..., torch.Tensor]
    is_sequential: bool = True


def import_bitsandbytes():
    """bitsandbytes.functional, without warnings that mean nothing here.

    (It does not find a CPU kernel that is not used; and where it compiles one, a torch made for
    CUDA looks for a GPU.)
    """
    for name in ("bitsandbytes", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    return bnb


def _quantize_bnb(weight_OI: torch.Tensor, quant_type: str, double: bool) -> Fields:
    bnb = import_bitsandbytes()
    quantized, state = bnb.quantize_4bit(
        weight_OI.contiguous(),
        blocksize=GROUP_SIZE,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=torch.uint8,
    )
    if not double:
        return {"weight": quantized.view(-1), "absmax": state.absmax}
    nested = state.state2.absmax
    offset = state.offset.expand_as(nested).contiguous()  # kernels read it by its address
    return _nested_fields(quantized.view(-1), state.absmax, nested, offset)


def _nested_fields(weight, qabsmax, nested_absmax, offset) -> Fields:
    fields = {"weight": weight, "qabsmax": qabsmax}
    return fields | {"nested_absmax": nested_absmax, "offset": offset}


def from_stored(parts: Fields, offset: float | None, format_name: str, name: str) -> Fields:
    """Take a linear as bitsandbytes has saved it, byte by byte.

    Args:
        parts: "weight", "absmax" and so on, as in the file.
        offset: of the constants, with double quantization.
        format_name: row of FORMATS.
        name: of the weight, for the message.

    Returns:
        What `quantize` would have made.

    Raises:
        UserError: the codes are not those of the format (code 5).
    """
    bnb, host = import_bitsandbytes(), torch.device("cpu")
    codes = {"quant_map": bnb.get_4bit_type(format_name[:3], device="cpu")}
    codes |= {"nested_quant_map": dynamic_map(host)} if offset is not None else {}
    if not all(torch.equal(parts[part], code) for part, code in codes.items()):
        rule = "stored with another code than this bitsandbytes has"
        raise UserError(name, rule, "take the 16-bit original of this model", INTEGRITY)
    if offset is None:
        return {"weight": parts["weight"], "absmax": parts["absmax"]}
    nested = parts["nested_absmax"]
    offsets = torch.full_like(nested, offset)
    return _nested_fields(parts["weight"], parts["absmax"], nested, offsets)


def _as_stored(fields: Fields, dtype: torch.dtype, names: Sequence[str]) -> Sequence[torch.Tensor]:
    return [fields[name] for name in names]


def _nested_absmax(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Second-level constants to absmax, for all linears of a layer in one kernel.

    Source: QLoRA, arXiv 2305.14314, section 3, double quantization.
    """
    nested = fields["nested_absmax"]
    code = dynamic_map(nested.device)
    kernel = triton_kernels() if nested.is_cuda else None
    if kernel is not None:
        offset = fields["offset"]
        return (kernel.expand(fields["qabsmax"], nested, offset, code, NESTED_BLOCK),)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        fields["qabsmax"], nested, code, NESTED_BLOCK, torch.float32
    )
    absmax.view(-1, NESTED_BLOCK).add_(fields["offset"].unsqueeze(1))
    return (absmax,)


@lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 256-entry code of 8-bit constants, float32, one copy per device."""
    return import_bitsandbytes().create_dynamic_map().to(device)


@lru_cache
def values_of(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit code, float32, as the library's own kernel has them."""
    codes = torch.arange(16, dtype=torch.uint8, device=device).mul_(16).view(-1, 1)
    ones = torch.ones(1, device=device)
    pairs = torch.ops.bitsandbytes.dequantize_4bit(
        codes, ones, GROUP_SIZE, quant_type, (16, 2), torch.float32
    )
    return pairs[:, 0].contiguous()


def _dequantize_bnb(quantized, constants, shape, dtype, quant_type: str) -> torch.Tensor:
    kernel = triton_kernels() if quantized.is_cuda else None
    if kernel is not None:
        weight_OI = torch.empty(*shape, dtype=dtype, device=quantized.device)
        table = values_of(quant_type, quantized.device)
        kernel.dequantize_bnb(quantized, constants[0], table, weight_OI, GROUP_SIZE)
        return weight_OI
    return torch.ops.bitsandbytes.dequantize_4bit(
        quantized.view(-1, 1), constants[0], GROUP_SIZE, quant_type, shape, dtype
    )


def _quantize_hqq(weight_OI: torch.Tensor, storage: Storage) -> Fields:
    bits, group_size = storage.weight_bits, storage.group_size
    num_groups, rest = divmod(weight_OI.numel(), group_size)
    if rest or (storage.axis == 1 and bits in (2, 4) and num_groups % (8 // bits)):
        rule = f"hqq quantizes whole groups of {group_size}, {8 // bits} of them together"
        remedy = "use another --group_size, or --train_type qlora"
        raise UserError(f"a linear of {list(weight_OI.shape)}", rule, remedy)
    try:  # it has no wheel, so it is optional
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        got, rule = f"hqq cannot be imported ({error})", "an HQQ base needs the hqq package"
        remedy = "pip install hqq, or use --train_type qlora"
        raise UserError(got, rule, remedy, ENVIRONMENT) from None
    quantized, meta = Quantizer.quantize(
        weight_OI,
        nbits=bits,
        group_size=group_size,
        axis=storage.axis,
        device=weight_OI.device.type,
    )
    dtype = getattr(torch, storage.fields[0].dtype)
    return {
        "weight": quantized.view(-1).view(torch.uint8),
        "scale": meta["scale"].view(-1).to(dtype),
        "zero": meta["zero"].view(-1).to(dtype),
    }


def _quantize_int8(weight_OI: torch.Tensor) -> Fields:
    """Row-wise absmax: LLM.int8, arXiv 2208.07339, section 3."""
    quantized, row_absmax, _ = import_bitsandbytes().int8_vectorwise_quant(weight_OI.half())
    return {"weight": quantized.view(-1).view(torch.uint8), "row_absmax": row_absmax}


def _int8_constants(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    return (fields["row_absmax"] * (1.0 / 127.0),)


def _dequantize_int8(quantized, constants, shape, dtype) -> torch.Tensor:
    """In one kernel, rounded once, as the backward pass of bitsandbytes' MatMul8bitLt does."""
    weight_OI = torch.empty(*shape, dtype=dtype, device=quantized.device)
    values = quantized.view(torch.int8).view(*shape)
    return torch.mul(values, constants[0].unsqueeze(1), out=weight_OI)


def _quantize_bf16(weight_OI: torch.Tensor) -> Fields:
    return {"weight": weight_OI.bfloat16().contiguous().view(-1).view(torch.uint8)}


def _dequantize_bf16(quantized, constants, shape, dtype) -> torch.Tensor:
    return quantized.view(torch.bfloat16).view(shape).to(dtype)


def _bnb_row(name: str) -> Format:
    quant_type, _, double = name.partition("_")
    return Format(
        storage=STORAGES[name],
        quantize=partial(_quantize_bnb, quant_type=quant_type, double=bool(double)),
        constants=_nested_absmax if double else partial(_as_stored, names=("absmax",)),
        index_field="qabsmax" if double else "absmax",
        dequantize=partial(_dequantize_bnb, quant_type=quant_type),
    )


def _hqq_row(storage: Storage) -> Format:
    return Format(
        storage=storage,
        quantize=partial(_quantize_hqq, storage=storage),
        constants=partial(_as_stored, names=("zero", "scale")),
        index_field="scale",
        dequantize=partial(dequantize_hqq, storage=storage),
        is_sequential=False,
    )


FORMATS: dict[str, Format] = {
    **{name: _bnb_row(name) for name in ("nf4", "nf4_dq", "fp4", "fp4_dq")},
    "int8": Format(
        STORAGES["int8"], _quantize_int8, _int8_constants, "row_absmax", _dequantize_int8, False
    ),
    **{name: _hqq_row(row) for name, row in STORAGES.items() if name.startswith("hqq")},
    "bf16": Format(
        STORAGES["bf16"], _quantize_bf16, partial(_as_stored, names=()), "", _dequantize_bf16
    ),
}
